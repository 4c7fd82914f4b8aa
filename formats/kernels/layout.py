"""What a GPU kernel is told about a section: what is fixed when it is compiled, and where the parts lie."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from formats.encoding import (
    INPUT_SCALES,
    Affine,
    Codebook,
    Encoding,
    Int8Rows,
    MatrixEncoding,
    Shape,
    TernaryDict,
    TernaryRans,
    Trellis,
    Uniform,
)
from formats.encoding.codebook import FITTED
from formats.encoding.outliers import column_dtype
from formats.encoding.planes import WORD_BITS, row_words
from formats.errors import KernelError
from formats.trellis import H0, H1

UNIFORM, TABLE, BYTES, TRELLIS, AFFINE = 0, 1, 2, 3, 4
"""What a code stands for: itself less a zero, an entry of a table, a signed byte, a step of the trellis, itself."""
PLAIN, TWO_LEVEL, DOUBLE_QUANT, OF_ROW, PRODUCTS = 0, 1, 2, 3, 4
"""How the scales are stored (SPEC 7.3, 7.9, 7.12, 7.13, 7.17)."""


_TABLES = ("nf4", "fp4")


class Layout(NamedTuple):
    """What a kernel is compiled for. An `at_*` is the place of a part's offset among a section's offsets."""

    n_inputs: int
    n_fields: int  # of a row of codes: inputs, or outputs where a row is an input's
    kind: int  # UNIFORM, TABLE, BYTES, TRELLIS or AFFINE
    bits: int
    group_size: int
    span: int  # inputs, at most a word's fields of one bit, that lie in one group wherever they begin on a multiple
    scales: int  # PLAIN, TWO_LEVEL, DOUBLE_QUANT, OF_ROW or PRODUCTS
    symmetric: bool  # there are no zeros: 2^(bits - 1) is
    stat_bits: int
    stat_rows: int
    stat_groups: int  # of a row, that share a unit (SPEC 7.17)
    memory: int  # of the trellis, as are the next two
    run_words: int  # words of a path from one beginning to the next
    taps: tuple[int, int]  # SPEC 7.14.2: H1 and H0
    has_wide_columns: bool  # those of outliers take 32 bits
    n_columns: int  # inputs with values of their own (SPEC 7.13)
    has_levels: bool  # the table is stored
    has_input_scales: bool
    has_outliers: bool
    has_order: bool  # inputs of a group are not neighbours (SPEC 7.8)
    has_minima: bool  # which are added to the products of scales and codes
    at_table: int  # in the constants: the levels of a table that is not stored
    at_map: int  # in the constants: the map of SPEC 7.12.2
    at_levels: int
    at_scales: int
    at_zeros: int
    at_minima: int
    at_input_scales: int
    at_order: int
    at_columns: int
    at_outliers: int

    @property
    def is_sparse(self) -> bool:
        """Whether some weights are stored beside the codes."""
        return self.has_outliers or self.n_columns > 0


@functools.lru_cache(maxsize=4096)
def layout_of(encoding: MatrixEncoding, shape: Shape) -> tuple[Layout, tuple[int, ...]]:
    """The layout of a section, and the first byte of each of its parts; KernelError where no kernel knows it."""
    names = [part.name for part in encoding.parts(shape)]

    def at(*prefixes: str) -> int:
        return next((i for i, name in enumerate(names) if name.startswith(prefixes)), 0)

    if isinstance(encoding, Int8Rows):
        kind, bits, group_size, scales = BYTES, 8, shape[1], OF_ROW
    elif isinstance(encoding, Uniform):
        kind, bits, group_size = UNIFORM, encoding.bits, encoding.group_size
        scales = TWO_LEVEL if encoding.stat_bits else PLAIN
    elif isinstance(encoding, Codebook):
        kind, bits, group_size = TABLE, encoding.bits, encoding.group_size
        scales = TWO_LEVEL if encoding.stat_bits else DOUBLE_QUANT if encoding.double_quant else PLAIN
    elif isinstance(encoding, Trellis):
        kind, bits, group_size = TRELLIS, encoding.bits, encoding.group_size
        scales = TWO_LEVEL if encoding.stat_bits else PLAIN
    elif isinstance(encoding, Affine):
        kind, bits, group_size = AFFINE, encoding.bits, encoding.group_size
        scales = PRODUCTS if encoding.stat_bits else PLAIN
    else:
        raise KernelError(f"{encoding.name}: there is no GPU kernel for this encoding")
    memory = getattr(encoding, "memory", 0)
    levels, has_order = getattr(encoding, "levels", ""), getattr(encoding, "input_order", False)
    layout = Layout(
        n_inputs=shape[1],
        n_fields=shape[0] if kind == TRELLIS else shape[1],
        kind=kind,
        bits=bits,
        group_size=group_size,
        span=1 if has_order else WORD_BITS if group_size == shape[1] else math.gcd(group_size, WORD_BITS),
        scales=scales,
        symmetric=getattr(encoding, "symmetric", False),
        stat_bits=getattr(encoding, "stat_bits", 0),
        stat_rows=min(getattr(encoding, "stat_rows", 0), shape[0]),  # a file may say more, to the same effect
        stat_groups=getattr(encoding, "stat_groups", 0),
        memory=memory,
        run_words=min(getattr(encoding, "run", 0) // WORD_BITS, row_words(shape[0], 1)),
        taps=(H1[memory], H0[memory]) if memory else (0, 0),
        has_wide_columns=column_dtype(shape[1]) == "<u4",
        n_columns=getattr(encoding, "columns", 0),
        has_levels=levels == FITTED or kind == TRELLIS,
        has_input_scales=INPUT_SCALES in names,
        has_outliers=bool(getattr(encoding, "outliers", 0)),
        has_order=has_order,
        has_minima=kind == AFFINE and not getattr(encoding, "symmetric", False),
        at_table=_TABLES.index(levels) * 16 if levels in _TABLES else 0,
        at_map=len(_TABLES) * 16,
        at_levels=at("levels"),
        at_scales=at("scales", "scale_codes"),
        at_zeros=at("zeros", "zero_codes"),
        at_minima=at("minima", "minimum_codes"),
        at_input_scales=at(INPUT_SCALES),
        at_order=at("input_order"),
        at_columns=at("columns"),
        at_outliers=at("outlier_rows"),
    )
    return layout, tuple(part.offset_bytes for part in encoding.parts(shape))


def is_ternary(encoding: Encoding) -> bool:
    """Whether its kernels are those of `ternary_launch`, which need no layout."""
    return isinstance(encoding, TernaryDict | TernaryRans)


def constants() -> list[float]:
    """What a kernel looks up and no file stores: the levels of each table, and the map of SPEC 7.12.2."""
    from formats.layer.codebook import level_table
    from formats.layer.statistics import dynamic_map

    return [float(level) for table in (*map(level_table, _TABLES), dynamic_map()) for level in table]
