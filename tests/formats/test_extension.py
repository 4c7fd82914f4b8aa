"""One file in `formats/encoding` adds an encoding: written, listed, verified, decoded and run like those there are."""

import shutil
from pathlib import Path

from invoke import python

ROOT = Path(__file__).parents[2]
SIGNS = '''
"""Signs with a scale per row: a byte a weight, to be short."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formats.encoding.base import Description, register
from formats.encoding.component import Numbers, Plain
from formats.encoding.matrix import MatrixEncoding
from formats.layer.base import Layer


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Signs(MatrixEncoding):
    name: ClassVar[str] = "signs"
    doubled: bool = False

    @property
    def version(self):
        return (1, 1)

    def components(self, shape):
        return {"signs": Plain("signs", "|i1", shape), "scales": Numbers("scales", "<f2", shape[:1], "a scale")}

    def describe(self, shape):
        return Description(1, None, 0)

    def unpack(self, arrays, shape):
        return SignsLinear(**self.composite(shape).unpack(arrays), doubled=self.doubled)

    def rows(self, held, index, shape):
        return held["signs"][index].float() * held["scales"][index, None].float() * (1 + self.doubled)


@dataclass(frozen=True, eq=False)
class SignsLinear(Layer):
    signs: np.ndarray
    scales: np.ndarray
    doubled: bool = False

    @property
    def shape(self):
        return self.signs.shape

    @property
    def encoding(self):
        return Signs(doubled=self.doubled)

    def dequantize(self):
        return self.signs.astype(np.float32) * self.scales[:, None].astype(np.float32) * np.float32(1 + self.doubled)
'''
USE = """
import sys
import numpy as np
import torch
from formats.encoding import encoding_of
from formats.encoding.signs import SignsLinear
from formats.errors import FormatError
from formats.tensors import decode_tensor, section_tensor
from formats.modules import QuantLinear
from formats.reader import QtmFile, verify
from formats.section import pack
from formats.writer import Writer
from qtool.report import inspect_file

path, bad = sys.argv[1:]
signs = np.array([[1, -1, 1], [-1, -1, 1]], np.int8)
layer = SignsLinear(signs, np.array([0.5, 2], np.float16), doubled=True)
want = np.array([[1, -1, 1], [-4, -4, 4]], np.float32)
for target, section in ((path, pack(layer)), (bad, pack(layer)[:-1] + b"\\x7e")):
    with Writer(target) as writer:
        writer.add_tensor("w", layer.shape, encoding_of(layer), section)
        writer.finish(model={}, recipe={}, provenance={}, quality={})
verify(path)
with QtmFile.open(path) as file:
    assert np.array_equal(file.layer("w").dequantize(), want)
    entry = file.tensors["w"]
    assert np.array_equal(decode_tensor(file, entry).numpy(), want)
    linear = QuantLinear(section_tensor(file, entry), entry.shape, entry.encoding, None)
    assert linear(torch.eye(3)).T.tolist() == want.tolist()
(row,) = inspect_file(path)["tensors"]
assert (row["encoding"], row["bits"]) == ("signs", 1)
try:
    verify(bad)
except FormatError as error:
    assert str(error) == f"{bad}: tensor 'w': a scale is NaN or infinite (SPEC 7.6)", error
else:
    raise AssertionError("a NaN was let through")
"""


def test_spec_7_one_file_adds_an_encoding(tmp_path):
    shutil.copytree(ROOT / "formats", tmp_path / "formats")
    (tmp_path / "formats" / "encoding" / "signs.py").write_text(SIGNS, encoding="utf-8")
    files = (str(tmp_path / "a.qtm"), str(tmp_path / "bad.qtm"))
    result = python("-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{USE}", *files)
    assert result.returncode == 0, result.stderr
    # Where the file is not there, the encoding is refused by name.
    refused = python("-c", "import sys; from formats.reader import verify; verify(sys.argv[1])", files[0])
    assert "unknown encoding 'signs'; this reader knows affine, codebook, dense" in refused.stderr
