"""What warm, export and generate do with a file that is finished, between the parsed options and the printed result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from formats.device import ready_device
from formats.reader import QtmFile
from qtool.errors import CheckpointError, ConfigError
from qtool.numerics import quiet_transformers

if TYPE_CHECKING:
    from formats.export.report import ExportReport

FITTED_TYPES = ("q4_k", "q5_k", "q6_k")
"""Of GGUF, which hold no file's numbers: weights are fitted anew, by how much their inputs matter."""


def run_warm(file: Path, device: str, tokens: str) -> list[dict[str, Any]]:
    """What was found for each class of shapes, in the order in which it was tried."""
    from formats.warm import kinds_of, warm

    counts = [int(part) if part.strip().isdecimal() else 0 for part in tokens.split(",")]
    if not all(0 < count <= 1 << 16 for count in counts):
        raise ConfigError(f"--tokens {tokens}: must be numbers from 1 to {1 << 16}, as 1,16,512")
    where = ready_device(device)
    if where.type == "cpu":
        raise ConfigError("device 'cpu': has no kernels to make ready; give a GPU, as cuda")
    with QtmFile.open(file) as opened:
        total = len(kinds_of(opened)) * len(counts)
        found = tqdm(warm(opened, where, counts), total=total, desc="warm", unit="class", disable=None)
        return [asdict(row) for row in found]


def format_warm(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        blocks, shape = row["blocks"], "x".join(map(str, row["shape"]))
        lines.append(
            f"{row['encoding']:9} {shape:>12} {row['tokens']:5} tokens: {row['milliseconds']:.4f} ms with "
            f"{blocks['outputs']} outputs, {blocks['inputs']} inputs, {blocks['splits']} splits "
            f"({row['untried_milliseconds']:.4f} untried)"
        )
    return "\n".join(lines)


def run_export(
    file: Path,
    to: str,
    output: Path,
    *,
    dtype: str | None = None,
    gptq_version: int | None = None,
    gguf_type: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write FILE in the format `to`."""
    _check_export_options(to, dtype, gptq_version, gguf_type, lossy)
    options: dict[str, Any] = {"lossy": lossy, "overwrite": overwrite}
    with QtmFile.open(file) as opened, quiet_transformers():
        if to == "gguf":
            from formats.export.gguf import export_gguf

            importance = _importance(file) if lossy and gguf_type in FITTED_TYPES else None
            return export_gguf(opened, output, gguf_type=gguf_type, importance=importance, **options)
        if to == "transformers":
            from formats.export.packed import export_packed

            return export_packed(opened, output, overwrite=overwrite)
        if to == "dense":
            from formats.export.dense import export_dense

            return export_dense(opened, output, dtype=dtype or "float32", overwrite=overwrite)
        if to == "gptq":
            from formats.export.gptq import export_gptq

            return export_gptq(opened, output, version=gptq_version or 2, dtype=dtype, **options)
        from formats.export.awq import export_awq
        from formats.export.compressed_tensors import export_compressed_tensors

        export = export_awq if to == "awq" else export_compressed_tensors
        return export(opened, output, dtype=dtype, **options)


def _check_export_options(
    to: str, dtype: str | None, gptq_version: int | None, gguf_type: str | None, lossy: bool
) -> None:
    """Refuse what a format has no use for."""
    if to in ("transformers", "gguf") and dtype is not None:
        raise ConfigError(f"--dtype {dtype}: is not for --to {to}; leave it out")
    if to != "gptq" and gptq_version is not None:
        raise ConfigError(f"--gptq-version {gptq_version}: is for --to gptq; leave it out")
    if to != "gguf" and gguf_type is not None:
        raise ConfigError(f"--gguf-type {gguf_type}: is for --to gguf; leave it out")
    if to in ("dense", "transformers") and lossy:
        raise ConfigError(f"--lossy: --to {to} holds everything; leave it out")


def _importance(file: Path) -> Any:
    """What a fit is weighted by; its bars are for a terminal."""
    from qtool.importance import measure_importance

    return measure_importance(file)


def format_export(output: Path, report: ExportReport) -> str:
    """The files, and what they do not hold as it was."""
    text = f"{output}: {', '.join(report.files)}"
    if not report.losses:
        return text
    worst = max(report.losses, key=lambda loss: loss.error)
    rows = [f"{loss.name}: {loss.reason}, error {100 * loss.error:.3g}%" for loss in report.losses]
    lines = "\n".join(rows)
    return f"{text}\n{lines}\n{len(rows)} tensors were rounded again, {worst.name} lost most: {100 * worst.error:.3g}%"


def run_import(source: str, output: Path, *, assume_v1_zeros: bool, overwrite: bool) -> dict[str, Any]:
    """What the new file holds."""
    from qtool.imports import import_model

    with quiet_transformers():
        return import_model(source, output, overwrite=overwrite, assume_v1_zeros=assume_v1_zeros)


def format_import(result: dict[str, Any]) -> str:
    """What became of it, and each layer whose codes our file cannot hold."""
    lines = [f"{result['file']}: {result['bytes']:,} bytes, {result['packed']} quantized tensors as they were"]
    lines += [f"{name}: {reason}" for name, reason in result["decoded"].items()]
    return "\n".join(lines)


def run_generate(
    file: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    kv_bits: int | None = None,
    **placement: Any,
) -> str:
    """The continuation alone."""
    import torch

    from formats.embedded import load_tokenizer
    from formats.kv_cache import PackedCache
    from formats.loader import load

    if not file.is_file():
        raise CheckpointError(f"{file}: {'a folder' if file.is_dir() else 'no such file'}; give a .qtm file")
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, model = load_tokenizer(file), load(file, **placement)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        _check_length(inputs["input_ids"].shape[1], max_new_tokens, model.config)
        options: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        if kv_bits is not None:
            options["cache"] = PackedCache(model.config, kv_bits)
        ids = model.generate(  # type: ignore[operator]
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _check_length(n_prompt: int, n_new: int, config: Any) -> None:
    if n_prompt == 0:
        raise ConfigError("--prompt: has no tokens in it; give some text")
    context = getattr(config, "max_position_embeddings", None)
    if context and n_prompt + n_new > context:
        raise ConfigError(
            f"--max-new-tokens {n_new}: with the {n_prompt} tokens of the prompt that is more than "
            f"the model's context of {context}"
        )
