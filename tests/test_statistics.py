"""Statistics of statistics: SpQR's two levels and QLoRA's double quantization, by hand and within half a step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.layer import dynamic_map
from qtool.fit import planned_encoding
from qtool.recipe import QuantSpec
from qtool.statistics import round_double, round_two_level

# ---- two levels (arXiv 2306.03078)


def test_two_levels_by_hand():
    """Two sets of two rows in 2 bits. From 1 to 4: steps of 1, zero at -1. From -2 to 4: steps of 2, zero at 1."""
    stored, decoded = round_two_level(torch.tensor([[1.0, 4.0, -2.0, 4.0], [1.0, 4.0, 0.9, 1.2]]), 2, 2)
    assert stored.scales.tolist() == [[1.0, 1.0], [2.0, pytest.approx(0.1, rel=1e-3)]]
    assert stored.zeros[:, 0].tolist() == [-1.0, 1.0]
    assert stored.codes.tolist() == [[0, 0], [3, 3], [0, 0], [3, 3]]
    assert decoded[0].tolist() == [1.0, 4.0, -2.0, 4.0]
    assert decoded[1].tolist() == pytest.approx([1.0, 4.0, 0.9, 1.2], rel=1e-3)


values = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31), st.booleans())


@settings(max_examples=60, deadline=None)
@given(values, st.integers(2, 8), st.integers(1, 20))
def test_two_levels_are_off_by_half_a_step_at_most(drawn, bits, rows):
    """A step is a set's range over its codes, but never so small that fp16 could not hold the zero."""
    groups, out, seed, positive = drawn
    scales = torch.randn(groups, out, generator=torch.Generator().manual_seed(seed))
    scales = scales.abs() + 0.5 if positive else scales
    _, decoded = round_two_level(scales, bits, rows)
    for group in range(groups):
        for first in range(0, out, rows):
            part = scales[group, first : first + rows]
            step = max((part.max() - part.min()) / (2**bits - 1), part.abs().max() / 1024)
            off = (decoded[group, first : first + rows] - part).abs().max()
            assert off <= 0.501 * step + 2.0**-14  # that of fp16 below which it is no longer of full precision


@pytest.mark.parametrize("value", [0.0, 0.37, -5.0, 1e-3])
def test_a_constant_set_keeps_its_value(value):
    _, decoded = round_two_level(torch.full((2, 7), value), 3, 4)
    assert decoded.flatten().tolist() == pytest.approx([value] * 14, rel=2.0**-10, abs=2.0**-25)


def test_a_short_last_set_is_fitted_to_its_own_rows():
    """Rows 16 and 17 are a set of their own; nothing of the rows that pad it may widen its range."""
    scales = torch.cat([torch.linspace(0, 100, 16), torch.tensor([1.0, 2.0])])[None]
    stored, decoded = round_two_level(scales, 2, 16)
    assert stored.codes.shape == (18, 1) and stored.scales.shape == (2, 1)
    assert stored.scales[1, 0] == np.float16(1 / 3)
    assert decoded[0, 16:].tolist() == pytest.approx([1, 2], rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(values, st.integers(2, 8), st.integers(1, 20))
def test_two_levels_decode_as_the_file_does(drawn, bits, rows):
    groups, out, seed, _ = drawn
    scales = torch.randn(groups, out, generator=torch.Generator().manual_seed(seed))
    stored, decoded = round_two_level(scales, bits, rows)
    assert np.array_equal(stored.values(), decoded.numpy().T)


@pytest.mark.parametrize(
    ("bits", "stat_bits", "stat_rows", "want"),
    [(4, 3, 16, 4.625), (3, 3, 16, 3.625), (3, 3, 64, 3.4375), (3, 2, 16, 3.5), (2, 8, 32, 3.125)],
)
def test_what_two_levels_cost_is_spqrs_formula(bits, stat_bits, stat_rows, want):
    """b + (bs + bz) / g + 64 / (g · rows) for groups of 16: four fp16 numbers serve a set of scales and zeros."""
    spec = QuantSpec(bits=bits, group_size=16, stat_bits=stat_bits, stat_rows=stat_rows, input_scales=False)
    assert want == bits + 2 * stat_bits / 16 + 64 / (16 * stat_rows)
    shape = (4096, 4096)
    assert 8 * planned_encoding(spec, shape).section_bytes(shape) / (shape[0] * shape[1]) == want


# ---- double quantization (arXiv 2305.14314)


def double_slowly(scales: torch.Tensor) -> np.ndarray:
    """QLoRA's procedure on [G, out]: subtract the mean; of every 256 scales in row-major order the largest magnitude
    is 1; each is the nearest of the dynamic type.
    """
    table, rows = dynamic_map().astype(np.float64), scales.T.contiguous()
    mean = float(rows.mean())
    flat = (rows - mean).flatten().double().numpy()
    for first in range(0, len(flat), 256):
        block = flat[first : first + 256]
        absmax = np.abs(block).max()
        nearest = np.abs(block[:, None] / absmax - table[None]).argmin(1)
        flat[first : first + 256] = table[nearest] * absmax
    return flat.reshape(rows.shape) + mean


@pytest.mark.parametrize(("groups", "out"), [(1, 2), (4, 64), (5, 61), (16, 48)])  # 256 in all, and a short last block
def test_double_quantization_is_qloras_procedure(groups, out):
    scales = torch.rand(groups, out, generator=torch.Generator().manual_seed(groups)) + 0.1
    stored, decoded = round_double(scales)
    np.testing.assert_allclose(decoded.numpy().T, double_slowly(scales), rtol=1e-5)
    assert np.array_equal(stored.values(), decoded.numpy().T)
    assert len(stored.absmax) == -(-groups * out // 256)


def test_double_quantization_by_hand():
    """Mean 2, absmax 1: both ends and the mean itself are exact."""
    stored, decoded = round_double(torch.tensor([[1.0, 2.0, 3.0]]))
    assert (stored.mean.tolist(), stored.absmax.tolist()) == ([2.0], [1.0])
    # -1 is not of the dynamic type: its largest negative value is the middle of the last of 64 parts of [0.1, 1].
    assert decoded[0].tolist() == [pytest.approx(2 - (1 - 0.9 / 128)), 2.0, 3.0]


def test_scales_that_are_all_alike_come_back():
    _, decoded = round_double(torch.full((3, 5), 0.25))
    assert (decoded == 0.25).all()


def test_nf4_with_double_quantization_takes_4_127_bits():
    """4 + 8/64 + 32/(64 · 256), and one mean: QLoRA's figure."""
    shape = (4096, 4096)
    spec = QuantSpec(method="rtn", format="nf4", group_size=64, double_quant=True)
    bits = 8 * planned_encoding(spec, shape).section_bytes(shape) / (shape[0] * shape[1])
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2
    assert round(bits, 3) == 4.127
