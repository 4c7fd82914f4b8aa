"""How a tensor is stored (SPEC 7): an encoding a file. Nothing here imports numpy or torch at import.

A file put beside the others, with a subclass of `Encoding` under `register`, adds an encoding to writer, reader,
loader and command line.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from formats.encoding.affine import Affine
from formats.encoding.base import (
    ENCODINGS,
    PART_ALIGNMENT,
    Arrays,
    Data,
    Description,
    Encoding,
    Part,
    PartShapes,
    Shape,
    Version,
    align,
    encoding_from_fields,
    field_names,
    register,
)
from formats.encoding.codebook import Codebook
from formats.encoding.dense import DENSE_DTYPES, Dense
from formats.encoding.int8_rows import Int8Rows
from formats.encoding.matrix import INPUT_SCALES, MatrixEncoding
from formats.encoding.planes import MAX_BITS, MIN_BITS, WORD_BITS, plane_widths, row_words
from formats.encoding.ternary_dict import TernaryDict
from formats.encoding.ternary_rans import TernaryRans
from formats.encoding.trellis import Trellis
from formats.encoding.uniform import Uniform

if TYPE_CHECKING:
    from formats.layer.base import Layer

__all__ = [
    "DENSE_DTYPES",
    "ENCODINGS",
    "INPUT_SCALES",
    "MAX_BITS",
    "MIN_BITS",
    "PART_ALIGNMENT",
    "WORD_BITS",
    "Affine",
    "Arrays",
    "Codebook",
    "Data",
    "Dense",
    "Description",
    "Encoding",
    "Int8Rows",
    "MatrixEncoding",
    "Part",
    "PartShapes",
    "Shape",
    "TernaryDict",
    "TernaryRans",
    "Trellis",
    "Uniform",
    "Version",
    "align",
    "encoding_from_fields",
    "encoding_of",
    "field_names",
    "plane_widths",
    "register",
    "row_words",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def encoding_of(layer: "Layer") -> MatrixEncoding:
    """The encoding that stores this layer exactly."""
    return layer.encoding
