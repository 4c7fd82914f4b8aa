"""Where a layer's outliers sit: how many, in which rows and columns, and their density over the matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import error_context
from formats.header import TensorEntry
from formats.reader import QtmFile
from formats.section import check_section, part_arrays

I64 = npt.NDArray[np.int64]
MAX_BINS = 256


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Positions:
    """Outliers of a matrix [out, in], row by row: those of row r are columns[row_ptr[r]:row_ptr[r + 1]].

    row_ptr: [out + 1] i64, from 0, rising
    columns: [n] i64 < in
    """

    shape: tuple[int, int]
    row_ptr: I64
    columns: I64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Density:
    """Outliers counted over the matrix.

    rows:    [out] i64, outliers in each row
    columns: [in] i64, outliers in each column
    bins:    [R, C] f64, their share of the weights in each rectangle of the matrix, R and C at most MAX_BINS
    """

    rows: I64
    columns: I64
    bins: npt.NDArray[np.float64]


def count_outliers(entry: TensorEntry) -> int:
    """How many values a tensor holds besides its codes; the header alone tells."""
    parts = {part.name: math.prod(part.shape) for part in entry.encoding.parts(entry.shape)}
    return parts.get("outlier_columns", 0) + parts.get("columns", 0) * entry.shape[0]


def outlier_positions(file: QtmFile, entry: TensorEntry) -> Positions:
    """The positions that a section of the file holds, none if it has no such parts; the section is checked first."""
    data = file.section(entry)
    with error_context(f"{file.label}: {entry.label}"):
        check_section(data, entry.shape, entry.encoding)
        return positions_of_parts(part_arrays(data, entry.shape, entry.encoding), (entry.shape[0], entry.shape[1]))


def positions_of_parts(parts: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int]) -> Positions:
    """From the parts of a section: sparse values (`outlier_rows`, `outlier_columns`) or whole `columns`."""
    if "outlier_rows" in parts:
        row_ptr, columns = parts["outlier_rows"], parts["outlier_columns"]
    else:
        whole = parts.get("columns", np.zeros(0, np.int64))
        row_ptr, columns = np.arange(shape[0] + 1) * whole.size, np.tile(whole, shape[0])
    return Positions(shape=shape, row_ptr=row_ptr.astype(np.int64), columns=columns.astype(np.int64))


def density(positions: Positions) -> Density:
    """Counts by row and column, and by rectangles of as equal a size as the shape allows."""
    out_features, in_features = positions.shape
    rows = np.diff(positions.row_ptr)
    n_down, n_across = min(out_features, MAX_BINS), min(in_features, MAX_BINS)
    down = np.repeat(_bin(np.arange(out_features), out_features, n_down), rows)
    across = _bin(positions.columns, in_features, n_across)
    counts = np.bincount(down * n_across + across, minlength=n_down * n_across).reshape(n_down, n_across)
    areas = np.outer(_bin_sizes(out_features, n_down), _bin_sizes(in_features, n_across))
    return Density(rows=rows, columns=np.bincount(positions.columns, minlength=in_features), bins=counts / areas)


def fullest(counts: I64, share: float = 0.01) -> tuple[int, float]:
    """How many rows or columns `share` of them are, at least one, and what part of all outliers the fullest hold."""
    n = max(1, round(counts.size * share))
    return n, float(np.sort(counts)[-n:].sum() / max(int(counts.sum()), 1))


def _bin(index: I64, size: int, n_bins: int) -> I64:
    return index * n_bins // size


def _bin_sizes(size: int, n_bins: int) -> I64:
    return np.bincount(_bin(np.arange(size), size, n_bins), minlength=n_bins)
