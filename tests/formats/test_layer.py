from fractions import Fraction

import numpy as np
import pytest
from format_samples import make_layer

from formats.errors import FormatError
from formats.layer import QuantizedLinear, decode, dequantize, group_index


def layer_with(**changes):
    values = {
        "codes": np.zeros((2, 5), np.uint8),
        "scales": np.ones((2, 3), np.float16),
        "zeros": np.zeros((2, 3), np.uint8),
        "bits": 3,
        "group_size": 2,
    }
    return QuantizedLinear(**(values | changes))


def test_spec_7_5_decode_by_hand():
    codes, scale, zero = np.float32([0, 4, 7]), np.float32(0.5), np.float32(3)
    assert decode(codes, scale, zero).tolist() == [-1.5, 0.5, 2.0]


def test_spec_7_5_decode_takes_torch():
    torch = pytest.importorskip("torch")
    got = decode(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [1.0]]))
    assert got.tolist() == [[-1.5, 0.5], [-2.0, 6.0]]


def test_spec_7_5_decode_is_exact():
    """Every integer from -255 to 255 with the largest, smallest and longest fp16 scales."""
    scales = np.array([65504, 2**-24, 1023 * 2**-24, 2047 / 2048, -1365 / 4096], np.float16)
    codes, zero = np.arange(256, dtype=np.float32), np.float32([0, 128, 255])
    got = decode(codes[:, None, None], scales.astype(np.float32)[:, None], zero)
    for i, j, k in np.ndindex(got.shape):
        want = Fraction(float(scales[j])) * (int(codes[i]) - int(zero[k]))
        assert Fraction(float(got[i, j, k])) == want


def test_group_index_has_a_short_last_group():
    assert group_index(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert group_index(3, 3).tolist() == [0, 0, 0]


def test_dequantize_by_hand():
    layer = layer_with(
        codes=np.array([[0, 1, 2, 3, 4], [7, 7, 7, 7, 7]], np.uint8),
        scales=np.array([[1, 2, 4], [0.5, 0.25, -1]], np.float16),
        zeros=np.array([[1, 2, 3], [0, 7, 5]], np.uint8),
    )
    got = dequantize(layer)
    assert got.dtype == np.float32
    assert got.tolist() == [[-1, 0, 0, 2, 4], [3.5, 3.5, 0, 0, -2]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_spec_7_7_symmetric_is_the_middle_zero(bits):
    symmetric = make_layer(bits=bits, symmetric=True)
    middle = np.full(symmetric.scales.shape, 2 ** (bits - 1), np.uint8)
    explicit = QuantizedLinear(codes=symmetric.codes, scales=symmetric.scales, zeros=middle, bits=bits, group_size=4)
    assert symmetric.symmetric
    assert not explicit.symmetric
    assert np.array_equal(dequantize(symmetric), dequantize(explicit))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, "bits=1: must be 2 to 8"),
        ({"bits": 9}, "bits=9: must be 2 to 8"),
        ({"codes": np.zeros((2, 5), np.int8)}, "codes are int8"),
        ({"codes": np.zeros(5, np.uint8)}, r"codes \[5\]: must be \[out, in\]"),
        ({"codes": np.zeros((0, 5), np.uint8)}, "not empty"),
        ({"codes": np.full((2, 5), 8, np.uint8)}, "codes reach 8: does not fit 3 bits"),
        ({"group_size": 0}, "group_size=0: must be 1 to 5"),
        ({"group_size": 6}, "group_size=6: must be 1 to 5"),
        ({"scales": np.ones((2, 3), np.float32)}, r"scales are float32\[2, 3\]: must be float16\[2, 3\]"),
        ({"scales": np.ones((2, 2), np.float16)}, r"scales are float16\[2, 2\]: must be float16\[2, 3\]"),
        ({"scales": np.full((2, 3), np.nan, np.float16)}, "a scale is NaN or infinite"),
        ({"scales": np.full((2, 3), np.inf, np.float16)}, "a scale is NaN or infinite"),
        ({"zeros": np.zeros((3, 2), np.uint8)}, "zeros are uint8"),
        ({"zeros": np.full((2, 3), 8, np.uint8)}, "zeros reach 8"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        layer_with(**changes)
