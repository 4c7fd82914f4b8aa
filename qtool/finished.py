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
from qtool.recipe import one_of

if TYPE_CHECKING:
    from formats.export.report import ExportReport
    from qtool.results import Imported


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
        way = "with {outputs} outputs, {inputs} inputs, {splits} splits" if blocks["outputs"] else "decoded, by cuBLAS"
        lines.append(
            f"{row['encoding']:9} {shape:>12} {row['tokens']:5} tokens: {row['milliseconds']:.4f} ms "
            f"{way.format_map(blocks)} ({row['untried_milliseconds']:.4f} untried)"
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
    calibration: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write FILE in the format `to`."""
    if dtype is not None:
        one_of("dtype", dtype, ("float32", "float16", "bfloat16"))
    if to in ("transformers", "gguf") and dtype is not None:
        hint = "give it to from_pretrained, or leave it out" if to == "transformers" else "leave it out"
        raise ConfigError(f"--dtype {dtype}: is not for --to {to}; {hint}")
    for option, value, only in (("gptq-version", gptq_version, "gptq"), ("gguf-type", gguf_type, "gguf"),
                                ("calibration", calibration, "gguf")):  # fmt: skip
        if value is not None and to != only:
            raise ConfigError(f"--{option} {value}: is for --to {only}; leave it out")
    if to in ("dense", "transformers") and lossy:
        raise ConfigError(f"--lossy: --to {to} holds everything; leave it out")
    if calibration is not None and not lossy:
        raise ConfigError(f"--calibration {calibration}: is for what is rounded again; give --lossy too")
    with QtmFile.open(file) as opened, quiet_transformers():
        if to == "gguf":
            return _export_gguf(file, opened, output, gguf_type, calibration, lossy=lossy, overwrite=overwrite)
        return _export_folder(opened, to, output, dtype, gptq_version, lossy=lossy, overwrite=overwrite)


def _export_folder(
    opened: QtmFile,
    to: str,
    output: Path,
    dtype: str | None,
    gptq_version: int | None,
    *,
    lossy: bool,
    overwrite: bool,
) -> ExportReport:
    from formats.export.awq import export_awq
    from formats.export.compressed_tensors import export_compressed_tensors
    from formats.export.dense import export_dense
    from formats.export.gptq import export_gptq
    from formats.export.packed import export_packed

    if to == "transformers":
        return export_packed(opened, output, overwrite=overwrite)
    if to == "dense":
        return export_dense(opened, output, dtype=dtype or "float32", overwrite=overwrite)
    options: dict[str, Any] = {"dtype": dtype, "lossy": lossy, "overwrite": overwrite}
    if to == "compressed-tensors":
        return export_compressed_tensors(opened, output, **options)
    if to == "awq":
        return export_awq(opened, output, **options)
    return export_gptq(opened, output, version=2 if gptq_version is None else gptq_version, **options)


def _export_gguf(
    file: Path,
    opened: QtmFile,
    output: Path,
    gguf_type: str | None,
    calibration: str | None,
    *,
    lossy: bool,
    overwrite: bool,
) -> ExportReport:
    """What is fitted anew is weighted by what the inputs of its linear are, measured on the file's own blocks."""
    from formats.export.gguf import export_gguf, inexact
    from qtool.importance import measure_importance

    importance = None
    if lossy and inexact(opened, gguf_type):
        importance = measure_importance(file, source=calibration or "builtin")
    return export_gguf(opened, output, gguf_type=gguf_type, lossy=lossy, overwrite=overwrite, importance=importance)


def format_export(output: Path, report: ExportReport) -> str:
    """The files, and what they do not hold as it was."""
    text = f"{output}: {', '.join(report.files)}"
    if not report.losses:
        return text
    worst = max(report.losses, key=lambda loss: loss.error)
    rows = [f"{loss.name}: {loss.reason}, error {100 * loss.error:.3g}%" for loss in report.losses]
    lines = "\n".join(rows)
    return f"{text}\n{lines}\n{len(rows)} tensors were rounded again, {worst.name} lost most: {100 * worst.error:.3g}%"


def run_import(source: str, output: Path, *, assume_v1_zeros: bool, overwrite: bool) -> Imported:
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
) -> tuple[str, str]:
    """(what the model writes alone, and behind the prompt if it is a continuation)."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    from formats.embedded import load_tokenizer
    from formats.kv_cache import PackedCache
    from formats.loader import load
    from formats.skeleton import is_encoder_decoder

    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature:g}: must be 0 or more")
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
        read = inputs["input_ids"].shape[1]
        if kv_bits is not None:
            options["cache"] = PackedCache(model.config, kv_bits)
        elif is_encoder_decoder(model.config):
            prompt, read = "", 0  # the encoder's: what the decoder writes does not begin with it
            # One of transformers' own making is as long as the encoder, where the decoder has more blocks.
            options["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = model.generate(  # type: ignore[operator]
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    text = str(tokenizer.decode(ids[0, read:], skip_special_tokens=True))
    return text, prompt + text


def _check_length(n_prompt: int, n_new: int, config: Any) -> None:
    if n_prompt == 0:
        raise ConfigError("--prompt: has no tokens in it; give some text")
    context = getattr(config, "max_position_embeddings", None)
    if context and n_prompt + n_new > context:
        raise ConfigError(
            f"--max-new-tokens {n_new}: with the {n_prompt} tokens of the prompt that is more than "
            f"the model's context of {context}"
        )
