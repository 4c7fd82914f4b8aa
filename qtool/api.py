"""Everything that the command line does, as functions with its options by name and with its defaults.

What goes wrong comes as the exceptions of `qtool.errors`, `formats.errors` and `calibration.errors`, whose messages are
one line. Progress bars are shown on a terminal alone. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import inspect as inspection
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar

from qtool.results import Compressed, Estimated, Generated, Imported, Inspected, TaskScores, Verified

if TYPE_CHECKING:
    from formats.export.report import ExportReport
    from qtool.commands import Request
    from qtool.evaluation import DivergenceResult, PerplexityResult
    from qtool.protocol import ProtocolName

Source: TypeAlias = str | PathLike[str]
"""A Hugging Face folder, a hub id, a GGUF or a `.qtm` file."""
Warn: TypeAlias = Callable[[str], None]
EXPORTS = ("dense", "transformers", "gptq", "compressed-tensors", "awq", "gguf")
P = ParamSpec("P")
R = TypeVar("R")


def _request(
    model: Source,
    output: Source | None = None,
    *,
    bits: float | None = None,
    engine: str | None = None,
    method: str = "gptq",
    format: str | None = None,
    expert_format: str | None = None,
    ternary_grid: str | None = None,
    effort: str = "default",
    group_size: int | None = None,
    symmetric: bool | None = None,
    stat_bits: int | None = None,
    stat_rows: int | None = None,
    double_quant: bool = False,
    outliers: str | float | None = None,
    outlier_threshold: float | None = None,
    activation_threshold: float | None = None,
    outlier_features: int | None = None,
    act_order: bool | None = None,
    percdamp: float | None = None,
    scale_search: bool | None = None,
    input_scales: bool | None = None,
    embeddings: int | None = None,
    target_size: str | int | None = None,
    target_bits: float | None = None,
    fused: bool = False,
    layers: Sequence[str] = (),
    ignore: Sequence[str] = (),
    calibration: str = "builtin",
    text_field: str = "text",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    independent: bool = False,
    min_expert_tokens: int = 64,
    force: bool = False,
    max_memory: str | int | None = None,
    work_dir: Source | None = None,
    restart: bool = False,
    cluster: str | None = None,
    log_file: Source | None = None,
    trust_remote_code: bool = False,
    warn: Warn | None = None,
) -> Request:
    """What is asked for: the options of `qtool compress` by their names, but for `symmetric` (`--sym`), `engine`
    (`--for`) and `layers` (`--layer`, any number). warn: gets each line that a user should read; without it they are
    Python's warnings.
    """
    options = dict(locals())  # the names above, each said once
    from qtool.commands import Request

    return Request.of(options | {"warn": warn or _warn})


def _of_request(run: Callable[[Request], R]) -> Callable[[Callable[P, Request]], Callable[P, R]]:
    """`run` as a function of what makes its request."""

    def compose(request: Callable[P, Request]) -> Callable[P, R]:
        @wraps(run)
        def composed(*args: P.args, **kwargs: P.kwargs) -> R:
            return run(request(*args, **kwargs))

        returns = inspection.signature(run).return_annotation
        composed.__signature__ = inspection.signature(request).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return composed

    return compose


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def _compress(request: Request) -> Compressed:
    """Write a compressed model to `output` (by default NAME-4bit.qtm, NAME-90MB.qtm here), and describe it.

    The options are those of `qtool compress`. A run that was killed goes on where it was when it is called again.
    """
    from qtool import commands

    return commands.run_compress(request)


def _dry_run(request: Request) -> Estimated:
    """What `compress` with the same arguments would give, take and leave dense; nothing is written but, for a target,
    what was measured, into the work folder."""
    from qtool import commands

    return commands.dry_run(request)


compress = _of_request(_compress)(_request)
dry_run = _of_request(_dry_run)(_request)


def inspect(
    file: Source,
    *,
    experts: bool = False,
    report: Source | None = None,
    layer: str | None = None,
    force: bool = False,
) -> Inspected:
    """What is in a file, from its header alone. experts: a row for each; report: a page with pictures to write."""
    from qtool.report import inspect_file

    found = inspect_file(file)
    if report is not None or layer is not None:
        from qtool.pictures.picture import write_report

        page = None if report is None else Path(report)
        found["report"] = write_report(Path(file), page, layer, overwrite=force)
    if experts:
        from qtool.expert_report import list_experts

        found["experts"] = list_experts(found)
    return Inspected(**found)


def verify(
    file: Source, *, against: Source | None = None, calibration: str | None = None, text_field: str = "text"
) -> Verified:
    """Check every byte of a file; FormatError says what is wrong. against: the model it was made from, whose layers'
    errors are measured again."""
    from formats.reader import QtmFile, verify_file

    with QtmFile.open(Path(file)) as opened:
        report = verify_file(opened)
        layers = None
        if against is not None:
            from qtool import commands

            layers = commands.run_verify_against(
                opened, fspath(against), calibration=calibration, text_field=text_field
            )
    return Verified(file=Path(file), sections=report.n_sections, bytes=report.n_bytes, layers=layers)


def evaluate(
    model: Source,
    *,
    data: str = "builtin:test",
    text_field: str = "text",
    protocol: ProtocolName = "gptq",
    seq_len: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    baseline: Source | None = None,
    kv_bits: int | None = None,
) -> PerplexityResult:
    """Perplexity on a text, and with a baseline KL divergence and agreement, as `qtool eval perplexity` says them."""
    from qtool import commands
    from qtool.protocol import Protocol

    asked = Protocol(name=protocol, seq_len=seq_len, stride=stride, max_windows=max_windows)
    base = None if baseline is None else fspath(baseline)
    return commands.run_perplexity(
        fspath(model), baseline=base, data=data, text_field=text_field, kv_bits=kv_bits, protocol=asked
    )


def evaluate_kl(
    model: Source,
    *,
    data: str = "builtin:test",
    text_field: str = "text",
    protocol: ProtocolName = "gptq",
    seq_len: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    baseline: Source | None = None,
    save_baseline: Source | None = None,
    baseline_logits: Source | None = None,
) -> DivergenceResult:
    """How far predictions are from a baseline's, a model or what `save_baseline` wrote, as `qtool eval kl` says it."""
    from qtool import commands
    from qtool.protocol import Protocol

    asked = Protocol(name=protocol, seq_len=seq_len, stride=stride, max_windows=max_windows)
    return commands.run_kl(
        fspath(model),
        baseline=None if baseline is None else fspath(baseline),
        save_baseline=None if save_baseline is None else Path(save_baseline),
        baseline_logits=None if baseline_logits is None else Path(baseline_logits),
        data=data,
        text_field=text_field,
        protocol=asked,
    )


def evaluate_tasks(
    model: Source,
    *,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    baseline: Source | None = None,
    include_path: Source | None = None,
    device: str = "cpu",
) -> TaskScores:
    """Scores in tasks of lm-eval (`pip install 'qtool[tasks]'`), by name; include_path: a folder of more tasks."""
    from qtool.tasks import evaluate_tasks

    scores = evaluate_tasks(
        fspath(model),
        [tasks] if isinstance(tasks, str) else tasks,
        baseline=None if baseline is None else fspath(baseline),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        include_path=None if include_path is None else Path(include_path),
        device=device,
    )
    return TaskScores(**scores)


def generate(
    file: Source,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    device_map: str | None = None,
    offload: Literal["host", "disk"] | None = None,
    kv_bits: int | None = None,
) -> Generated:
    """What the model in a file writes after a prompt; temperature 0 takes the likeliest token each time."""
    from qtool import finished

    text, whole = finished.run_generate(
        Path(file),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        kv_bits=kv_bits,
        device=device,
        device_map=device_map,
        offload=offload,
    )
    return Generated(prompt=prompt, text=text, whole=whole)


def warm(file: Source, *, device: str = "cuda", tokens: str = "1,16,512,2048") -> list[dict[str, Any]]:
    """Compile a file's kernels for a GPU and find the fastest blocks: one row for each class of shapes."""
    from qtool import finished

    return finished.run_warm(Path(file), device, tokens)


def export(
    file: Source,
    output: Source,
    *,
    to: str,
    dtype: str | None = None,
    gptq_version: int | None = None,
    gguf_type: str | None = None,
    calibration: str | None = None,
    lossy: bool = False,
    force: bool = False,
) -> ExportReport:
    """Write the model in a file in a format that other tools load; what could not be carried comes back by tensor.

    to: one of EXPORTS. Where a format would lose something, nothing is written without `lossy`. calibration: the text
    by which a GGUF's weights are fitted anew.
    """
    from qtool import finished
    from qtool.recipe import one_of

    one_of("to", to, EXPORTS)
    options: dict[str, Any] = {"dtype": dtype, "gptq_version": gptq_version, "gguf_type": gguf_type}
    options |= {"calibration": calibration, "lossy": lossy}
    return finished.run_export(Path(file), to, Path(output), overwrite=force, **options)


def import_(source: Source, output: Source, *, assume_v1_zeros: bool = False, force: bool = False) -> Imported:
    """Write a model that somebody else quantized (a folder of GPTQ, AWQ or compressed-tensors, a GGUF file) as it is.

    assume_v1_zeros: GPTQ of version 1 by a program that is not known stores its zeros less one.
    """
    from qtool import finished

    return finished.run_import(fspath(source), Path(output), assume_v1_zeros=assume_v1_zeros, overwrite=force)


def plot(
    files: Sequence[Source],
    *,
    output: Source = "plot.html",
    quality: str | None = None,
    size: str = "bits",
    force: bool = False,
) -> dict[str, Any]:
    """Draw the quality of files and results against their size; what was drawn comes back."""
    from qtool.pictures.plot import plot as draw

    return draw([Path(path) for path in files], Path(output), quality=quality, size=size, overwrite=force)
