"""What a run did: its report, and its log with one JSON line a layer (`--log-file`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import numpy as np

from formats.experts import expert_of
from qtool.errors import naming
from qtool.memory import rss_bytes
from qtool.plan import TensorPlan
from qtool.solve import Solved

MAX_NAMED = 1000
"""Layers that a file names for one reason: DeepSeek-V3 has 30,000, and a header no room for so many names."""
Number = TypeVar("Number", int, float)


@dataclass(slots=True)
class RunReport:
    """What a run did, for the file and for the CLI to print."""

    relative_errors: dict[str, float] = field(default_factory=dict)
    harder_damped: dict[str, float] = field(default_factory=dict)  # layer -> the percdamp it took
    dropped_tokens: dict[str, int] = field(default_factory=dict)  # layer -> tokens with NaN or infinity in its input
    # mixture -> "tokens": of each expert; "pooled": experts that had too few for statistics of their own
    experts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)  # ternary layer -> share of its weights
    uncalibrated: list[str] = field(default_factory=list)  # layers no token reached, rounded to nearest
    rounded: list[str] = field(default_factory=list)  # experts' layers whose Hessian cannot be factored
    seconds: float = 0.0

    @classmethod
    def whole(cls, steps: Iterable[dict[str, Any]]) -> RunReport:
        """What all steps of a run together have to report, those of earlier processes included."""
        report = cls()
        for step in steps:
            report.relative_errors |= step["relative_errors"]
            report.harder_damped |= step["harder_damped"]
            report.dropped_tokens |= step["dropped_tokens"]
            report.experts |= step["experts"]
            report.zeros |= step["zeros"]
            report.uncalibrated += step["uncalibrated"]
            report.rounded += step["rounded"]
        return report

    def quality(self) -> dict[str, Any]:
        """The file's own account of itself."""
        return {
            "mean_relative_error": float(np.mean(list(self.relative_errors.values()) or [0.0])),
            "harder_damped": told(self.harder_damped, max),
            "dropped_tokens": told(self.dropped_tokens, sum),
            "uncalibrated": list(told(dict.fromkeys(self.uncalibrated, 0), sum)),
            "rounded": list(told(dict.fromkeys(self.rounded, 0), sum)),
        } | ({"experts": self._experts()} if self.experts or self.zeros else {})

    def _experts(self) -> dict[str, dict[str, list[Any]]]:
        """What is told of the experts, and of those that are ternary the share of zeros: a number each, since a header
        takes half a million characters of such."""
        shares: dict[str, dict[int, list[float]]] = {}  # mixture -> expert -> of its ternary linears
        for name in self.relative_errors:
            if (part := expert_of(name)) is not None:
                own = shares.setdefault(part[0], {}).setdefault(part[1], [])
                own += [self.zeros[name]] if name in self.zeros else []
        zeros: dict[str, dict[str, list[Any]]] = {
            mixture: {"zeros": [_mean(of_one.get(n)) for n in range(max(of_one) + 1)]}
            for mixture, of_one in shares.items()
            if any(of_one.values())
        }
        return {name: self.experts.get(name, {}) | zeros.get(name, {}) for name in self.experts | zeros}


def told(found: dict[str, Number], joined: Callable[[Iterable[Number]], Number]) -> dict[str, Number]:
    """By layer; where more are named than a header has room for, the experts' by their mixture."""
    if len(found) <= MAX_NAMED:
        return found
    joint: dict[str, list[Number]] = {}
    for name, value in found.items():
        part = expert_of(name)
        joint.setdefault(name if part is None else part[0], []).append(value)
    return {name: joined(values) for name, values in joint.items()}


def _mean(shares: list[float] | None) -> float | None:
    """None for an expert that is not ternary."""
    return None if not shares else round(float(np.mean(shares)), 4)


class RunLog:
    """Context manager; appends, so that a resumed run goes on in the same file. Without a path, nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> RunLog:
        if self._path is not None:
            self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def layer(self, tensor: TensorPlan, solved: Solved) -> None:
        """Write the line of a layer that has just been solved."""
        if self._file is None:
            return
        assert tensor.spec is not None
        line = {
            "layer": tensor.name,
            "method": tensor.spec.method,
            "format": tensor.spec.format,
            "bits": tensor.spec.bits,
            "outliers": solved.solution.layer.encoding.describe(tensor.shape).outliers,
            "relative_error": solved.solution.relative_error,
            "percdamp": solved.percdamp,
            "tokens": 0 if solved.stats is None else solved.stats.n_tokens,
            "dropped_tokens": 0 if solved.stats is None else solved.stats.n_dropped,
            "seconds": round(solved.seconds, 4),
            "rss_bytes": rss_bytes(),
        }
        assert self._path is not None
        with naming(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
