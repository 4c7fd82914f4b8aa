"""The torch CPU decoder returns the bits of the numpy reference, for every width and shape on and off the grid."""

import numpy as np
import pytest
import torch
from format_samples import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.encoding import encoding_of
from formats.kernels.cpu import unpack_plane
from formats.layer import QuantizedLinear, dequantize
from formats.modules import QuantLinear
from formats.section import pack, part_arrays


def section(layer: QuantizedLinear) -> torch.Tensor:
    return torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8)


def decoded(layer: QuantizedLinear) -> np.ndarray:
    packed = bytearray(pack(layer))
    return encoding_of(layer).decode(part_arrays(packed, layer.shape, encoding_of(layer)), layer.shape).numpy()


def test_spec_7_4_3_planes_by_hand():
    """Fields come out in the order of the row, lowest bits first."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_plane(word, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack_plane(word, 2)[0, :8].tolist() == [0, 0, 1, 0, 2, 0, 3, 0]
    assert unpack_plane(word, 1)[0, 8:16].tolist() == [0, 1, 0, 0, 1, 1, 0, 0]
    assert unpack_plane(word, 8).tolist() == [[0x10, 0x32, 0x54, 0x76]]
    assert unpack_plane(word, 1, low_bit=4)[0, 8:12].tolist() == [0, 16, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 100), st.integers(2, 8), st.integers(1, 100), st.booleans())
def test_spec_7_5_equal_to_the_reference(rows, n, bits, group_size, symmetric):
    layer = make_layer(rows, n, bits, min(group_size, n), symmetric)
    assert np.array_equal(decoded(layer), dequantize(layer))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(576, 1536), (33, 577)])
def test_spec_7_5_real_shapes(bits, shape):
    layer = make_layer(*shape, bits, 64)
    assert np.array_equal(decoded(layer), dequantize(layer))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quant_linear_is_a_linear_with_the_decoded_weight(symmetric, scaled, monkeypatch):
    monkeypatch.setattr("formats.kernels.cpu_linear.MAX_DECODED_ELEMENTS", 500)  # several stripes, the last one short
    layer = make_layer(50, 70, 3, 32, symmetric, scaled)
    bias = torch.linspace(-1, 1, 50)
    linear = QuantLinear(section(layer), (50, 70), encoding_of(layer), bias)
    x = torch.linspace(-1, 1, 3 * 70).view(3, 70)
    weight = torch.from_numpy(dequantize(layer))
    want = x.double() @ weight.double().T + bias.double()
    # fp32: one rounding a product and a sum, so |error| <= (n + 2) eps Σ|x w| at most.
    bound = 72 * 2.0**-23 * (x.abs() @ weight.abs().T + bias.abs()).double()
    assert ((linear(x).double() - want).abs() <= bound).all()


def test_rows_by_their_numbers_are_those_of_the_whole():
    layer = make_layer(9, 40, 5, 16)
    linear = QuantLinear(section(layer), (9, 40), encoding_of(layer), None)
    whole = torch.from_numpy(dequantize(layer))
    assert torch.equal(linear.rows(torch.tensor([8, 0, 0])), whole[[8, 0, 0]])
