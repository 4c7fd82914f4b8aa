"""The numbers that define the result, one spec per layer and one recipe per run, both stored in the file; and what does
not define it: how the run is carried out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qtool.errors import ConfigError

Method = Literal["gptq", "rtn"]
METHODS: tuple[Method, ...] = ("gptq", "rtn")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one layer is quantized. `group_size` -1 means one group per row."""

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128  # input features per (scale, zero)
    symmetric: bool = False  # zero fixed in the middle of the codes
    act_order: bool = True  # columns with the largest Hessian diagonal first; groups stay where they are
    percdamp: float = 0.01  # added to the Hessian diagonal, as a fraction of its mean
    scale_search: bool = True  # shrink each group's range to the smallest Hessian-weighted error
    input_scales: bool = True  # equalise the inputs first, one fp16 factor each

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: must be one of {', '.join(METHODS)}")
        if self.bits not in range(2, 9):
            raise ConfigError(f"bits={self.bits}: must be 2 to 8")
        if self.group_size != -1 and not 8 <= self.group_size <= 1 << 20:
            raise ConfigError(f"group_size={self.group_size}: must be -1 (one group per row) or at least 8")
        if not 0 < self.percdamp < 10:
            raise ConfigError(f"percdamp={self.percdamp}: must be above 0 and below 10")

        if self.method == "rtn":  # these steer the solver: a file must not claim what was not done
            for option in ("act_order", "scale_search", "input_scales"):
                object.__setattr__(self, option, False)

    def groups_of(self, in_features: int) -> int:
        """The group size for a row of `in_features`: never longer than the row."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which text the Hessians are taken on."""

    source: str = "builtin"
    text_field: str = "text"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: must be at least 1")
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len}: must be at least 2")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the user chose for a run."""

    linears: QuantSpec = field(default_factory=QuantSpec)
    embeddings: int = 8  # bits of the embedding and the head; 16 leaves them as they are
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)

    def __post_init__(self) -> None:
        if self.embeddings != 16 and self.embeddings not in range(2, 9):
            raise ConfigError(f"embeddings={self.embeddings}: must be 2 to 8 bits, or 16 to leave them as they are")

    @property
    def n_windows(self) -> int:
        """Calibration windows that the run looks at: rounding to nearest needs none."""
        return 0 if self.linears.method == "rtn" else self.calibration.samples

    @property
    def embedding_spec(self) -> QuantSpec | None:
        """Embeddings see no Hessian of their own: rounded to nearest in the same groups, symmetric or not."""
        if self.embeddings == 16:
            return None
        return QuantSpec(
            method="rtn",
            bits=self.embeddings,
            group_size=self.linears.group_size,
            symmetric=True,
            scale_search=False,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is carried out; none of this is in the file."""

    overwrite: bool = False
    work_dir: Path | None = None  # beside the output if None
    restart: bool = False  # drop what an earlier run left in the work folder
    max_memory_bytes: int | None = None  # resident set that the run keeps to, or refuses to start
    log_file: Path | None = None
