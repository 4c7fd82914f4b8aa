"""A second reader, written from SPEC.md alone, element by element, sharing no code with `formats`."""

import hashlib
import json
import struct
from pathlib import Path

import pytest

from formats.layer import dequantize
from formats.reader import QtmFile

GOLDEN = Path(__file__).with_name("golden") / "v1.qtm"
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}  # SPEC 7.4.1


def read_header(file: bytes) -> dict:
    """SPEC 2 and 3."""
    magic, major, _, _, offset, n_bytes, digest = struct.unpack("<8sHHIQQ32s", file[:64])
    assert (magic, major, offset + n_bytes) == (b"\x89QTM\r\n\x1a\n", 1, len(file))
    assert hashlib.sha256(file[:32] + file[offset:]).digest() == digest
    return json.loads(file[offset:])


def read_planes(section: bytes, start: int, rows: int, n: int, bits: int) -> tuple[list[list[int]], int]:
    """SPEC 7.4: the integers of one field, and where its last plane ends."""
    values, low, end = [[0] * n for _ in range(rows)], 0, start
    for width in PLANES[bits]:
        start = (end + 63) // 64 * 64
        per, words = 32 // width, (n * width + 31) // 32
        for row in range(rows):
            for k in range(n):
                [word] = struct.unpack_from("<I", section, start + 4 * (row * words + k // per))
                values[row][k] |= (word >> (width * (k % per)) & (1 << width) - 1) << low
        low, end = low + width, start + 4 * rows * words
    return values, end


def read_uniform(section: bytes, entry: dict) -> list[list[float]]:
    """SPEC 7.3 and 7.5. The samples' input scales are multiples of 1/8, so that nothing is rounded."""
    (rows, n), bits, group_size = entry["shape"], entry["bits"], entry["group_size"]
    n_groups = (n + group_size - 1) // group_size
    codes, end = read_planes(section, 0, rows, n, bits)
    start = (end + 63) // 64 * 64
    scales = [struct.unpack_from(f"<{n_groups}e", section, start + 2 * n_groups * i) for i in range(rows)]
    end = start + 2 * n_groups * rows
    zeros = [[2 ** (bits - 1)] * n_groups] * rows
    if not entry["symmetric"]:
        [flat], end = read_planes(section, end, 1, rows * n_groups, bits)
        zeros = [flat[i * n_groups : (i + 1) * n_groups] for i in range(rows)]
    inputs = [1.0] * n
    if entry.get("input_scales", False):
        start = (end + 63) // 64 * 64
        inputs, end = list(struct.unpack_from(f"<{n}e", section, start)), start + 2 * n
    assert end == len(section) == entry["bytes"]
    return [
        [scales[i][k // group_size] * (codes[i][k] - zeros[i][k // group_size]) * inputs[k] for k in range(n)]
        for i in range(rows)
    ]


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_second_reader_gets_the_same_weights(bits):
    file = GOLDEN.read_bytes()
    [entry] = [e for e in read_header(file)["tensors"] if e["name"] == f"blocks.{bits}.weight"]
    section = file[entry["offset"] : entry["offset"] + entry["bytes"]]
    assert hashlib.sha256(section).hexdigest() == entry["sha256"]
    with QtmFile.open(GOLDEN) as reader:
        assert dequantize(reader.layer(entry["name"])).tolist() == read_uniform(section, entry)
