"""Chapter 7 of formats/SPEC.md for `independent_reader`: the fields of an encoding, and the parts of a section."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

ENCODINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields that must stand, fields that may
    "dense": ({"dtype": str}, {}),
    "uniform": (
        {"bits": int, "group_size": int, "symmetric": bool},
        {"input_scales": bool, "stat_bits": int, "stat_rows": int, "outliers": int, "input_order": bool},
    ),
    "codebook": (
        {"bits": int, "group_size": int, "levels": str},
        {"input_scales": bool, "stat_bits": int, "stat_rows": int, "outliers": int, "double_quant": bool},
    ),
    "affine": ({"bits": int, "group_size": int, "symmetric": bool}, {"stat_bits": int, "stat_groups": int}),
    "int8_rows": ({}, {"columns": int}),
    "trellis": (
        {"bits": int, "memory": int, "run": int, "group_size": int},
        {"input_scales": bool, "stat_bits": int, "stat_rows": int, "outliers": int},
    ),
    "ternary_dict": ({"share_low": int, "share_high": int, "codewords": int}, {"input_scales": bool}),
    "ternary_rans": ({"segment": int, "words": int}, {"input_scales": bool}),
}
DENSE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


class Refused(Exception):
    """The file breaks the paragraph that the message names."""


class Part(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def must(condition: bool, paragraph: str, broken: str) -> None:
    if not condition:
        raise Refused(f"{broken} (SPEC {paragraph})")


def align(x: int, a: int) -> int:
    return -(-x // a) * a


# The fields of an entry


def check_encoding(entry: dict[str, Any]) -> None:
    encoding, shape = entry["encoding"], entry["shape"]
    if encoding == "dense":
        must(entry["dtype"] in DENSE_BYTES, "7.2", f"dtype is {entry['dtype']!r}")
        return
    must(len(shape) == 2, "7.3, 7.11, 7.13 to 7.17", f"{encoding}, with shape {shape}")
    if encoding == "affine":
        check_affine(entry)
        return
    if encoding == "int8_rows":
        must(entry.get("columns", 0) <= shape[1], "7.13", f"{entry.get('columns')} columns")
        return
    if encoding == "ternary_dict":
        low, high, n_pairs = entry["share_low"], entry["share_high"], -(-shape[1] // 2)
        must(low >= 1 and high >= 1 and low + high <= 255, "7.15", f"shares are {low} and {high}")
        least, most = shape[0] * -(-n_pairs // 14), min(shape[0] * n_pairs, 2**32 - 1)
        must(least <= entry["codewords"] <= most, "7.15", f"{entry['codewords']} codewords in {shape}")
        return
    if encoding == "ternary_rans":
        must(entry["segment"] >= 10 and entry["segment"] % 10 == 0, "7.16", f"segment is {entry['segment']}")
        most = min(shape[0] * -(-shape[1] // 5), 2**32 - 1)
        must(entry["words"] <= most, "7.16", f"{entry['words']} words in {shape}")
        return
    least, most = (1, 6) if encoding == "trellis" else (2, 8)
    must(least <= entry["bits"] <= most, "7.3, 7.14", f"bits is {entry['bits']}")
    must(1 <= entry["group_size"] <= shape[1], "7.3", f"group_size is {entry['group_size']}")
    stat_bits, stat_rows = entry.get("stat_bits", 0), entry.get("stat_rows", 0)
    two_level = 2 <= stat_bits <= 8 and stat_rows >= 1
    must(two_level or stat_bits == stat_rows == 0, "7.9", f"stat_bits is {stat_bits}, stat_rows {stat_rows}")
    outliers = entry.get("outliers", 0)
    must(outliers <= prod(shape) and outliers < 2**32, "7.10", f"{outliers} outliers in {shape}")
    if encoding == "codebook":
        levels = entry["levels"]
        must(levels in ("nf4", "fp4", "fitted"), "7.11", f"levels is {levels!r}")
        must(levels == "fitted" or entry["bits"] == 4, "7.11", f"{levels} with {entry['bits']} bits")
        must(not (entry.get("double_quant", False) and stat_bits), "7.12", "double_quant beside stat_bits")
    if encoding == "trellis":
        must(2 <= entry["memory"] <= 9, "7.14", f"memory is {entry['memory']}")
        must(entry["run"] >= 32 and entry["run"] % 32 == 0, "7.14", f"run is {entry['run']}")


def check_affine(entry: dict[str, Any]) -> None:
    """SPEC 7.17."""
    stat_bits, stat_groups = entry.get("stat_bits", 0), entry.get("stat_groups", 0)
    must(2 <= entry["bits"] <= 8, "7.17", f"bits is {entry['bits']}")
    must(1 <= entry["group_size"] <= entry["shape"][1], "7.17", f"group_size is {entry['group_size']}")
    both = (stat_bits, stat_groups) == (0, 0) or (2 <= stat_bits <= 8 and stat_groups >= 1)
    must(both, "7.17", f"stat_bits is {stat_bits}, stat_groups {stat_groups}")
    must(stat_bits > 0 or not entry["symmetric"], "7.17", "symmetric without stat_bits")


# The parts of a section


def widths(bits: int) -> list[int]:
    """SPEC 7.4.1: 7 -> [4, 2, 1]."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def plane_parts(name: str, bits: int, rows: int, n: int) -> list[Part]:
    return [Part(name, "<u4", (rows, -(-n * width // 32))) for width in widths(bits)]


def parts(entry: dict[str, Any]) -> list[Part]:
    if entry["encoding"] == "dense":
        return [Part("values", f"V{DENSE_BYTES[entry['dtype']]}", tuple(entry["shape"]))]
    n_out, n_in = entry["shape"]
    if entry["encoding"] == "int8_rows":
        found, k = [Part("codes", "i1", (n_out, n_in)), Part("scales", "<f4", (n_out,))], entry.get("columns", 0)
        return [*found, Part("columns", "<u4", (k,)), Part("values", "<f2", (n_out, k))] if k else found
    if entry["encoding"] in ("ternary_dict", "ternary_rans"):
        return ternary_parts(entry, n_out, n_in)
    n_groups = -(-n_in // entry["group_size"])
    if entry["encoding"] == "affine":
        return affine_parts(entry, n_out, n_in, n_groups)
    if entry["encoding"] == "trellis":
        found = plane_parts("path", 1, n_in, n_out) + plane_parts("codes", entry["bits"] - 1, n_in, n_out)
    else:
        found = plane_parts("codes", entry["bits"], n_out, n_in)
    if entry.get("levels") == "fitted":
        found.append(Part("levels", "<f2", (2 ** entry["bits"],)))
    found += scale_parts(entry, n_out, n_groups)
    if not entry.get("symmetric", True):
        found += zero_parts(entry, n_out, n_groups)
    if entry["encoding"] == "trellis":
        found.append(Part("levels", "<f2", (2 ** (entry["bits"] + 1),)))
    if entry.get("input_scales", False):
        found.append(Part("input_scales", "<f2", (n_in,)))
    if entry.get("input_order", False):
        found.append(Part("input_order", "<u4", (n_in,)))
    if n := entry.get("outliers", 0):
        found.append(Part("outlier_rows", "<u4", (n_out + 1,)))
        found.append(Part("outlier_columns", "<u4" if n_in > 65536 else "<u2", (n,)))
        found.append(Part("outlier_values", "<f2", (n,)))
    return found


def ternary_parts(entry: dict[str, Any], n_out: int, n_in: int) -> list[Part]:
    """SPEC 7.15 and 7.16."""
    if entry["encoding"] == "ternary_dict":
        found = [Part("codewords", "<u2", (entry["codewords"],)), Part("codeword_rows", "<u4", (n_out + 1,))]
    else:
        n_segments = -(-n_in // entry["segment"])
        found = [Part("frequencies", "<u2", (243,)), Part("words", "<u2", (entry["words"],))]
        found.append(Part("word_blocks", "<u4", (-(-n_out // 32) * n_segments + 1,)))
        found.append(Part("states", "<u4", (n_out, n_segments)))
    found.append(Part("scales", "<f2", (n_out, 2)))
    return [*found, Part("input_scales", "<f2", (n_in,))] if entry.get("input_scales", False) else found


def affine_parts(entry: dict[str, Any], n_out: int, n_in: int, n_groups: int) -> list[Part]:
    """SPEC 7.17."""
    found = plane_parts("codes", entry["bits"], n_out, n_in)
    if not (stat_bits := entry.get("stat_bits", 0)):
        return [*found, Part("scales", "<f2", (n_out, n_groups)), Part("minima", "<f2", (n_out, n_groups))]
    n_units = -(-n_groups // entry["stat_groups"])
    for of in ("scale",) if entry["symmetric"] else ("scale", "minimum"):
        found += plane_parts(f"{of}_codes", stat_bits, 1, n_out * n_groups)
        found.append(Part(f"{of}_units", "<f2", (n_out, n_units)))
    return found


def scale_parts(entry: dict[str, Any], n_out: int, n_groups: int) -> list[Part]:
    if entry.get("double_quant", False):
        n_blocks = -(-n_out * n_groups // 256)
        codes = Part("scale_codes", "u1", (n_out, n_groups))
        return [codes, Part("scale_absmax", "<f4", (n_blocks,)), Part("scale_mean", "<f4", (1,))]
    if entry.get("stat_bits", 0):
        return two_level_parts("scale", entry, n_out, n_groups)
    return [Part("scales", "<f2", (n_out, n_groups))]


def zero_parts(entry: dict[str, Any], n_out: int, n_groups: int) -> list[Part]:
    if entry.get("stat_bits", 0):
        return two_level_parts("zero", entry, n_out, n_groups)
    return plane_parts("zeros", entry["bits"], 1, n_out * n_groups)


def two_level_parts(which: str, entry: dict[str, Any], n_out: int, n_groups: int) -> list[Part]:
    """SPEC 7.9."""
    sets = (-(-n_out // entry["stat_rows"]), n_groups)
    codes = plane_parts(f"{which}_codes", entry["stat_bits"], 1, n_out * n_groups)
    return [*codes, Part(f"{which}_scales", "<f2", sets), Part(f"{which}_zeros", "<f2", sets)]


def placed(entry: dict[str, Any]) -> list[tuple[int, Part]]:
    """SPEC 7.1: every part with its first byte in the section."""
    found, end = [], 0
    for part in parts(entry):
        start = align(end, 64)
        found.append((start, part))
        end = start + part.n_bytes
    return found
