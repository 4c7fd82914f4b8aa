"""What `qtool plot` draws: a file's size from its header, its quality from there or from a result of `qtool eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.errors import ConfigError
from qtool.report import inspect_file

MAX_RESULT_BYTES = 2**20
RECORDED = "error"
# By the key of a result: what the axis is called.
MEASURED = {"perplexity": "perplexity", "kl": "mean KL divergence from the baseline, nats"}
_RESULT_KEYS = {"perplexity": "perplexity", "kl": "kl_mean"}
# What two results were measured on; figures are comparable only where all of it is the same.
_CONDITIONS = ("data_sha256", "seq_len", "tokens", "windows", "protocol", "stride", "bos")


@dataclass(slots=True, kw_only=True)
class Subject:
    """One file to be drawn; `figures` holds its quality by what was measured, lower being better."""

    path: Path
    found: Mapping[str, Any]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One JSON object that `qtool eval --json` printed."""

    path: Path
    values: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.values["model"])

    def figure(self, metric: str) -> float | None:
        return _number(self.values.get(_RESULT_KEYS[metric]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The files in the order given, and the uncompressed models that were measured, by name."""

    subjects: Sequence[Subject]
    references: Mapping[str, float]


def gather(paths: Sequence[Path]) -> Gathered:
    """Read files and results, each known by its ending, and put every result to its file.

    ConfigError for what is neither, for a result of a file that is not there, and for results that were measured
    on different texts; FormatError for a file that is broken.
    """
    results = [read_result(path) for path in paths if path.suffix.lower() == ".json"]
    _check_conditions(results)
    subjects: list[Subject] = []
    for path in paths:
        if path.suffix.lower() != ".json" and not any(_same(path, subject.path) for subject in subjects):
            subjects.append(_subject(path))
    references: dict[str, float] = {}
    for result in results:
        if _names_a_file(result):
            subject = _find(result, subjects)
            subject.figures |= {name: value for name in MEASURED if (value := result.figure(name)) is not None}
        elif (value := result.figure("perplexity")) is not None:
            references[Path(result.model).name] = value
    baseline = _common_baseline(results)
    if baseline is not None and not references:
        references["uncompressed"] = baseline
    return Gathered(subjects=subjects, references=references)


def read_result(path: Path) -> Result:
    """A result that `qtool eval ... --json` printed into a file; ConfigError for anything else."""
    if path.stat().st_size > MAX_RESULT_BYTES:
        raise ConfigError(f"{path}: more than {MAX_RESULT_BYTES:,} bytes: no result of qtool eval ... --json")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); write it with qtool eval ... --json > {path.name}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise ConfigError(f"{path}: no result of qtool eval ... --json: it names no model")
    result = Result(path=path, values=values)
    if all(result.figure(metric) is None for metric in MEASURED):
        raise ConfigError(f"{path}: holds neither a perplexity nor a KL divergence; measure with qtool eval perplexity")
    return result


def recorded_error(subject: Subject) -> float | None:
    """The mean relative error that a file records of itself."""
    return _number(subject.found["quality"].get("mean_relative_error"))


def _subject(path: Path) -> Subject:
    subject = Subject(path=path, found=inspect_file(path))
    if (error := recorded_error(subject)) is not None:
        subject.figures[RECORDED] = error
    return subject


def _names_a_file(result: Result) -> bool:
    return result.model.lower().endswith(".qtm")


def _find(result: Result, subjects: list[Subject]) -> Subject:
    """The subject that a result is about; one that was not given is read where it lies, or beside the result."""
    model = Path(result.model)
    matching = [subject for subject in subjects if _same(subject.path, model)]
    matching = matching or [subject for subject in subjects if subject.path.name == model.name]
    if len(matching) > 1:
        both = " and ".join(str(subject.path) for subject in matching)
        raise ConfigError(f"{result.path}: measured {model}; {both} are both called so; give it by its path")
    if matching:
        return matching[0]
    for path in (model, result.path.parent / model.name):
        if path.is_file():
            subjects.append(_subject(path))
            return subjects[-1]
    raise ConfigError(f"{result.path}: measured {result.model}, which is not there; give that file too")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _check_conditions(results: Iterable[Result]) -> None:
    first: Result | None = None
    for result in results:
        first = first or result
        for key in _CONDITIONS:
            was, now = first.values.get(key), result.values.get(key)
            if was != now:
                raise ConfigError(
                    f"{result.path}: measured with {key} {_brief(now)}, {first.path} with {_brief(was)}: "
                    "not comparable; measure both alike"
                )


def _common_baseline(results: Iterable[Result]) -> float | None:
    """The perplexity of the baseline that all results with one share; its divergence depends on it too."""
    first: tuple[Result, float] | None = None
    for result in results:
        base = _number(result.values.get("baseline_perplexity"))
        if base is None:
            continue
        first = first or (result, base)
        if not math.isclose(base, first[1], rel_tol=1e-6):
            raise ConfigError(
                f"{result.path}: its baseline has perplexity {base:.6g}, that of {first[0].path} {first[1]:.6g}: "
                "not comparable; measure both against one baseline"
            )
    return None if first is None else first[1]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _number(value: Any) -> float | None:
    """A number above or at 0 that can be drawn; None for anything else, true and NaN included."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) and value >= 0 else None
    except OverflowError:
        return None
