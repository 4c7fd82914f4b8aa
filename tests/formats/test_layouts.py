"""Layouts of other engines: known words, then what holds for any shape."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from formats.errors import FormatError
from formats.layer import QuantizedLinear
from formats.layouts.awq import pack_awq, unpack_awq
from formats.layouts.bitstream import pack_stream, stream_words, unpack_stream
from formats.layouts.gptq import pack_gptq, unpack_gptq
from formats.layouts.pack_quantized import pack_quantized, unpack_quantized

# export-layouts: K=64, N=32, g=32; checked against GPTQModel's own packer.
QWEIGHT = {
    2: ("6c6c6c6c 6c6c6c6c", "1b1b1b1b 1b1b1b1b"),
    3: ("b829cbb8 cbb829cb 29cbb829", "53977053 70539770 97705397"),
    4: ("1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8", "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b"),
    8: (
        "150e0700 312a231c 4d463f38 69625b54 857e7770 a19a938c bdb6afa8 d9d2cbc4",
        "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
    ),
}
QZEROS_2 = {
    2: "79e79e79 9e79e79e",
    3: "1a3f58d1 fd6347eb 8d1fac68",
    4: "87654321 1fedcba9 98765432 21fedcba",
    8: "04030201 08070605 0c0b0a09 100f0e0d 14131211 18171615 1c1b1a19 201f1e1d",
}
QZEROS_1 = {
    2: "24924924 49249249",
    3: "d11ac688 6b1a2358 688d6344",
    4: "76543210 0edcba98 87654321 10edcba9",
    8: "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c",
}
STREAMS = {  # codes (7k) mod 2**b, k = 0 to 31: one row of compressed-tensors
    5: "87cab8e0 469bf88a faf048b7 e80ea6c2 cc964ed9",
    6: "dc54e1c0 6ff8c6a8 a626d434 cc17edf0 6be885a4 6522c4f7",
    7: "c2a38380 b862a919 dd49b19f bbf0d38a 6898c0bf ad97a842 b34a5c47",
}


def words(text):
    return [int(word, 16) for word in text.split()]


def as_words(array):
    return array.view(np.uint32).tolist()


def sample(bits):
    k, n, g = np.arange(64), np.arange(32), np.arange(2)
    return QuantizedLinear(
        codes=((7 * k[None] + 3 * n[:, None]) % 2**bits).astype(np.uint8),
        scales=np.array([[0.5, 0.75]] * 32, np.float16),
        zeros=((5 * g[None] + n[:, None]) % (2**bits - 1) + 1).astype(np.uint8),
        bits=bits,
        group_size=32,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_known_words(bits):
    arrays = pack_gptq(sample(bits), version=2)
    for column in (0, 1):
        assert as_words(arrays["qweight"][:, column])[:bits] == words(QWEIGHT[bits][column])[:bits]
    assert arrays["qweight"].shape == (2 * bits, 32)
    assert as_words(arrays["qzeros"][0]) == words(QZEROS_2[bits])
    assert as_words(pack_gptq(sample(bits), version=1)["qzeros"][0]) == words(QZEROS_1[bits])
    assert arrays["scales"].tolist() == [[0.5] * 32, [0.75] * 32]
    assert arrays["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert [array.dtype for array in arrays.values()] == [np.int32, np.int32, np.float16, np.int32]


@pytest.mark.parametrize("bits", STREAMS)
def test_stream_known_words(bits):
    codes = (7 * np.arange(64)[None] % 2**bits).astype(np.uint8)
    found = pack_stream(codes, bits)[0].tolist()
    assert found[:bits] == words(STREAMS[bits])
    assert len(found) == 2 * bits


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 130), st.randoms(use_true_random=False))
def test_stream_is_what_its_bits_say(bits, rows, n, rng):
    """Of any length: bit i of code k is bit k * bits + i of the row."""
    codes = np.array([[rng.randrange(1 << bits) for _ in range(n)] for _ in range(rows)], np.uint8)
    packed = pack_stream(codes, bits)
    assert packed.shape == (rows, stream_words(n, bits))
    for row, stream in zip(codes, packed, strict=True):
        number = sum(int(code) << (k * bits) for k, code in enumerate(row))
        assert sum(int(word) << (32 * i) for i, word in enumerate(stream)) == number
    assert np.array_equal(unpack_stream(packed, bits, n), codes)


def test_stream_of_another_length():
    with pytest.raises(FormatError, match="3 words a row: 64 codes of 2 bits take 4"):
        unpack_stream(np.zeros((1, 3), np.uint32), 2, 64)


def test_gptq_version_1_has_no_zero_of_0():
    layer = sample(4)
    layer.zeros[3, 1] = 0
    with pytest.raises(FormatError, match="a zero is 0: version 1 of gptq has 1 and more"):
        pack_gptq(layer, version=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_known_words(bits):
    """Its first row has the codes of the first column of GPTQ's."""
    layer = replace(sample(bits), zeros=None)
    arrays = pack_quantized(layer)
    assert as_words(arrays["weight_packed"][0])[: len(words(QWEIGHT[bits][0]))] == words(QWEIGHT[bits][0])
    assert arrays["weight_shape"].tolist() == [32, 64]
    assert arrays["weight_scale"].tolist() == [[0.5, 0.75]] * 32
    with pytest.raises(FormatError, match="symmetric layers only"):
        pack_quantized(sample(bits))


def test_awq_known_words():
    """Outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up."""
    layer = sample(4)
    arrays = pack_awq(layer)
    codes = layer.codes[:8, 0]  # 3 n mod 16: 0 3 6 9 c f 2 5
    assert codes.tolist() == [0, 3, 6, 9, 12, 15, 2, 5]
    assert as_words(arrays["qweight"][0])[0] == 0x5F93_2C60
    assert as_words(arrays["qzeros"][0])[0] == 0x8642_7531  # zeros 1 to 8
    assert arrays["qweight"].shape == (64, 4) and arrays["scales"].shape == (2, 32)


@st.composite
def layers(draw, bits=(2, 3, 4, 8), outputs=32, inputs=32, symmetric=None):
    """Layers of any shape that an engine takes; groups may be any part of a row, and their inputs in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width, n_out = draw(st.sampled_from(bits)), outputs * draw(st.integers(1, 3))
    n_in = inputs * draw(st.integers(1, 5))
    group_size = draw(st.sampled_from([size for size in (8, 32, 64, n_in) if n_in % size == 0]))
    groups, is_symmetric = (n_out, n_in // group_size), draw(st.booleans()) if symmetric is None else symmetric
    zeros = rng.integers(0, 1 << width, groups, np.uint8)
    zeros[0, 0] = 0  # not all in the middle
    return QuantizedLinear(
        codes=rng.integers(0, 1 << width, (n_out, n_in), np.uint8),
        scales=rng.normal(size=groups).astype(np.float16),
        zeros=None if is_symmetric else zeros,
        bits=width,
        group_size=group_size,
    )


def assert_same(one, other):
    assert (one.bits, one.group_size, one.symmetric) == (other.bits, other.group_size, other.symmetric)
    for name in ("codes", "scales", "zeros", "input_order"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or np.array_equal(a, b), name


@settings(deadline=None)
@given(layers(), st.randoms(use_true_random=False))
def test_gptq_gives_every_layer_back(layer, rng):
    if rng.random() < 0.5 and layer.group_size < layer.in_features:
        places = list(range(layer.in_features))
        rng.shuffle(places)
        layer = replace(layer, input_order=np.array(places, np.uint32))
    stored = unpack_gptq(pack_gptq(layer, 2), layer.shape, layer.bits, layer.group_size, 2)
    assert stored.obstacle() is None
    assert np.array_equal(stored.dequantize(), layer.dequantize())
    if layer.input_order is None:
        assert_same(stored.layer(), layer)
    else:  # the order within a group means nothing
        assert np.array_equal(stored.layer().groups_of_inputs(), layer.groups_of_inputs())
        assert np.array_equal(stored.layer().dequantize(), layer.dequantize())


@settings(deadline=None)
@given(layers())
def test_version_1_gives_every_layer_back_whose_zeros_are_above_0(layer):
    if layer.zeros is not None:
        layer = replace(layer, zeros=np.maximum(layer.zeros, 1))
    stored = unpack_gptq(pack_gptq(layer, 1), layer.shape, layer.bits, layer.group_size, 1)
    assert np.array_equal(stored.dequantize(), layer.dequantize())


@settings(deadline=None)
@given(layers(bits=range(2, 9), outputs=5, inputs=8, symmetric=True))
def test_compressed_tensors_gives_every_layer_back(layer):
    assume(layer.in_features >= 128 or 32 % layer.bits == 0)  # shorter ones cannot be told from older files
    stored = unpack_quantized(pack_quantized(layer), layer.shape, layer.bits, layer.group_size, True)
    assert_same(stored.layer(), layer)


@settings(deadline=None)
@given(layers(bits=(4,), outputs=8, inputs=8))
def test_awq_gives_every_layer_back(layer):
    assert_same(unpack_awq(pack_awq(layer), layer.shape, layer.group_size).layer(), layer)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_files_of_compressed_tensors_have_no_code_in_two_words(bits):
    """Until late 2025: floor(32 / bits) codes a word."""
    codes = (7 * np.arange(640) % 2**bits).astype(np.uint8).reshape(2, 320)
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -320 % per_word))).reshape(2, -1, per_word).astype(np.uint32)
    packed = (padded << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))).sum(2, dtype=np.uint32)
    arrays = {"weight_packed": packed.view(np.int32), "weight_scale": np.ones((2, 1), np.float32)}
    arrays["weight_shape"] = np.array([2, 320], np.int64)
    assert np.array_equal(unpack_quantized(arrays, (2, 320), bits, -1, True).codes, codes)


def test_short_rows_that_cannot_be_told_from_older_ones():
    arrays = {"weight_packed": np.zeros((1, 2), np.int32), "weight_scale": np.ones((1, 1), np.float32)}
    arrays["weight_shape"] = np.array([1, 20], np.int64)
    with pytest.raises(FormatError, match="rows of 20 codes of 3 bits: older files and new ones cannot be told apart"):
        unpack_quantized(arrays, (1, 20), 3, -1, True)


def test_zeros_of_compressed_tensors_are_packed_along_the_outputs():
    """export-layouts: zero points (5 i mod 16) - 8 of 16 rows."""
    packed = np.array([[0x3E94FA50], [0xB61C72D8]], np.uint32).view(np.int32)
    arrays = {"weight_packed": np.zeros((16, 1), np.int32), "weight_scale": np.ones((16, 1), np.float32)}
    arrays |= {"weight_shape": np.array([16, 8], np.int64), "weight_zero_point": packed}
    zeros = unpack_quantized(arrays, (16, 8), 4, -1, False).zeros
    assert zeros[:, 0].tolist() == [5 * i % 16 for i in range(16)]
