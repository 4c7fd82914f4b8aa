"""LLM.int8() (arXiv 2208.07339) offline: int8 rows, and the inputs with outliers in 16 bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calibration.hessian import LayerStats
from formats.layer import Int8Linear
from qtool.energy import output_energy, relative_error
from qtool.gptq import Solution
from qtool.recipe import QuantSpec


def outlier_features(stats: LayerStats, spec: QuantSpec) -> Tensor:
    """The inputs [k] i64, rising, whose weights stay in 16 bits: those whose largest calibration activation reaches the
    threshold, or the given number of the largest.
    """
    if spec.outlier_features:
        k = min(spec.outlier_features, len(stats.absmax))
        return stats.absmax.topk(k).indices.sort().values
    return (stats.absmax >= spec.activation_threshold).nonzero().flatten()


def int8_quantize(weight: Tensor, stats: LayerStats, spec: QuantSpec) -> Solution:
    """weight [out, in] f32, each row scaled by its largest magnitude over the inputs without outliers."""
    columns = outlier_features(stats, spec)
    rest = weight.clone()  # becomes the codes, then what they decode to: there is one copy of a large layer at a time
    rest[:, columns] = 0
    low, high = rest.aminmax(dim=1)
    scales = torch.maximum(low.abs(), high.abs()).div_(127)
    rest.div_(scales.where(scales > 0, 1.0)[:, None]).round_().clamp_(-127, 127)
    codes = rest.to(torch.int8)
    values = weight[:, columns].half()
    decoded = rest.mul_(scales[:, None])
    decoded[:, columns] = values.float()
    layer = Int8Linear(
        codes=codes.numpy(),
        scales=scales.numpy(),
        columns=columns.numpy().astype(np.uint32) if len(columns) else None,
        values=values.numpy() if len(columns) else None,
    )
    lost, energy = output_energy(weight - decoded, stats.hessian), output_energy(weight, stats.hessian)
    return Solution(layer, decoded, relative_error(lost, energy))
