"""What the functions of `qtool.api` give back: figures by name, as attributes and, by `to_dict`, as JSON has them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Base of the results."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it, in the order of the fields."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: str(value) if isinstance(value, Path) else value for name, value in values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed(Figures):
    """A file that was written, as its header describes it, and what writing it took."""

    file: Path
    file_bytes: int
    parameters: int
    bits_per_weight: float  # of the blocks' linears, everything stored for them counted
    quantized_share: float  # of the parameters
    quality: dict[str, Any]  # as recorded: mean_relative_error, and layers that need a look by name
    left_dense: list[str]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated(Figures):
    """What a run would give and cost."""

    file_bytes: int
    parameters: int
    bits_per_weight: float
    quantized_share: float
    peak_rss_bytes: int
    workers: int  # of a cluster, 0 without one; what they take comes on top
    worker_bytes: int  # about, each
    work_bytes: int
    seconds: float
    layers: list[dict[str, Any]]  # name, bits, group_size, outliers, bytes
    predicted_kl: float | None  # nats a token, of a target
    allocation_gap: float  # share of it that the best allocation might save
    outliers_by_threshold: bool
    left_dense: list[dict[str, Any]]  # name, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected(Figures):
    """What a file's header says and what follows from it."""

    format_version: str
    file_bytes: int
    model_type: str | None
    parameters: int
    bits_per_weight: float
    quantized_share: float
    recipe: dict[str, Any]
    quality: dict[str, Any]
    provenance: dict[str, Any]
    files: list[dict[str, Any]]  # name, bytes
    tensors: list[dict[str, Any]]  # name, shape, encoding, bits, group_size, outliers, settings, bytes, relative_error
    report: str | None = None  # the page, where one was written
    experts: list[dict[str, Any]] | None = None  # where they were asked for

    def to_dict(self) -> dict[str, Any]:
        values = Figures.to_dict(self)
        return {name: value for name, value in values.items() if name not in ("report", "experts") or value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified(Figures):
    """A file whose every byte is as its checksums say; layers: name, recorded, recomputed, ok, against a model."""

    file: Path
    sections: int
    bytes: int
    layers: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {"file": str(self.file), "sections": self.sections, "bytes": self.bytes, "ok": True}
        return values if self.layers is None else values | {"layers": self.layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported(Figures):
    """A file made of a model that was quantized already."""

    file: Path
    bytes: int
    packed: int  # tensors whose codes are as they were
    decoded: dict[str, str]  # why a quantized tensor is stored as float32, by its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Figures):
    """What a model wrote. whole: behind the prompt, where it goes on from it."""

    prompt: str
    text: str
    whole: str

    def to_dict(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores(Figures):
    """Scores in tasks of lm-eval; what there is not is None in a row."""

    model: str
    baseline: str | None
    tasks: list[dict[str, Any]]  # task, metric, score, error; with a baseline: baseline, baseline_error, difference
    questions: dict[str, int]
    num_fewshot: dict[str, int]
    lm_eval: str  # its version
    seconds: float
