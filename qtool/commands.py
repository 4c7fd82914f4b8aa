"""What each command does between the parsed options and the printed result."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.reader import QtmFile
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.cluster import count_workers
from qtool.engines import options_for, rules_of, shapes_of
from qtool.errors import ConfigError
from qtool.estimate import estimate_run
from qtool.evaluation import DivergenceResult, PerplexityResult, evaluate_divergence, evaluate_perplexity
from qtool.job import meet_target, prepare
from qtool.journal import Journal, default_folder, is_unfinished
from qtool.memory import parse_size, peak_rss_bytes, reset_peak
from qtool.numerics import exact_float32, quiet_transformers
from qtool.options import build_recipe, default_output
from qtool.pipeline import compress
from qtool.protocol import Protocol
from qtool.publish import check_target
from qtool.recipe import Recipe, RunOptions
from qtool.report import NUMBER, TROUBLE, fold_names, inspect_file
from qtool.results import Compressed, Estimated
from qtool.seq2seq import blockwise_model
from qtool.sizes import format_bytes
from qtool.verification import verify_against


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A run that is asked for."""

    model: str
    output: Path
    recipe: Recipe
    options: RunOptions
    trust_remote_code: bool
    warn: Callable[[str], None]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Request:
        """From the options of `qtool.compress`, model and output among them; ConfigError names what makes no sense."""
        rest = dict(options)
        for name in ("layers", "ignore"):  # one alone is no list of letters
            rest[name] = (rest[name],) if isinstance(rest[name], str) else rest[name]
        model, output, memory = os.fspath(rest.pop("model")), rest.pop("output"), rest.pop("max_memory")
        trust_remote_code, warn = rest.pop("trust_remote_code"), rest.pop("warn")
        work_dir, log_file = rest.pop("work_dir"), rest.pop("log_file")
        run = RunOptions(
            overwrite=rest.pop("force"),
            work_dir=None if work_dir is None else Path(work_dir),
            restart=rest.pop("restart"),
            max_memory_bytes=None if memory is None else parse_size(memory, "--max-memory"),
            log_file=None if log_file is None else Path(log_file),
            cluster=rest.pop("cluster"),
            wanted_bits=rest["bits"] if (rest["bits"] or 1) < 1 else None,
        )
        engine, rest["number_format"] = rest.pop("engine"), rest.pop("format")
        if engine is not None:
            rest = options_for_engine(model, engine, rest, trust_remote_code=trust_remote_code)
        recipe = build_recipe(**rest)
        output = default_output(model, recipe) if output is None else Path(output)
        return cls(
            model=model, output=output, recipe=recipe, options=run, trust_remote_code=trust_remote_code, warn=warn
        )


def run_compress(request: Request) -> Compressed:
    """Compress and describe the file that came of it."""
    model, output, options = request.model, request.output, request.options
    # A work folder beside an output that exists: the run may have been killed when nothing but the folder was left.
    unfinished = is_unfinished(options.work_dir or default_folder(output))
    check_target(output, "--output", overwrite=options.overwrite or unfinished)
    try:
        with quiet_transformers():
            checkpoint = _open_original(model, request.trust_remote_code)
            if output.exists() and Path(model).exists() and output.samefile(model):
                raise ConfigError(f"{output}: is the model itself; give another --output")
            report = compress(checkpoint, output, request.recipe, options, warn=request.warn)
    except OSError as error:
        error.filename = error.filename or str(output)  # a write that fails does not say where
        raise
    found = inspect_file(output)
    return Compressed(
        file=output,
        **{key: found[key] for key in ("file_bytes", "parameters", "bits_per_weight", "quantized_share", "quality")},
        left_dense=[row["name"] for row in found["tensors"] if row["encoding"] == "dense"],
        seconds=report.seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def options_for_engine(
    model: str, engine: str, options: Mapping[str, Any], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """A recipe's options, those left open chosen for an engine, which depends on the model's shapes."""
    rules_of(engine)
    with quiet_transformers():
        shapes = shapes_of(blockwise_model(_open_original(model, trust_remote_code)))
    return options_for(engine, options, shapes)


def _open_original(model: str, trust_remote_code: bool) -> Checkpoint:
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    if checkpoint.format == "qtm":
        raise ConfigError(f"{model}: already compressed; give the original model")
    return checkpoint


def format_result(result: dict[str, Any]) -> str:
    error = result["quality"]["mean_relative_error"]
    mixtures = result["quality"].get("experts") or {}
    troubled = [
        f"{_counted(result['quality'][key], mixtures)} {text}"
        for key, text in TROUBLE.items()
        if result["quality"][key]
    ]
    return (
        f"{result['file']}: {format_bytes(result['file_bytes'])}, {result['bits_per_weight']:.3f} bits per weight, "
        f"{result['quantized_share']:.1%} of {result['parameters']:,} parameters quantized, "
        f"{len(result['left_dense'])} tensors left dense (qtool inspect lists them), mean relative error {error:.2e}, "
        f"{result['seconds']:.0f} s, peak memory {format_bytes(result['peak_rss_bytes'])}"
        + "".join(f"; {line} (qtool inspect names them)" for line in troubled)
    )


def _counted(names: Iterable[str], mixtures: Container[str]) -> str:
    """Layers, and mixtures that stand for their experts where these are too many to be named."""
    found = Counter(name in mixtures for name in names)
    parts = [f"{found[False]} layers"] * (found[False] > 0) + [f"experts of {found[True]} blocks"] * (found[True] > 0)
    return " and ".join(parts)


def dry_run(request: Request) -> Estimated:
    """What a run would give. For a target, what was measured stays in the work folder, and the run starts from it."""
    options, warn = request.options, request.warn
    with quiet_transformers(), exact_float32():
        checkpoint = _open_original(request.model, request.trust_remote_code)
        reset_peak()
        workers = count_workers(options.cluster) if options.cluster else 0
        job = prepare(checkpoint, request.recipe, options, warn, max(workers, 1))
        if request.recipe.target is not None:
            with Journal(request.output, options.work_dir) as journal:
                job = meet_target(job, options, journal, warn)
                return Estimated(**estimate_run(job, workers))
        return Estimated(**estimate_run(job, workers))


def format_estimate(estimate: dict[str, Any]) -> str:
    lines = [
        f"file             {format_bytes(estimate['file_bytes'])}",
        f"bits per weight  {estimate['bits_per_weight']:.3f}" + _uncounted(estimate),
        f"quantized        {estimate['quantized_share']:.2%} of {estimate['parameters']:,} parameters",
        f"peak memory      at most {format_bytes(estimate['peak_rss_bytes'])}",
        *_format_workers(estimate),
        f"work folder      {format_bytes(estimate['work_bytes'])} besides the file, until the run is done",
        f"time             about {estimate['seconds']:.0f} s on this machine",
        *_format_loss(estimate),
        *_format_bits(estimate["layers"]),
        f"left dense       {len(estimate['left_dense'])} tensors",
    ]
    for reason in dict.fromkeys(row["reason"] for row in estimate["left_dense"]):
        names = fold_names(row["name"] for row in estimate["left_dense"] if row["reason"] == reason)
        lines.append(f"  {reason}: {names}")
    return "\n".join(lines)


def _format_workers(estimate: dict[str, Any]) -> list[str]:
    if not estimate["workers"]:
        return []
    each = format_bytes(estimate["worker_bytes"])
    return [f"cluster          {estimate['workers']} workers of about {each}, and Ray's object store, come on top"]


def _uncounted(estimate: dict[str, Any]) -> str:
    """What the figure leaves open."""
    return " (outliers by a threshold come on top)" if estimate["outliers_by_threshold"] else ""


def _format_loss(estimate: dict[str, Any]) -> list[str]:
    """What a target's layers cost."""
    loss, gap = estimate["predicted_kl"], estimate["allocation_gap"]
    if loss is None:
        return []
    least = f", at most {gap:.2%} above the least" if gap else ""
    return [f"predicted loss   {loss:.4g} nats of KL divergence a token, to second order{least}"]


def _format_bits(layers: list[dict[str, Any]]) -> list[str]:
    """How many layers of each kind are stored how."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        kinds.setdefault(NUMBER.sub("*", row["name"]), []).append(row)
    width = max(map(len, kinds), default=0)
    return [f"  {kind:{width}}  {', '.join(_labels(rows))}" for kind, rows in kinds.items()]


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    """`4 bits ×3` for layers of one kind; groups and outliers are told where the layers differ in them."""
    differ = {key: len({row[key] for row in rows}) > 1 for key in ("group_size", "outliers")}

    def label(row: dict[str, Any]) -> str:
        group = f" g{row['group_size']}" if differ["group_size"] else ""
        return f"{row['bits']} bits{group}" + " and outliers" * (differ["outliers"] and row["outliers"])

    return [f"{label} ×{n}" for label, n in sorted(Counter(map(label, rows)).items())]


def run_perplexity(
    model: str, *, baseline: str | None, data: str, text_field: str, kv_bits: int | None, protocol: Protocol
) -> PerplexityResult:
    with quiet_transformers():
        checkpoint = open_checkpoint(model)
        base = None if baseline is None else open_checkpoint(baseline)
        return evaluate_perplexity(
            checkpoint, baseline=base, data=data, text_field=text_field, protocol=protocol, kv_bits=kv_bits
        )


def format_perplexity(result: dict[str, Any]) -> str:
    lines = [f"PPL = {_estimate(result, 'perplexity')}  (standard error over {result['error_over']})"]
    if "baseline_perplexity" in result:
        ratio = result["perplexity"] / result["baseline_perplexity"]
        lines += [
            f"baseline    {result['baseline_perplexity']:.4f}  (ratio {ratio:.4f})",
            f"KL          mean {result['kl_mean']:.5f} nats, 99th percentile {result['kl_p99']:.5f}",
            f"same top    {result['same_top']:.2%} of the tokens",
        ]
    if "kv_bits" in result:
        lines.append(f"KV cache    {result['kv_bits']} bits")
    return "\n".join([*lines, *_sample_lines(result)])


def run_kl(
    model: str,
    *,
    baseline: str | None,
    save_baseline: Path | None,
    baseline_logits: Path | None,
    data: str,
    text_field: str,
    protocol: Protocol,
) -> DivergenceResult:
    chosen = _one_baseline(baseline, baseline_logits, save_baseline)
    with quiet_transformers():
        checkpoint = open_checkpoint(model)
        base = chosen if isinstance(chosen, Path) else open_checkpoint(chosen)
        return evaluate_divergence(
            checkpoint, base, data=data, text_field=text_field, protocol=protocol, save_baseline=save_baseline
        )


def _one_baseline(model: str | None, saved: Path | None, save_to: Path | None) -> str | Path:
    """The model, or the file, to compare with."""
    if model is not None and saved is not None:
        raise ConfigError(f"--baseline-logits {saved}: stands for --baseline {model}; give one of the two")
    chosen = model if saved is None else saved
    if chosen is None:
        raise ConfigError("--baseline: none given; give the model to compare with, or --baseline-logits FILE")
    if save_to is not None and saved is not None:
        raise ConfigError(f"--save-baseline {save_to}: --baseline-logits {saved} is saved already; give a --baseline")
    return chosen


def format_kl(result: dict[str, Any]) -> str:
    lines = [
        f"PPL = {_estimate(result, 'perplexity')}  (standard errors over {result['error_over']})",
        f"baseline    {_estimate(result, 'baseline_perplexity')}",
        f"ratio       {_estimate(result, 'perplexity_ratio')}",
        f"KL          mean {_estimate(result, 'kl_mean', '.5f')} nats",
        f"            median {result['kl_p50']:.5f}, 95th percentile {result['kl_p95']:.5f}, "
        f"99th {result['kl_p99']:.5f}, largest {result['kl_max']:.5f}",
        f"same top    {_estimate(result, 'same_top', '.2%')} of the tokens",
    ]
    return "\n".join([*lines, *_sample_lines(result)])


def _estimate(result: dict[str, Any], name: str, style: str = ".4f") -> str:
    error = result.get(f"{name}_error")
    return f"{result[name]:{style}}" + ("" if error is None else f" +/- {error:{style}}")


def _sample_lines(result: dict[str, Any]) -> list[str]:
    apart = "" if result["stride"] == result["seq_len"] else f", {result['stride']} apart"
    return [
        f"data        {result['data']}, SHA-256 {result['data_sha256']}",
        f"protocol    {result['protocol']}, BOS: {result['bos']}",
        f"windows     {result['windows']} of {result['seq_len']} tokens{apart}, {result['tokens']} scored, "
        f"in {result['seconds']:.0f} s",
        *_halves(result),
    ]


def _halves(result: dict[str, Any]) -> list[str]:
    n = result.get("encoder_tokens")
    return [
        f"halves      the encoder reads the first {n} tokens of a window, the decoder is scored on the others"
    ] * bool(n)


def run_verify_against(file: QtmFile, model: str, *, calibration: str | None, text_field: str) -> list[dict[str, Any]]:
    """Each layer's recorded and recomputed error; an error names the first that is not as recorded."""
    with quiet_transformers():
        checks = verify_against(file, open_checkpoint(model), calibration, text_field)
    return [check.to_dict() for check in checks]
