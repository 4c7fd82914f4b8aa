"""The numbers that define the result, one spec per layer and one recipe per run, both stored in the file; and what does
not define it: how the run is carried out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from formats.ggml.types import BLOCK, K_FORMS, SUPER_BLOCK
from qtool.errors import ConfigError, either

Method = Literal["gptq", "rtn", "int8"]
METHODS: tuple[Method, ...] = ("gptq", "rtn", "int8")
Format = Literal["int", "nf4", "fp4", "fitted", "trellis", "ternary", "q_0", "q_1", "q_k"]
FORMATS: tuple[Format, ...] = ("int", "nf4", "fp4", "fitted", "trellis", "ternary", "q_0", "q_1", "q_k")
GGML = {
    "q_0": {4: BLOCK, 5: BLOCK, 8: BLOCK},
    "q_1": {4: BLOCK, 5: BLOCK},
    "q_k": {form.bits: form.group for form in K_FORMS.values()},
}
"""llama.cpp's types of blocks, with a minimum, and of super-blocks: by their bits, the inputs that share a scale."""
BITS: dict[str, Sequence[int]] = {
    "int": range(2, 9), "nf4": range(4, 5), "fp4": range(4, 5), "fitted": range(2, 9), "trellis": range(1, 7),
    "ternary": range(2, 3),  # what a code takes in memory; in the file, what its zeros let it
    **{name: tuple(groups) for name, groups in GGML.items()},
}  # fmt: skip
_SOLVER_OPTIONS = ("act_order", "scale_search", "input_scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one layer is quantized. `group_size` -1 means one group per row."""

    method: Method = "gptq"
    format: Format = "int"  # what a code stands for
    bits: int = 4
    group_size: int = 128  # input features per scale (and zero)
    symmetric: bool = False  # int: zero fixed in the middle of the codes
    stat_bits: int = 0  # bits of a scale and of a zero, rounded in sets (SpQR); 0: scales in fp16, zeros as codes
    stat_rows: int = 16  # output rows that make such a set
    double_quant: bool = False  # nf4, fp4, fitted: scales in 8 bits, as QLoRA does it
    memory: int = 8  # trellis: path bits that a state remembers, 2**memory states
    outliers: float = 0.0  # share of the weights kept in 16 bits, at most; 0: as the threshold says
    outlier_threshold: float = 0.0  # SpQR's relative threshold, higher means fewer; 0: the one that gives the share
    outliers_pay: bool = False  # the threshold at which an outlier's bits are worth as much as they are elsewhere
    activation_threshold: float = 6.0  # int8: inputs that reach it keep their weights in 16 bits
    outlier_features: int = 0  # int8: that many of the largest inputs instead; 0: by the threshold
    act_order: bool = True  # columns with the largest Hessian diagonal first; groups stay where they are
    percdamp: float = 0.01  # added to the Hessian diagonal, as a fraction of its mean
    scale_search: bool = True  # shrink each group's range to the smallest Hessian-weighted error
    input_scales: bool = True  # equalise the inputs first, one fp16 factor each

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("format", self.format, FORMATS)
        allowed = BITS[self.format]
        if self.bits not in allowed:
            first, last = allowed[0], allowed[-1]
            which = f"{first} to {last}" if last - first == len(allowed) - 1 > 1 else either(allowed)
            raise ConfigError(
                f"bits={self.bits}: must be {which}" + ("" if self.format == "int" else f" for {self.format}")
            )
        if self.group_size != -1 and not 8 <= self.group_size <= 1 << 20:
            raise ConfigError(f"group_size={self.group_size}: must be -1 (one group per row) or at least 8")
        if not 0 < self.percdamp < 10:
            raise ConfigError(f"percdamp={self.percdamp}: must be above 0 and below 10")
        self._check_statistics()
        self._check_outliers()
        if self.method != "gptq":  # these steer the solver: a file must not claim what was not done
            for option in _SOLVER_OPTIONS:
                object.__setattr__(self, option, False)
        if self.format == "trellis":  # its scales follow from the spread of the weights
            object.__setattr__(self, "scale_search", False)
        if self.format == "ternary":
            self._check_ternary()
        if self.format in GGML:
            self._check_ggml()
        if self.method == "int8":
            for option, value in (("format", "int"), ("bits", 8), ("group_size", -1), ("symmetric", True)):
                object.__setattr__(self, option, value)

    def _check_statistics(self) -> None:
        if self.stat_bits and self.stat_bits not in range(2, 9):
            raise ConfigError(f"stat_bits={self.stat_bits}: must be 2 to 8, or 0 for fp16")
        if not 1 <= self.stat_rows <= 1 << 20:
            raise ConfigError(f"stat_rows={self.stat_rows}: must be at least 1")
        if self.double_quant and self.format not in ("nf4", "fp4", "fitted"):
            raise ConfigError(
                f"double_quant: is for nf4, fp4 and fitted, not for {self.format}; --stat-bits 3 is for it"
            )
        if self.double_quant and self.stat_bits:
            raise ConfigError("double_quant and stat_bits: choose one of the two")
        if self.memory not in range(2, 10):
            raise ConfigError(f"memory={self.memory}: must be 2 to 9")

    def _check_ternary(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: ternary has its values by row; leave it out")
        if self.stat_bits or self.keeps_outliers:
            raise ConfigError("ternary: has two values a row in 16 bits and no outliers; leave those options out")

    def _check_ggml(self) -> None:
        """Nothing stands beside the blocks."""
        if self.stat_bits or self.keeps_outliers or self.symmetric:
            raise ConfigError(
                f"{self.format}: has the statistics of llama.cpp's blocks and no outliers; leave those options out"
            )
        object.__setattr__(self, "group_size", GGML[self.format][self.bits])
        object.__setattr__(self, "input_scales", False)

    def _check_outliers(self) -> None:
        if not 0 <= self.outliers < 0.5:
            raise ConfigError(f"outliers={self.outliers:g}: must be a share of the weights, 0 to 0.5 (50%)")
        if not 0 <= self.outlier_threshold < math.inf:
            raise ConfigError(f"outlier_threshold={self.outlier_threshold:g}: must be 0 (off) or more, and finite")
        if self.keeps_outliers and self.method != "gptq":
            raise ConfigError(f"outliers: are found by the solver; --method {self.method} has none")
        if self.outliers_pay and (self.outlier_threshold or self.format != "trellis"):
            raise ConfigError("outliers_pay: is a threshold of its own, and for trellis")
        if self.outlier_features < 0:
            raise ConfigError(f"outlier_features={self.outlier_features}: must be 0 (by the threshold) or more")
        if not 0 < self.activation_threshold < math.inf:
            raise ConfigError(f"activation_threshold={self.activation_threshold:g}: must be above 0, and finite")

    @property
    def keeps_outliers(self) -> bool:
        return bool(self.outliers or self.threshold)

    @property
    def threshold(self) -> float:
        """SpQR's relative threshold for outliers, 0 where a share decides alone.

        One more bit for each weight divides the error by 4, so a bit is worth 2 ln 2 D, D = d 4^-bits being what the
        error of one weight costs. An outlier takes 32 bits: it pays from 64 ln 2 D on. With d = 1.4: 64 · 4^-bits
        of a weight's variance times its cost.
        """
        return 64 * 4.0**-self.bits if self.outliers_pay else self.outlier_threshold

    @property
    def is_calibrated(self) -> bool:
        """Whether the layer's inputs have to be looked at."""
        return self.method != "rtn"

    def groups_of(self, in_features: int) -> int:
        """The group size for a row of `in_features`: never longer than the row."""
        if self.format == "q_k" and in_features % SUPER_BLOCK:
            return BLOCK  # what super-blocks fall back to
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ConfigError unless `value` is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which text the Hessians are taken on."""

    source: str = "builtin"
    text_field: str = "text"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    min_expert_tokens: int = 64  # an expert that sees fewer is calibrated on what all of its block's read

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: must be at least 1")
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len}: must be at least 2")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if self.min_expert_tokens < 0:
            raise ConfigError(f"min_expert_tokens={self.min_expert_tokens}: must not be negative")

    @property
    def sources(self) -> list[str]:
        """The texts that `source` joins by commas."""
        return [name.strip() for name in self.source.split(",")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the bits are to be spread for: a size of the file, or bits per weight of the blocks' linears."""

    size_bytes: int = 0
    bits: float = 0.0

    def __post_init__(self) -> None:
        if self.size_bytes and self.bits:
            raise ConfigError("target_size and target_bits: choose one of the two")
        if not self.size_bytes and not 1 <= self.bits <= 8:
            raise ConfigError(f"target_bits={self.bits:g}: must be 1 to 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the user chose for a run."""

    linears: QuantSpec = field(default_factory=QuantSpec)
    experts: QuantSpec | None = None  # the experts of a mixture; None: as all linears
    embeddings: int = 8  # bits of the embedding and the head; 16 leaves them as they are, 0 leaves it to a target size
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    layers: tuple[tuple[str, int], ...] = ()  # (regular expression, bits): what the first match says goes
    ignore: tuple[str, ...] = ()  # regular expressions: left dense
    target: Target | None = None  # spread bits over the layers to meet it
    independent: bool = False  # each block is calibrated on what the uncompressed ones before it give
    fused: bool = False  # linears that read one input get one width: q, k, v; gate, up
    widths: tuple[int, ...] = ()  # bits that a target may choose; none: all that the format has

    def __post_init__(self) -> None:
        is_open = self.embeddings == 0 and self.target is not None and self.target.size_bytes > 0
        if not is_open and self.embeddings != 16 and self.embeddings not in range(2, 9):
            raise ConfigError(f"embeddings={self.embeddings}: must be 2 to 8 bits, or 16 to leave them as they are")
        if self.target and "ternary" in (self.linears.format, self.experts and self.experts.format):
            raise ConfigError("target: chooses bits; ternary has none to choose from; give one of the two")
        if self.linears.method == "int8" and (self.layers or self.target):
            raise ConfigError("--method int8 has 8 bits in every layer: leave out --layer and targets, or take gptq")
        for pattern in (*self.ignore, *(pattern for pattern, _ in self.layers)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r}: not a regular expression: {error}") from error

    @property
    def n_windows(self) -> int:
        """Calibration windows that the run looks at: rounding to nearest needs none."""
        specs = [spec for spec in (self.linears, self.experts) if spec is not None]
        return self.calibration.samples if self.target or any(spec.is_calibrated for spec in specs) else 0

    @property
    def embedding_spec(self) -> QuantSpec | None:
        """Embeddings see no Hessian of their own: rounded to nearest in the same groups, symmetric or not."""
        if self.embeddings == 16:
            return None
        group_size = self.linears.group_size
        return QuantSpec(
            method="rtn",
            bits=self.embeddings or 8,
            group_size=64 if group_size == -1 or self.linears.format != "int" else group_size,
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
    wanted_bits: float | None = None  # what ternary experts are to take at most, or the run says that they take more
    cluster: str | None = None  # address of a Ray cluster whose workers solve the layers, or "local"
