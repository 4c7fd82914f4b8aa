"""`qtool eval tasks`: a model's scores in tasks of lm-eval, beside those of a baseline.

lm-eval (EleutherAI's harness, extra `tasks`) asks the questions and counts the answers; here a model is handed to it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError, ConfigError

MISSING = "eval tasks: needs the extra: pip install 'qtool[tasks]'"


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    baseline: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The scores of a model (a .qtm file, a folder or a hub id) and of the baseline, with their standard errors.

    tasks: names, patterns or groups that lm-eval knows, or that a .yaml file in `include_path` defines.
    limit: questions of each task, at most; None asks all. num_fewshot: examples before each; None as the task says.
    """
    _check(tasks, limit, num_fewshot, batch_size, include_path)
    lm_eval = _lm_eval()
    started = time.perf_counter()
    with _quiet():
        manager = _manager(tasks, include_path)
        options = {"task_manager": manager, "limit": limit, "num_fewshot": num_fewshot, "log_samples": False}

        def run(name: str) -> dict[str, Any]:
            from lm_eval.models.huggingface import HFLM

            language_model, tokenizer = _load(name, device)
            asked = HFLM(pretrained=language_model, tokenizer=tokenizer, batch_size=batch_size, device=device)
            with _naming_tasks(tasks):
                return dict(lm_eval.simple_evaluate(asked, tasks=list(tasks), **options))

        found = run(model)
        base = None if baseline is None else run(baseline)
    rows = _rows(found["results"])
    if base is not None:
        _compare(rows, _rows(base["results"]))
    return {
        "model": model,
        "baseline": baseline,
        "tasks": rows,
        "questions": {name: count["effective"] for name, count in found["n-samples"].items()},
        "num_fewshot": dict(found["n-shot"]),
        "lm_eval": found["lm_eval_version"],
        "seconds": time.perf_counter() - started,
    }


def format_tasks(result: dict[str, Any]) -> str:
    header = ["task", "metric", "score", "+/-"]
    if result["baseline"] is not None:
        header += ["baseline", "+/-", "difference"]
    lines = [header]
    for row in result["tasks"]:
        cells = [row["task"], row["metric"], *map(_number, (row["score"], row["error"]))]
        if result["baseline"] is not None:
            cells += map(_number, (row["baseline"], row["baseline_error"], row["difference"]))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
    questions = ", ".join(f"{name} {count}" for name, count in result["questions"].items())
    return "\n".join([*table, f"questions: {questions}; lm-eval {result['lm_eval']}, {result['seconds']:.0f} s"])


def _check(
    tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int, include_path: Path | None
) -> None:
    if not tasks:
        raise ConfigError("--tasks: names no task; give one, as arc_easy")
    for option, value, least in (("limit", limit, 1), ("num-fewshot", num_fewshot, 0), ("batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"--{option} {value}: must be at least {least}")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(
            f"--include-path {include_path}: no such folder; give the one that has the tasks' .yaml files"
        )


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """Results alone go to stdout; what lm-eval has to say below an error is not said."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """What finds the tasks; lm-eval's own 15,000, which take seconds to list, only where they are asked for."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ConfigError(
                f"--tasks {task}: no such task; lm-eval ls tasks lists them, --include-path adds your own"
            )
    return manager


def _load(name: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, in float32 on a CPU, in the device's own dtype on a GPU, whatever the source."""
    from formats.device import default_dtype, ready_device

    path, dtype = Path(name).expanduser(), default_dtype(ready_device(device))
    if path.suffix == ".qtm":
        from formats.embedded import load_tokenizer
        from formats.loader import load

        if not path.is_file():
            raise CheckpointError(f"{name}: no such file; give a .qtm file, a model folder or a hub id")
        return load(path, device=device, dtype=dtype), load_tokenizer(path)
    if path.is_file():
        raise CheckpointError(f"{name}: neither a .qtm file nor a model folder; compress it first")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from formats.skeleton import is_encoder_decoder

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        auto = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM
        model: Any = auto.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return model.to(device).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _naming_tasks(tasks: Sequence[str]) -> Iterator[None]:
    """A task whose data is out of reach is told by name."""
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--tasks {','.join(tasks)}: the data cannot be loaded ({reason}); offline, give tasks of local files by "
            "--include-path"
        ) from error


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every task and metric of lm-eval's `metric,filter` and `metric_stderr,filter`."""
    rows = []
    for task, values in sorted(results.items()):
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            number = float(error) if isinstance(error, int | float) else None
            rows.append({"task": task, "metric": name, "score": float(value), "error": number})
    return rows


def _compare(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    """Put the baseline's scores beside the model's."""
    known = {(row["task"], row["metric"]): row for row in base}
    for row in rows:
        other = known[row["task"], row["metric"]]
        row |= {"baseline": other["score"], "baseline_error": other["error"]}
        row["difference"] = row["score"] - other["score"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
