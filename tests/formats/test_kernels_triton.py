"""The GPU kernels, run by Triton's interpreter: decoding gives the reference's bits, products stay within a bound.

The bound counts roundings: u = 2^-24 for each operation in float32, half a unit of the activations' dtype for what is
rounded to it (a weight in a tile, and the result).
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from format_samples import make_layer
from layer_samples import (
    make_affine,
    make_codebook,
    make_int8,
    make_spqr,
    make_ternary,
    make_trellis,
    with_order,
    with_outliers,
)

from formats.encoding import encoding_of
from formats.kernels.layout import layout_of
from formats.layer import AffineLinear, Layer, QuantizedLinear, SparseOutliers
from formats.section import pack

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
from formats.kernels import triton_launch as kernels  # it imports triton
from formats.kernels.blocks import DECODED, FEW_TOKENS, TILES_FROM, blocks_for, by_groups
from formats.kernels.tuning import candidates

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

BATCHES = (1, 2, 3, 8, 16, 17, 64)
SHAPES = {"on the grid": (32, 128), "off it": (37, 203)}  # 203: words, groups and blocks all end short
U = 2.0**-24
# The interpreter cuts a bfloat16 off where a GPU rounds it: a whole unit.
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: U}
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 0.0, torch.float32: 0.0}  # half of the least subnormal

ENCODINGS = {
    **{f"uniform {b} bits": lambda n, k, b=b: make_layer(n, k, b, 64, scaled=b % 2 == 0) for b in range(2, 9)},
    **{f"symmetric {b} bits": lambda n, k, b=b: make_layer(n, k, b, 16, symmetric=True) for b in range(2, 9)},
    **{f"two levels {b} bits": lambda n, k, b=b: make_spqr(n, k, b, 16, stat_bits=b) for b in range(2, 9)},
    "symmetric, two levels": lambda n, k: make_spqr(n, k, 4, 32, symmetric=True, scaled=True),
    "one group": lambda n, k: make_layer(n, k, 4, k),
    "groups of 24": lambda n, k: make_layer(n, k, 3, 24, scaled=True),
    "groups of 5": lambda n, k: make_layer(n, k, 5, 5),
    "nf4": lambda n, k: make_codebook(n, k, 4, 64, "nf4"),
    "nf4, double quantization": lambda n, k: make_codebook(n, k, 4, 64, "nf4", "double_quant", scaled=True),
    "fp4, two levels": lambda n, k: make_codebook(n, k, 4, 32, "fp4", "two_level"),
    **{f"fitted {b} bits": lambda n, k, b=b: make_codebook(n, k, b, 32, "fitted") for b in (2, 3, 5, 7, 8)},
    "int8": lambda n, k: make_int8(n, k, ()),
    "int8 with columns": lambda n, k: make_int8(n, k, (0, 7, k - 1)),
    "trellis 1 bit": lambda n, k: make_trellis(n, k, 1, 16, memory=5),
    "trellis 3 bits": lambda n, k: make_trellis(n, k, 3, 128, memory=9, scaled=True),
    "trellis 6 bits": lambda n, k: make_trellis(n, k, 6, 32, memory=2, statistics="two_level"),
    "ternary, few values": lambda n, k: make_ternary(n, k, 15, scaled=True),
    "ternary, many values": lambda n, k: make_ternary(n, k, 2),
    "ternary by rANS, few values": lambda n, k: make_ternary(n, k, 15, "ternary_rans", scaled=True),
    "ternary by rANS, many values": lambda n, k: make_ternary(n, k, 3, "ternary_rans"),
    "outliers, trellis": lambda n, k: with_outliers(make_trellis(n, k, 2, 64, memory=7, scaled=True), every=9),
    "outliers": lambda n, k: with_outliers(make_layer(n, k, 3, 16, scaled=True), every=9),
    "outliers, two levels": lambda n, k: with_outliers(make_spqr(n, k, 3, 16), every=50),
    "outliers, nf4": lambda n, k: with_outliers(make_codebook(n, k, 4, 64, "nf4", "double_quant"), every=31),
    "outliers in one row": lambda n, k: replace(make_layer(n, k, 4, 64), outliers=in_row(n, 5, range(0, 90, 3))),
    "order of the inputs": lambda n, k: with_order(make_layer(n, k, 4, 16, scaled=True)),
    "order of the inputs, 3 bits": lambda n, k: with_order(make_layer(n, k, 3, 64)),
    "order of the inputs, outliers": lambda n, k: with_order(with_outliers(make_spqr(n, k, 3, 16), every=50)),
    "affine 4 bits": lambda n, k: make_affine(n, k, 4, 32),
    "affine 5 bits, two levels": lambda n, k: make_affine(n, k, 5, 32, False, 6, 3),
    "affine 2 bits, two levels": lambda n, k: make_affine(n, k, 2, 16, False, 4, 16),
    "affine 6 bits, symmetric": lambda n, k: make_affine(n, k, 6, 16, True, 8, 5),
    "affine 4 bits, groups of 64": lambda n, k: make_affine(n, k, 4, 64),
    "affine 4 bits, two levels, groups of 64": lambda n, k: make_affine(n, k, 4, 64, False, 6, 2),
    "affine 2 bits, symmetric, groups of 128": lambda n, k: make_affine(n, k, 2, 128, True, 8, 2),
    "two levels 4 bits, groups of 64": lambda n, k: make_spqr(n, k, 4, 64),
    "groups of 192": lambda n, k: make_layer(n, k, 2, min(192, k), scaled=True),
}
# Every other number of tokens with each shape, so that every encoding meets them all.
CASES = [
    (name, shape, m)
    for i, name in enumerate(ENCODINGS)
    for j, shape in enumerate(SHAPES)
    for m in BATCHES[(i + j) % 2 :: 2]
]


def in_row(n_rows: int, row: int, columns: range, dtype: type = np.uint16) -> SparseOutliers:
    counts = np.zeros(n_rows, np.int64)
    counts[row] = len(columns)
    return SparseOutliers(
        row_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        columns=np.array(columns, dtype),
        values=np.linspace(-2, 2, len(columns)).astype(np.float16),
    )


class Packed:
    """A layer's section as a kernel gets it."""

    def __init__(self, layer: Layer) -> None:
        self.section = torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8).to(DEVICE)
        self.encoding, self.shape = encoding_of(layer), layer.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return kernels.decode(self.section, self.encoding, self.shape, dtype).cpu()

    def decode_rows(self, *rows: int) -> torch.Tensor:
        return kernels.decode_rows(self.section, torch.tensor(rows).to(DEVICE), self.encoding, self.shape).cpu()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.multiply(x.to(DEVICE), self.section, self.encoding, self.shape).cpu()


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((m, k), generator=torch.Generator().manual_seed(m * k)).to(dtype)


def magnitudes(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """[out, in] f64: no less than the terms of a weight together, as the kernels multiply them one by one."""
    if isinstance(layer, AffineLinear):  # the minimum with the sum of the activations
        codes = layer.codes - (2.0 ** (layer.bits - 1) if layer.symmetric else 0.0)
        terms = torch.from_numpy(np.abs(layer._per_weight(layer.scales) * codes))
        terms += 0.0 if layer.minima is None else torch.from_numpy(np.abs(layer._per_weight(layer.minima)))
    elif not isinstance(layer, QuantizedLinear):
        terms = weight.abs()
    else:  # planes, and the zero with the first of them: |s| (code + |zero|)
        scales = np.abs(layer._per_weight(layer.scales))
        zeros = 2.0 ** (layer.bits - 1) if layer.zeros is None else np.abs(layer._per_weight(layer.zeros))
        factors = 1.0 if layer.input_scales is None else layer.input_scales.astype(np.float64)
        terms = torch.from_numpy(scales * (layer.codes + zeros) * factors)
    outliers = getattr(layer, "outliers", None)
    return terms.double() + (0.0 if outliers is None else weight.abs().double() + 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ENCODINGS)
def test_decoding_gives_the_bits_of_the_reference(name, shape):
    layer = ENCODINGS[name](*SHAPES[shape])
    want = torch.from_numpy(layer.dequantize())
    assert torch.equal(Packed(layer).decode(), want)


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_by_their_numbers_are_those_of_the_whole(name):
    layer = ENCODINGS[name](*SHAPES["off it"])
    rows = (36, 0, 5, 5, 33, 1, 17)
    assert torch.equal(Packed(layer).decode_rows(*rows), torch.from_numpy(layer.dequantize())[list(rows)])


@pytest.mark.parametrize("name", ["uniform 4 bits", "outliers", "int8 with columns"])
def test_decoding_rounds_once_to_other_dtypes(name):
    layer = ENCODINGS[name](*SHAPES["off it"])
    want = torch.from_numpy(layer.dequantize())
    assert torch.equal(Packed(layer).decode(torch.float16), want.half())
    assert ((Packed(layer).decode(torch.bfloat16).float() - want).abs() <= 2.0**-7 * want.abs()).all()


@pytest.mark.parametrize(("name", "shape", "m"), CASES)
def test_a_product_is_the_reference_to_its_rounding(name, shape, m, monkeypatch):
    """3 and 8 tokens on the grid by tiles, off it by rows, as on a GPU without tensor cores that Triton reaches."""
    has_tiles = m > FEW_TOKENS or shape == "on the grid"
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "has_tiles", lambda dtype: has_tiles)
    layer = ENCODINGS[name](*SHAPES[shape])
    dtype = (torch.float16, torch.bfloat16, torch.float32)[(m + len(name)) % 3]
    weight = torch.from_numpy(layer.dequantize()).double()
    x = (activations(m, layer.shape[1], torch.float32) / weight.abs().max()).to(dtype)  # nothing overflows fp16
    want = x.double() @ weight.T
    y = Packed(layer).multiply(x).double()
    in_float32 = (layer.shape[1] + 40) * U * (x.double().abs() @ magnitudes(layer, weight).T)
    in_tiles = x.double().abs() @ (HALF_UNIT[dtype] * weight.abs() + SMALLEST[dtype]).T if m >= TILES_FROM else 0
    bound = in_float32 + in_tiles
    bound = bound + HALF_UNIT[dtype] * (want.abs() + bound) + SMALLEST[dtype]
    assert ((y - want).abs() <= bound).all(), float(((y - want).abs() / bound).max())


def whole(n: int, k: int, **parts: object) -> QuantizedLinear:
    """A layer of small whole numbers: no kernel has anything to round."""
    groups = -(-k // 16)
    ones = np.ones((n, groups), np.float16)
    plain = {"codes": np.zeros((n, k), np.uint8), "scales": ones, "zeros": np.zeros((n, groups), np.uint8)}
    return QuantizedLinear(bits=3, group_size=16, **(plain | parts))  # type: ignore[arg-type]


def counts(below: int, *shape: int) -> np.ndarray:
    return (np.arange(int(np.prod(shape))) * 5 % below).reshape(shape)


PARTS = {
    "codes": lambda n, k, g: {"codes": counts(8, n, k).astype(np.uint8)},
    "scales": lambda n, k, g: {
        "codes": np.ones((n, k), np.uint8),
        "scales": (counts(7, n, g) - 3).astype(np.float16),
    },
    "zeros": lambda n, k, g: {"zeros": counts(8, n, g).astype(np.uint8)},
    "input scales": lambda n, k, g: {
        "codes": np.ones((n, k), np.uint8),
        "input_scales": (2.0 ** (counts(3, k) - 1)).astype(np.float16),
    },
    "order of the inputs": lambda n, k, g: {
        "codes": np.ones((n, k), np.uint8),
        "scales": (counts(7, n, g) - 3).astype(np.float16),
        "input_order": (5 * np.arange(k) % k).astype(np.uint32),
    },
    "outliers": lambda n, k, g: {"outliers": in_row(n, n - 2, range(1, k, 7))},
}


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("part", PARTS)
def test_small_whole_numbers_come_out_exactly_one_part_at_a_time(part, m, monkeypatch):
    n, k = SHAPES["off it"]
    values = PARTS[part](n, k, -(-k // 16))
    if part == "outliers":
        values["outliers"] = replace(values["outliers"], values=np.arange(len(range(1, k, 7))).astype(np.float16) - 9)
    layer = whole(n, k, **values)
    x = torch.from_numpy((counts(5, m, k) - 2).astype(np.float32))
    want = x @ torch.from_numpy(layer.dequantize()).T
    assert want.abs().max() > 0
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(Packed(layer).multiply(x.to(dtype)), want.to(dtype))
    if m <= FEW_TOKENS:
        monkeypatch.setattr(kernels, "has_tiles", lambda dtype: False)
        assert torch.equal(Packed(layer).multiply(x), want)


GROUPED = {
    "codes": {},
    "scales": {"scales": (counts(7, 37, 4) - 3).astype(np.float16)},
    "zeros": {"zeros": counts(4, 37, 4).astype(np.uint8)},
    "symmetric": {"zeros": None},
    "input scales": {"input_scales": (2.0 ** (counts(3, 203) - 1)).astype(np.float16)},
    "outliers": {"outliers": in_row(37, 35, range(1, 200, 7))},
}


@pytest.mark.parametrize("m", [3, 16, 40])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("part", GROUPED)
def test_small_whole_numbers_come_out_of_groups_exactly(part, bits, m, monkeypatch):
    """By the kernel that gives codes of groups of 64 to the tensor cores as they are."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "has_tiles", lambda dtype: True)
    plain = {"codes": counts(2**bits, 37, 203).astype(np.uint8), "zeros": np.zeros((37, 4), np.uint8)}
    plain["scales"] = np.ones((37, 4), np.float16)
    layer = QuantizedLinear(bits=bits, group_size=64, **(plain | GROUPED[part]))
    if layer.outliers is not None:
        whole_values = np.arange(len(layer.outliers.values)).astype(np.float16) - 9
        layer = replace(layer, outliers=replace(layer.outliers, values=whole_values))
    layout = layout_of(encoding_of(layer), layer.shape)[0]
    assert by_groups(layout, blocks_for(layout, m, 37), torch.bfloat16)
    assert by_groups(layout, blocks_for(layout, m, 37), torch.float16) == (part != "input scales")
    x = torch.from_numpy((counts(5, m, 203) - 2).astype(np.float32)) / 4  # sums stay below what float16 counts
    want = x @ torch.from_numpy(layer.dequantize()).T
    assert want.abs().max() > 0
    for dtype in (torch.float16, torch.bfloat16):
        got = Packed(layer).multiply(x.to(dtype))
        if DEVICE == "cpu" and dtype == torch.bfloat16:  # cut off there, not rounded
            assert ((got.float() - want).abs() <= HALF_UNIT[dtype] * want.abs()).all()
        else:
            assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("m", [2, 16, 70])
def test_activations_and_their_scales_are_not_multiplied_in_float16(m):
    """100 times 1024 is more than it holds, and weights make up for it: by rows, in tiles and decoded."""
    plain = make_layer(37, 203, 4, 64, scaled=True)
    layer = replace(plain, scales=plain.scales / 1024, input_scales=np.full(203, 1024, np.float16))
    x = torch.full((m, 203), 100.0, dtype=torch.float16)
    want = x.double() @ torch.from_numpy(layer.dequantize()).double().T
    torch.testing.assert_close(Packed(layer).multiply(x).double(), want, rtol=1e-2, atol=float(want.abs().max()) / 100)


@pytest.mark.parametrize("name", ["uniform 3 bits", "outliers", "int8 with columns", "trellis 3 bits", "affine 4 bits"])
def test_what_is_decoded_in_parts_gives_what_the_whole_does(name, monkeypatch):
    layer = ENCODINGS[name](150, 203)
    x = activations(5, 203, torch.float32).to(DEVICE)
    packed, products = Packed(layer), []
    for n_weights in (1 << 24, 64 * 203, 1):  # one part, three, and five of a tile's rows
        monkeypatch.setattr(kernels, "DECODED_WEIGHTS", n_weights)
        products.append(kernels.multiply_with(x, packed.section, packed.encoding, layer.shape, DECODED).cpu())
    assert torch.allclose(products[0], x.cpu() @ torch.from_numpy(layer.dequantize()).T, rtol=1e-4, atol=1e-4)
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_ternary_rows_of_several_segments(scaled, monkeypatch):
    monkeypatch.setattr("formats.kernels.ternary.LANE_BITS", 20)
    layer = make_ternary(34, 127, 3, "ternary_rans", scaled)
    packed, weight = Packed(layer), torch.from_numpy(layer.dequantize())
    assert -(-127 // packed.encoding.segment) > 1 and 127 % packed.encoding.segment > 0
    assert torch.equal(packed.decode(), weight)
    assert torch.equal(packed.decode_rows(33, 0, 33), weight[[33, 0, 33]])
    x = activations(3, 127, torch.float32)
    torch.testing.assert_close(packed.multiply(x), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coding", ["ternary_dict", "ternary_rans"])
def test_small_whole_numbers_come_out_of_ternary_kernels_exactly(coding):
    layer = replace(make_ternary(34, 127, 4, coding), scales=np.tile(np.float16([-3, 2]), (34, 1)))
    weight = torch.from_numpy(layer.dequantize())
    for m in (1, 5, 8):
        x = torch.from_numpy((counts(5, m, 127) - 2).astype(np.float32))
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(Packed(layer).multiply(x.to(dtype)), (x @ weight.T).to(dtype))


def test_a_trellis_of_many_words_begins_anew_at_every_run():
    layer = make_trellis(300, 40, 2, 40, memory=6, run=96)
    assert torch.equal(Packed(layer).decode(), torch.from_numpy(layer.dequantize()))


@pytest.mark.parametrize("m", [1, 8, 16, 64])
def test_many_splits_give_the_sum_of_all_inputs(m):
    layer = make_layer(8, 4100, 2, 128)
    x = torch.ones((m, 4100))
    assert blocks_for(layout_of(encoding_of(layer), layer.shape)[0], m, 8).splits > 1
    weight = torch.from_numpy(layer.dequantize())
    want = x.double() @ weight.double().T
    bound = 4200 * U * magnitudes(layer, weight).sum(1)
    assert ((Packed(layer).multiply(x).double() - want).abs() <= bound).all()


def test_a_matrix_of_more_inputs_than_16_bits_count_has_wide_columns():
    outliers = in_row(3, 1, range(65539, 65600, 3), np.uint32)
    layer = replace(make_layer(3, 65600, 2, 65600), outliers=outliers)
    packed, weight = Packed(layer), torch.from_numpy(layer.dequantize())
    assert torch.equal(packed.decode(), weight)
    x = torch.zeros((1, 65600))
    x[0, 65599] = 1
    assert torch.equal(packed.multiply(x)[0], weight[:, -1])


WHICHEVER = "uniform 3 bits", "two levels 4 bits, groups of 64", "outliers, two levels", "trellis 3 bits"


@pytest.mark.parametrize("m", [1, 8, 17])
@pytest.mark.parametrize("name", WHICHEVER)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.float16, 2e-3)])
def test_whichever_blocks_are_tried_give_the_same(name, m, dtype, within):
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("tiles are for 16 bits there")
    layer = ENCODINGS[name](70, 1100)
    packed, x = Packed(layer), torch.linspace(-1, 1, m * 1100).view(m, 1100)
    tried = candidates(layout_of(encoding_of(layer), layer.shape)[0], m, 70)
    assert len(tried) >= 2
    x = (x / float(np.abs(layer.dequantize()).max())).to(dtype)  # nothing overflows fp16
    want = packed.multiply(x)
    for blocks in tried:
        got = kernels.multiply_with(x.to(DEVICE), packed.section, encoding_of(layer), layer.shape, blocks).cpu()
        torch.testing.assert_close(got, want, rtol=within, atol=within * float(want.abs().max()))


def test_one_output_of_one_token_in_many_splits():
    layer = make_layer(1, 4100, 2, 128)
    assert blocks_for(layout_of(encoding_of(layer), layer.shape)[0], 1, 1).splits > 1
    assert Packed(layer).multiply(torch.ones(1, 4100)).item() == pytest.approx(
        float(layer.dequantize().sum()), rel=1e-5
    )


def test_no_tokens_give_no_outputs():
    assert Packed(make_layer(8, 64, 4, 64)).multiply(torch.ones(0, 64)).shape == (0, 8)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the error comes later, and ends the process")
@pytest.mark.parametrize("row", [-1, 37])
def test_a_row_that_is_not_there_is_never_read(row):
    with pytest.raises(RuntimeError, match="nonzero"):
        Packed(make_layer(37, 64, 4, 64)).decode_rows(0, row)


def test_statistics_of_more_rows_than_there_are():
    layer = make_spqr(20, 100, 3, 16, stat_rows=2**40)
    assert torch.equal(Packed(layer).decode(), torch.from_numpy(layer.dequantize()))


def test_without_tensor_cores_in_triton_the_decoded_weight_is_multiplied(monkeypatch):
    layer = ENCODINGS["outliers"](*SHAPES["off it"])
    x = activations(17, 203, torch.float32)
    tiles = Packed(layer).multiply(x)
    monkeypatch.setattr(kernels, "has_tiles", lambda dtype: False)
    torch.testing.assert_close(Packed(layer).multiply(x), tiles, rtol=1e-4, atol=1e-4)


def test_a_dtype_that_no_kernel_takes_is_computed_with_one_warning():
    layer = make_layer(37, 203, 4, 64, scaled=True)
    packed, x = Packed(layer), activations(3, 203, torch.float64)
    with pytest.warns(UserWarning, match=r"^activations in torch.float64: no GPU kernel takes them; each weight is"):
        got = packed.multiply(x)
    torch.testing.assert_close(got, x @ torch.from_numpy(layer.dequantize()).double().T)
    packed.multiply(x)  # a second warning would be an error
