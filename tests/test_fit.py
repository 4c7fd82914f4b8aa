"""Every number format with every kind of statistics, solver and outliers: what is decoded, stored and planned."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error

from formats.encoding import Codebook, Int8Rows, Trellis, Uniform
from formats.layer import dequantize
from formats.section import check_section, pack, unpack
from qtool.factor import factorize
from qtool.fit import planned_encoding
from qtool.gptq import Solution, gptq_quantize, rtn_quantize
from qtool.recipe import QuantSpec
from qtool.sizes import bits_per_weight, stored_bytes

NUMBERS = [("int", 3), ("int", 8), ("nf4", 4), ("fp4", 4), ("fitted", 3), ("trellis", 1), ("trellis", 3)]
STATISTICS = [{}, {"symmetric": True}, {"stat_bits": 3}, {"stat_bits": 4, "symmetric": True}, {"double_quant": True}]
SOLVERS = [
    {"method": "rtn"},
    {"input_scales": False, "scale_search": False, "act_order": False},
    {"group_size": -1},
    {"outliers": 0.02},
    {"outlier_threshold": 1.0, "input_scales": False},  # times what an error of so many bits is
]


def combinations() -> list[QuantSpec]:
    """All that mean something: `symmetric` is for int, double quantization for tables of levels."""
    found = []
    for (number_format, bits), statistics, solver in itertools.product(NUMBERS, STATISTICS, SOLVERS):
        table = number_format in ("nf4", "fp4", "fitted")
        if ("symmetric" in statistics and number_format != "int") or ("double_quant" in statistics and not table):
            continue
        values = {"group_size": 16, "stat_rows": 16, "memory": 3} | statistics | solver
        if "outlier_threshold" in values:
            values["outlier_threshold"] *= 4.0**-bits
        found.append(QuantSpec(format=number_format, bits=bits, **values))
    return found


def name_of(spec: QuantSpec) -> str:
    usual = dataclasses.asdict(QuantSpec())
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(spec).items() if v != usual[k])


def solve(spec: QuantSpec, rows: int = 40, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor, Solution]:
    weight, stats = make_layer(rows, columns)
    if spec.method == "rtn":
        return weight, torch.eye(columns), rtn_quantize(weight, spec)
    return weight, stats.hessian, gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)


@pytest.mark.parametrize("spec", combinations(), ids=name_of)
def test_what_is_decoded_is_what_the_file_holds(spec):
    """Bit for bit; the section is as long as planned, and the error reported is that of what the file decodes to."""
    weight, hessian, solved = solve(spec)
    section, encoding = pack(solved.layer), solved.layer.encoding
    check_section(section, weight.shape, encoding)
    layer = unpack(section, tuple(weight.shape), encoding)
    assert dequantize(layer).tobytes() == solved.decoded.numpy().tobytes()
    n_outliers = 0 if solved.layer.outliers is None else len(solved.layer.outliers)
    assert (n_outliers > 0) == spec.keeps_outliers
    planned = dataclasses.replace(planned_encoding(spec, (40, 40)), outliers=n_outliers)
    assert encoding == planned
    assert bits_per_weight([(encoding, (40, 40))]) == 8 * (-(-len(section) // 256) * 256) / 1600
    assert solved.relative_error == pytest.approx(output_error(weight, solved.decoded, hessian), rel=5e-3)


def test_sections_are_counted_with_their_padding():
    shape = (32, 64)
    encoding = planned_encoding(QuantSpec(bits=4, group_size=64, input_scales=False), shape)
    assert encoding.section_bytes(shape) == 32 * 32 + 64 + 16  # codes, scales, zeros
    assert stored_bytes(encoding, shape) == 1280
    assert bits_per_weight([(encoding, shape)]) == 5.0
    assert bits_per_weight([]) == 0.0


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (
            QuantSpec(bits=3, group_size=256, symmetric=True, input_scales=False),
            Uniform(bits=3, group_size=100, symmetric=True),  # no longer than the row
        ),
        (
            QuantSpec(group_size=16, stat_bits=3, outliers=0.01),
            Uniform(bits=4, group_size=16, symmetric=False, input_scales=True, stat_bits=3, stat_rows=16, outliers=300),
        ),
        (
            QuantSpec(method="rtn", format="nf4", group_size=64, double_quant=True),
            Codebook(bits=4, group_size=64, levels="nf4", double_quant=True),
        ),
        (
            QuantSpec(method="rtn", format="trellis", bits=2, group_size=-1, memory=6),
            Trellis(bits=2, group_size=100, memory=6, run=160),
        ),
        (QuantSpec(method="int8", outlier_features=7), Int8Rows(columns=7)),
        (QuantSpec(method="int8", outlier_features=700), Int8Rows(columns=100)),
        (QuantSpec(method="int8"), Int8Rows(columns=0)),
    ],
)
def test_plans_by_hand(spec, want):
    assert planned_encoding(spec, (300, 100)) == want


def test_smaller_blocks_are_worth_about_a_bit():
    """Blocks of 64 instead of 1024, or 5 bits instead of 4, on weights with heavy tails (k-bit inference scaling laws,
    arXiv 2212.09720): a direction, on Student's distribution.
    """
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((64, 2048))
    coarse, more_bits, small_blocks = (
        rtn_quantize(weight, QuantSpec(method="rtn", bits=bits, group_size=group_size)).relative_error
        for bits, group_size in ((4, 1024), (5, 1024), (4, 64))
    )
    assert max(more_bits, small_blocks) < 0.3 * coarse
    assert 0.6 < small_blocks / more_bits < 1.6


def test_formats_are_ranked_as_the_papers_have_them():
    """On normal weights at 4 bits: a trellis below NF4, NF4 below FP4, as QLoRA has it."""
    errors = {
        name: solve(QuantSpec(format=name, group_size=64, memory=6), 64, 128)[2].relative_error
        for name in ("trellis", "nf4", "fp4")
    }
    assert errors["trellis"] < 0.85 * errors["nf4"]
    assert errors["nf4"] < 0.85 * errors["fp4"]


def test_a_wrong_level_would_be_seen():
    """That the comparison above can fail: one code more is another weight."""
    _, _, solved = solve(QuantSpec(format="nf4", group_size=16))
    codes = solved.layer.codes.copy()
    codes[3, 5] ^= 1
    changed = dequantize(dataclasses.replace(solved.layer, codes=codes))
    assert (changed != solved.decoded.numpy()).nonzero() == (np.array([3]), np.array([5]))
