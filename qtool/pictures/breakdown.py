"""What every byte of a file is spent on."""

from __future__ import annotations

from collections import Counter

from formats.encoding import Dense, align
from formats.header import SECTION_ALIGNMENT, TensorEntry
from formats.preamble import PREAMBLE_BYTES
from formats.reader import QtmFile
from qtool.report import block_prefixes

OUTSIDE, DENSE, FILES = "embeddings, head", "norms and others left dense", "tokenizer and other files"
PADDING, HEADER = "padding", "header"
# Parts of a section that serve one purpose, by how their names start; another part goes under its own name.
_PURPOSES = (
    ("codes", "codes"),
    ("scale", "scales"),
    ("zero", "zeros"),
    ("input_scales", "input scales"),
    ("outlier", "outliers"),
    ("columns", "outliers"),
    ("values", "outliers"),
)
PARTS = (*dict.fromkeys(label for _, label in _PURPOSES), OUTSIDE, DENSE, FILES, PADDING, HEADER)
"""What this version knows of; a part of an encoding made later comes besides."""


def size_by_part(file: QtmFile) -> dict[str, int]:
    """Bytes by what they are for, in the order of the format; together the size of the file, to the byte."""
    sizes: Counter[str] = Counter()
    blocks, end = block_prefixes(file.header), PREAMBLE_BYTES
    for section in file.header.sections():
        sizes[PADDING] += section.offset_bytes - end
        end = section.offset_bytes + section.n_bytes
        sizes.update(_tensor_sizes(section, blocks) if isinstance(section, TensorEntry) else {FILES: section.n_bytes})
    header_offset = align(end, SECTION_ALIGNMENT)
    sizes[PADDING] += header_offset - end
    sizes[HEADER] += file.n_bytes - header_offset + PREAMBLE_BYTES
    unknown = [name for name in sizes if name not in PARTS]
    return {name: sizes[name] for name in (*PARTS, *unknown) if sizes[name]}


def _tensor_sizes(entry: TensorEntry, blocks: tuple[str, ...]) -> dict[str, int]:
    if len(entry.shape) == 2 and not entry.name.startswith(blocks):
        return {OUTSIDE: entry.n_bytes}
    if isinstance(entry.encoding, Dense):
        return {DENSE: entry.n_bytes}
    sizes: Counter[str] = Counter()
    for part in entry.encoding.parts(entry.shape):
        sizes[_purpose(part.name)] += part.n_bytes
    sizes[PADDING] = entry.n_bytes - sizes.total()
    return sizes


def _purpose(part: str) -> str:
    return next((label for start, label in _PURPOSES if part.startswith(start)), part.replace("_", " "))
