"""Chapter 7 of formats/SPEC.md for `independent_reader`: what the parts of a section decode to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from independent_encodings import must, placed, widths
from independent_ternary import decode_ternary

F32 = np.float32
NF4 = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022833234
    -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
H1 = {2: 0o2, 3: 0o4, 4: 0o4, 5: 0o10, 6: 0o24, 7: 0o126, 8: 0o362, 9: 0o342}
H0 = {2: 0o5, 3: 0o13, 4: 0o23, 5: 0o45, 6: 0o103, 7: 0o235, 8: 0o515, 9: 0o1017}

Arrays = dict[str, list[np.ndarray]]  # the planes of one name together


def decode(entry: dict[str, Any], raw: bytes) -> np.ndarray:
    """The weights as float32, in the stored orientation."""
    arrays: Arrays = {}
    end = 0
    for start, part in placed(entry):
        must(not any(raw[end:start]), "4.3", f"{entry['name']!r}: padding before {part.name} is not zero")
        end = start + part.n_bytes
        array = np.frombuffer(raw[start:end], dtype=part.dtype).reshape(part.shape)
        arrays.setdefault(part.name, []).append(array)
    if entry["encoding"] == "dense":
        return decode_dense(entry["dtype"], arrays["values"][0])
    check_floats(entry, arrays)
    if entry["encoding"] == "int8_rows":
        return decode_int8(entry, arrays)
    if entry["encoding"] == "affine":
        return decode_affine(entry, arrays)
    if entry["encoding"] in ("ternary_dict", "ternary_rans"):
        return times_input_scales(entry, arrays, decode_ternary(entry, arrays))
    return times_input_scales(entry, arrays, decode_grouped(entry, arrays))


def times_input_scales(entry: dict[str, Any], arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    if not entry.get("input_scales", False):
        return weights
    input_scales = arrays["input_scales"][0].astype(F32)
    must(bool((input_scales > 0).all()), "7.6", f"{entry['name']!r}: an input scale is not above zero")
    return weights * input_scales


def check_floats(entry: dict[str, Any], arrays: Arrays) -> None:
    for name, (array, *_) in arrays.items():
        if array.dtype == np.dtype("<f2"):
            must(bool(np.isfinite(array).all()), "7.6", f"{entry['name']!r}: {name} are not finite")
        elif array.dtype == np.dtype("<f4"):
            sound = np.isfinite(array).all() and (np.abs(array) <= F32(2.0**64)).all()
            must(bool(sound), "7.6.1", f"{entry['name']!r}: {name} are not finite, or too large")


def decode_dense(dtype: str, values: np.ndarray) -> np.ndarray:
    if dtype == "F32":
        return values.view("<f4")
    if dtype == "F16":
        return values.view("<f2").astype(F32)
    return np.asarray(values.view("<u2").astype(np.uint32) << 16).view(F32)  # a shifted scalar is no array


def decode_int8(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    codes, scales = arrays["codes"][0], arrays["scales"][0]
    must(not (codes == -128).any(), "7.13.2", f"{entry['name']!r}: a code is -128")
    weights = codes.astype(F32) * scales[:, np.newaxis]
    if "columns" not in arrays:
        return weights
    columns = arrays["columns"][0].astype(np.int64)
    rising = bool((np.diff(columns) > 0).all())
    must(rising and int(columns.max()) < entry["shape"][1], "7.13.2", f"{entry['name']!r}: columns {columns}")
    must(not codes[:, columns].any(), "7.13.2", f"{entry['name']!r}: a code in columns is not 0")
    weights[:, columns] = arrays["values"][0].astype(F32)
    return weights


def decode_affine(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    """SPEC 7.17, a group at a time."""
    (n_out, n_in), bits, size = entry["shape"], entry["bits"], entry["group_size"]
    codes = unpack(entry, arrays["codes"], n_in, bits).astype(F32)
    n_groups = -(-n_in // size)
    weights = np.empty((n_out, n_in), F32)
    if not entry.get("stat_bits", 0):
        scales, minima = arrays["scales"][0].astype(F32), arrays["minima"][0].astype(F32)
    elif entry["symmetric"]:
        scales, minima = products("scale", entry, arrays, n_groups), None
    else:
        scales, minima = products("scale", entry, arrays, n_groups), -products("minimum", entry, arrays, n_groups)
    for g in range(n_groups):
        inside = slice(g * size, (g + 1) * size)
        if minima is None:
            weights[:, inside] = scales[:, [g]] * (codes[:, inside] - F32(2 ** (bits - 1)))
        else:
            weights[:, inside] = scales[:, [g]] * codes[:, inside] + minima[:, [g]]
    return weights


def products(which: str, entry: dict[str, Any], arrays: Arrays, n_groups: int) -> np.ndarray:
    """[out, G]"""
    n_out, bits = entry["shape"][0], entry["stat_bits"]
    codes = unpack(entry, arrays[f"{which}_codes"], n_out * n_groups, bits).reshape(n_out, n_groups).astype(F32)
    units = arrays[f"{which}_units"][0].astype(F32)
    less = F32(2 ** (bits - 1) if entry["symmetric"] else 0)
    return np.stack([units[:, g // entry["stat_groups"]] * (codes[:, g] - less) for g in range(n_groups)], axis=1)


def decode_grouped(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    """`uniform`, `codebook` and `trellis`."""
    n_in, bits = entry["shape"][1], entry["bits"]
    group = np.arange(n_in) // entry["group_size"]  # of each input
    n_groups = group[-1] + 1
    if entry.get("input_order", False):
        places = [int(place) for place in arrays["input_order"][0]]
        must(sorted(places) == list(range(n_in)), "7.8", f"{entry['name']!r}: input_order is no permutation")
        group = np.array([place // entry["group_size"] for place in places])
    scales = decode_scales(entry, arrays, n_groups)[:, group]
    if entry["encoding"] == "trellis":
        weights = scales * arrays["levels"][0].astype(F32)[walk(entry, arrays)]
    elif entry["encoding"] == "codebook":
        weights = scales * levels_of(entry, arrays)[unpack(entry, arrays["codes"], n_in, bits)]
    else:
        codes = unpack(entry, arrays["codes"], n_in, bits)
        weights = scales * (codes.astype(F32) - decode_zeros(entry, arrays, n_groups)[:, group])
    if "outlier_rows" in arrays:
        add_outliers(entry, arrays, weights)
    return weights


def decode_scales(entry: dict[str, Any], arrays: Arrays, n_groups: int) -> np.ndarray:
    """[out, G]"""
    if entry.get("stat_bits", 0):
        return decode_two_level("scale", entry, arrays, n_groups)
    if not entry.get("double_quant", False):
        return arrays["scales"][0].astype(F32)
    codes = arrays["scale_codes"][0]
    block = np.arange(codes.size).reshape(codes.shape) // 256
    return dynamic_map()[codes] * arrays["scale_absmax"][0][block] + arrays["scale_mean"][0][0]


def decode_zeros(entry: dict[str, Any], arrays: Arrays, n_groups: int) -> np.ndarray:
    """[out, G]"""
    n_out, bits = entry["shape"][0], entry["bits"]
    if entry["symmetric"]:
        return np.full((n_out, n_groups), 2 ** (bits - 1), F32)
    if entry.get("stat_bits", 0):
        return decode_two_level("zero", entry, arrays, n_groups)
    return unpack(entry, arrays["zeros"], n_out * n_groups, bits).reshape(n_out, n_groups).astype(F32)


def decode_two_level(which: str, entry: dict[str, Any], arrays: Arrays, n_groups: int) -> np.ndarray:
    """SPEC 7.9.1, a row at a time."""
    n_out = entry["shape"][0]
    codes = unpack(entry, arrays[f"{which}_codes"], n_out * n_groups, entry["stat_bits"]).reshape(n_out, n_groups)
    scales, zeros = (arrays[f"{which}_{name}"][0].astype(F32) for name in ("scales", "zeros"))
    rows = []
    for row in range(n_out):
        of_set = row // entry["stat_rows"]
        rows.append(scales[of_set] * (codes[row].astype(F32) - zeros[of_set]))
    return np.array(rows)


def levels_of(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    if entry["levels"] == "nf4":
        return np.array([float(text) for text in NF4.split()], F32)
    if entry["levels"] == "fp4":
        return np.array(FP4 + [0] + [-level for level in FP4[1:]], F32)
    return arrays["levels"][0].astype(F32)


def walk(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    """SPEC 7.14, an output at a time: the level of every weight, [out, in]."""
    (n_out, n_in), bits, memory = entry["shape"], entry["bits"], entry["memory"]
    path = unpack(entry, arrays["path"], n_out, 1)  # [in, out]
    upper = unpack(entry, arrays["codes"], n_out, bits - 1) if bits > 1 else np.zeros_like(path)
    levels = np.empty((n_out, n_in), np.int64)
    for output in range(n_out):
        if output % entry["run"] == 0:
            window = np.zeros(n_in, np.int64)
        window = (2 * window + path[:, output]) % 2 ** (memory + 1)
        subset = [
            bin(w & H1[memory]).count("1") % 2 + 2 * (bin(w & H0[memory]).count("1") % 2) for w in window.tolist()
        ]
        levels[output] = np.array(subset) + 4 * upper[:, output]
    return levels


def dynamic_map() -> np.ndarray:
    """SPEC 7.12.2."""
    positive = [
        (2 ** (i + 1) + 9 * (2 * j + 1)) / (10 ** (7 - i) * 2 ** (i + 1)) for i in range(7) for j in range(2**i)
    ]
    return np.array(sorted([0, 1, *positive, *(-number for number in positive)]), F32)


def add_outliers(entry: dict[str, Any], arrays: Arrays, weights: np.ndarray) -> None:
    """SPEC 7.10.1 and 7.10.2, an outlier at a time."""
    name, pointers = entry["name"], [int(pointer) for pointer in arrays["outlier_rows"][0]]
    columns, values = arrays["outlier_columns"][0], arrays["outlier_values"][0].astype(F32)
    must(pointers[0] == 0 and pointers[-1] == len(values), "7.10.1", f"{name!r}: outlier_rows end wrong")
    must(pointers == sorted(pointers), "7.10.1", f"{name!r}: outlier_rows fall")
    must(int(columns.max()) < entry["shape"][1], "7.10.1", f"{name!r}: an outlier's column is too large")
    for row, (start, stop) in enumerate(pairwise(pointers)):
        for i in range(start, stop):
            must(i == start or columns[i] > columns[i - 1], "7.10.1", f"{name!r}: columns of row {row} do not rise")
            weights[row, columns[i]] += values[i]


def unpack(entry: dict[str, Any], planes: list[np.ndarray], n: int, bits: int) -> np.ndarray:
    """SPEC 7.4: integers [rows, n] out of planes [rows, words]."""
    integers = np.zeros((len(planes[0]), n), dtype=np.int64)
    k, shift = np.arange(n), 0
    for width, plane in zip(widths(bits), planes, strict=True):
        words, per = plane.astype(np.int64), 32 // width
        fields = (words[:, k // per] >> (width * (k % per))) & (2**width - 1)
        integers |= fields << shift
        shift += width
        behind = words[:, -1] >> (width * ((n - 1) % per + 1))
        must(not behind.any(), "7.4.4", f"{entry['name']!r}: bits behind the last field of a row are not zero")
    return integers
