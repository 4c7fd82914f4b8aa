"""From a layer's spec to its grid and the encoding that holds it: the one place that knows every number format."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formats.encoding import Codebook, Int8Rows, MatrixEncoding, Shape, Trellis, Uniform
from qtool.codebook import choose_levels, fit_codebook
from qtool.ggml_grid import fit_ggml, planned_ggml
from qtool.grid import Grid, fit_uniform
from qtool.outliers import OutlierRule
from qtool.recipe import GGML, QuantSpec
from qtool.sizes import run_length
from qtool.ternary import fit_ternary, planned_ternary


def fit_grid(
    weight: Tensor,
    spec: QuantSpec,
    input_scales: Tensor | None = None,
    cost: Tensor | None = None,
    hessian: Tensor | None = None,
    rule: OutlierRule | None = None,
) -> Grid:
    """The grid of weight [out, in] f32, its input scales [in] divided out.

    cost: [in], what an error in a column costs; hessian: [in, in], damped, to search ranges by; rule: which weights
    the grid need not reach.
    """
    if spec.format == "int":
        return fit_uniform(
            weight,
            spec.groups_of(weight.shape[1]),
            spec.bits,
            symmetric=spec.symmetric,
            input_scales=input_scales,
            hessian=hessian,
            stat_bits=spec.stat_bits,
            stat_rows=spec.stat_rows,
            rule=rule,
        )
    if spec.format == "trellis":
        from qtool.trellis import fit_trellis  # brings in a compiler

        return fit_trellis(weight, spec, input_scales=input_scales)
    if spec.format == "ternary":
        return fit_ternary(weight, input_scales=input_scales, hessian=hessian)
    if spec.format in GGML:
        return fit_ggml(weight, spec, hessian)
    levels = choose_levels(weight, spec, input_scales, cost)
    return fit_codebook(weight, spec, levels, input_scales=input_scales, hessian=hessian, rule=rule)


def planned_encoding(spec: QuantSpec, shape: Shape) -> MatrixEncoding:
    """How a matrix [out, in] will be stored, before it is solved. Outliers by a threshold cannot be foreseen: none."""
    if spec.method == "int8":
        return Int8Rows(columns=min(spec.outlier_features, shape[1]))
    if spec.format == "ternary":
        return planned_ternary(shape, input_scales=spec.input_scales)
    if spec.format in GGML:
        return planned_ggml(spec, shape)
    common: dict[str, Any] = {
        "bits": spec.bits,
        "group_size": spec.groups_of(shape[1]),
        "input_scales": spec.input_scales,
        "stat_bits": spec.stat_bits,
        "stat_rows": spec.stat_rows if spec.stat_bits else 0,
        "outliers": round(spec.outliers * shape[0] * shape[1]),
    }
    if spec.format == "int":
        return Uniform(symmetric=spec.symmetric, **common)
    if spec.format == "trellis":
        return Trellis(memory=spec.memory, run=run_length(shape[0]), **common)
    return Codebook(levels=spec.format, double_quant=spec.double_quant, **common)
