"""Quantized layers as numbers: what the section of a matrix holds, and the weight that it stands for (SPEC 7)."""

import numpy as np
import numpy.typing as npt

from formats.layer.affine import AffineLinear, Products
from formats.layer.base import Layer, decode, group_index
from formats.layer.codebook import CodebookLinear
from formats.layer.int8 import Int8Linear
from formats.layer.outliers import SparseOutliers
from formats.layer.statistics import DoubleQuant, Statistic, TwoLevel, dynamic_map, statistic_values
from formats.layer.ternary import TernaryLinear
from formats.layer.trellis import TrellisLinear
from formats.layer.uniform import QuantizedLinear

__all__ = [
    "AffineLinear",
    "CodebookLinear",
    "DoubleQuant",
    "Int8Linear",
    "Layer",
    "Products",
    "QuantizedLinear",
    "SparseOutliers",
    "Statistic",
    "TernaryLinear",
    "TrellisLinear",
    "TwoLevel",
    "decode",
    "dequantize",
    "dynamic_map",
    "group_index",
    "statistic_values",
]


def dequantize(layer: Layer) -> npt.NDArray[np.float32]:
    """The weight that a layer stands for.  -> [out, in] f32"""
    return layer.dequantize()
