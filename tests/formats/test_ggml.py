"""Blocks of ggml, byte for byte: known answers by hand, then the `gguf` package as the oracle for any bytes."""

from dataclasses import replace

import numpy as np
import pytest
from format_samples import make_layer
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_samples import (
    make_affine,
    make_codebook,
    make_int8,
    make_spqr,
    make_ternary,
    make_trellis,
    with_outliers,
)

from formats.ggml import k_blocks
from formats.ggml.blocks import FORMS, Blocks, unpack
from formats.ggml.exact import SMALLEST_FIRST, NotWhole, exact, exact_blocks, steps_of
from formats.ggml.fit import fit
from formats.ggml.k_blocks import KBlocks, unpack_k
from formats.ggml.types import K_FORMS, TYPES
from formats.layer import Int8Linear, QuantizedLinear

KNOWN = {  # of x[j] = (-1)^j (j + 1) / 8
    "Q4_0": "0038c848d937d937ea26ea26fb15fb15fc04",
    "Q4_1": "333800c4c837c837d926d926ea15ea15fb04fb04",
    "Q5_0": "003455555555917fa26eb35dc44cd53be62af719f808",
    "Q8_0": "082804f80cf014e81ce024d82cd034c83cc043b94bb153a95ba163996b9173897b81",
}
ALL = [*FORMS, *K_FORMS]


def oracle(rows, kind):
    with np.errstate(all="ignore"):  # random bytes are any float
        return quants.dequantize(rows, GGMLQuantizationType[kind])


def unpacked(rows, kind):
    return unpack(kind, rows) if kind in FORMS else unpack_k(kind, rows)


@pytest.mark.parametrize("kind", KNOWN)
def test_known_answer(kind):
    j = np.arange(32)
    x = ((-1.0) ** j * (j + 1) / 8).astype(np.float32)
    form, want = FORMS[kind], bytes.fromhex(KNOWN[kind])
    d = np.frombuffer(want[:2], np.float16).reshape(1, 1)
    m = np.frombuffer(want[2:4], np.float16).reshape(1, 1) if form.has_min else None
    base = float(m[0, 0]) if form.has_min else 0.0
    exact_quotient = np.float32(1) / np.float32({"Q4_0": 0.5, "Q4_1": 7.875 / 15, "Q5_0": 0.25, "Q8_0": 4 / 127}[kind])
    rounding = np.round if kind == "Q8_0" else (lambda v: np.floor(v + 0.5))
    codes = np.clip(rounding((x - base) * exact_quotient) + form.offset, 0, (1 << form.bits) - 1)
    assert Blocks(kind, codes.astype(np.uint8)[None], d, m).pack().tobytes() == want


def test_known_answer_of_q4_k():
    j, i = np.arange(8), np.arange(256)
    blocks = KBlocks(
        "Q4_K",
        (i % 16).astype(np.uint8)[None],
        (7 * j + 3).astype(np.uint8)[None],
        np.array([[1]], np.float16),
        (63 - 5 * j).astype(np.uint8)[None],
        np.array([[0.5]], np.float16),
    )
    known = "003c0038438a91d8bfbab570bf661dc400112233445566778899aabbccddeeff"
    assert blocks.pack().tobytes()[:32].hex() == known
    assert np.array_equal(blocks.values(), oracle(blocks.pack(), "Q4_K"))


@pytest.mark.parametrize("kind", ALL)
def test_any_bytes(kind):
    """They mean what ggml's own Python says, bit for bit, and are the same bytes when they are packed again."""
    rows = np.random.default_rng(0).integers(0, 256, (7, 3 * TYPES[kind].n_bytes), np.uint8)
    blocks = unpacked(rows, kind)
    with np.errstate(all="ignore"):
        assert np.array_equal(blocks.values(), oracle(rows, kind), equal_nan=True)
    assert np.array_equal(blocks.pack(), rows)


@st.composite
def whole_layers(draw):
    """Any layer in equal steps whose groups are whole blocks."""
    bits, rows = draw(st.integers(2, 8)), draw(st.integers(1, 5))
    group_size = draw(st.sampled_from([32, 64, 96, 256]))
    in_features = group_size * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = rows, in_features // group_size
    scales = (rng.standard_normal(groups) * draw(st.sampled_from([1e-7, 1e-3, 1, 60]))).astype(np.float16)
    scales[rng.random(groups) < 0.1] = 0
    zeros = rng.integers(0, 1 << bits, groups).astype(np.uint8) if draw(st.booleans()) else None
    codes = rng.integers(0, 1 << bits, (rows, in_features)).astype(np.uint8)
    return QuantizedLinear(codes=codes, scales=scales, zeros=zeros, bits=bits, group_size=group_size)


@given(whole_layers())
@settings(max_examples=60, deadline=None)
def test_what_fits_is_exact(layer):
    """Every type that says it holds a layer decodes to the very same numbers, and some type must."""
    want, steps, found = layer.dequantize(), steps_of(layer), []
    for kind in FORMS:
        if (blocks := exact_blocks(steps, kind)) is not None:
            found.append(kind)
            assert np.array_equal(oracle(blocks.pack(), kind), want), kind
            assert np.array_equal(blocks.values(), want), kind
    bits = layer.bits
    if layer.symmetric:
        sure = {b: kind for b, kind in ((4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")) if bits <= b}
        assert set(sure.values()) <= set(found)
    elif bits < 8:
        assert ({"Q5_0"} if bits <= 4 else {"Q8_0"}) <= set(found)
    if found:
        assert exact(layer, SMALLEST_FIRST).kind == found[0]


def test_a_minimum_that_16_bits_hold():
    """d * zero: 0.5 * 3 is such a number, 0.1 * 3 is none; then other codes may do, where some are unused."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)[None]

    def layer(scale, codes):
        scales = np.array([[scale]], np.float16)
        return QuantizedLinear(codes=codes, scales=scales, zeros=np.array([[3]], np.uint8), bits=4, group_size=32)

    blocks = exact_blocks(steps_of(layer(0.5, codes)), "Q4_1")
    assert np.array_equal(blocks.codes, codes) and blocks.m[0, 0] == -1.5
    assert exact_blocks(steps_of(layer(0.1, codes)), "Q4_1") is None
    moved = exact_blocks(steps_of(layer(0.1, codes // 2 + 1)), "Q4_1")  # -2 to 5: a base of -4 or -8 is exact
    assert np.array_equal(moved.values(), layer(0.1, codes // 2 + 1).dequantize())
    assert exact(layer(0.1, codes), SMALLEST_FIRST).kind == "Q5_0"


def test_int8_rows():
    codes = (37 * np.arange(128) % 255 - 127).astype(np.int8).reshape(2, 64)
    layer = Int8Linear(codes=codes, scales=np.array([0.5, -0.25], np.float32))
    blocks = exact(layer, SMALLEST_FIRST)
    assert blocks.kind == "Q8_0" and np.array_equal(oracle(blocks.pack(), "Q8_0"), layer.dequantize())
    with pytest.raises(NotWhole, match="scales need more than 16 bits"):
        exact(Int8Linear(codes=codes, scales=np.array([0.5, 0.1], np.float32)), SMALLEST_FIRST)


@pytest.mark.parametrize("kind", ALL)
def test_fit_loses_little(kind):
    """Less than the `gguf` package's own rounding, where it has one, and less where inputs weigh more."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((24, 512)) * 0.1).astype(np.float32)
    importance = (rng.random(512) ** 6).astype(np.float32)

    def error(values, weights=1.0):
        return float((np.square(weight - values) * weights).sum() / (np.square(weight) * weights).sum())

    blocks, weighted = fit(weight, kind), fit(weight, kind, importance)
    assert np.array_equal(blocks.values(), oracle(blocks.pack(), kind))
    assert error(weighted.values(), importance) < error(blocks.values(), importance)
    if kind in FORMS:
        theirs = quants.dequantize(quants.quantize(weight, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
        assert error(blocks.values()) < error(theirs)
    else:
        bits = K_FORMS[kind].bits
        assert error(blocks.values()) < {2: 0.08, 3: 0.022, 4: 5.2e-3, 5: 1.3e-3, 6: 3.1e-4}[bits]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e5, 1e-9])
def test_fit_of_equal_weights(kind, value):
    """Nothing divides by zero, and what a block can hold comes back."""
    weight = np.full((2, 256), value, np.float32)
    values = fit(weight, kind).values()
    assert np.isfinite(values).all()
    if abs(value) in (0.0, 1.0, 0.37):
        assert np.allclose(values, value, rtol=1e-2)


def test_fit_keeps_what_is_already_exact():
    """A weight that came out of K blocks is not made worse by more than a little."""
    rng = np.random.default_rng(2)
    first = fit((rng.standard_normal((8, 256))).astype(np.float32), "Q4_K").values()
    again = fit(first, "Q4_K").values()
    assert np.square(first - again).sum() < 2e-4 * np.square(first).sum()


def test_pieces_make_one(monkeypatch):
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((9, 256)).astype(np.float32)
    whole = [fit(weight, kind).pack() for kind in ("Q4_K", "Q6_K", "Q5_1")]
    monkeypatch.setattr("formats.ggml.fit.PIECE_WEIGHTS", 1000)
    for kind, rows in zip(("Q4_K", "Q6_K", "Q5_1"), whole, strict=True):
        assert np.array_equal(fit(weight, kind).pack(), rows)
    assert k_blocks.SUPER_BLOCK == 256


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (make_layer(4, 80, 4, 16, symmetric=True), "rows of 80 are no whole blocks of 32"),
        (make_layer(4, 96, 4, 16, symmetric=True), "groups of 16 are no whole blocks of 32"),
        (make_layer(4, 96, 4, 48, symmetric=True), "groups of 48 are no whole blocks of 32"),
        (make_layer(4, 64, 4, 32, symmetric=True, scaled=True), "inputs have scales"),
        (with_outliers(make_layer(4, 64, 4, 32), every=60), "4 outliers stand beside the codes"),
        (make_spqr(4, 64, 3, 32), "scales are in two levels"),
        (make_int8(3, 64), "2 inputs are kept in 16 bits"),
        (make_codebook(3, 64, 4, 32), "weights are stored as codebook, not in equal steps"),
        (make_trellis(70, 64, 3, 32), "weights are stored as trellis, not in equal steps"),
        (make_ternary(5, 64), "weights are stored as ternary_dict, not in equal steps"),
        (make_affine(5, 64, 6, 32), "weights are stored as affine, not in equal steps"),
        (make_affine(5, 64, 4, 16), "weights are stored as affine, not in equal steps"),
        (make_affine(2, 512, 4, 32, False, 6, 4), "weights are stored as affine, not in equal steps"),
    ],
)
def test_why_a_layer_does_not_fit(layer, reason):
    with pytest.raises(NotWhole, match=f"^{reason}$"):
        exact(layer)


def test_one_group_a_row_and_factors_of_one():
    """Groups need not be whole blocks where there is only one, and factors that are all 1 change nothing."""
    layer = make_layer(4, 96, 4, 96, symmetric=True, scaled=True)
    layer = replace(layer, input_scales=np.ones(96, np.float16))
    assert np.array_equal(exact(layer).values(), layer.dequantize())
    with pytest.raises(NotWhole, match=r"^scales of 16 bits are none of Q4_K$"):
        exact(layer, ["Q4_K"])
    with pytest.raises(NotWhole, match=r"^steps from -?\d+ to \d+ do not fit Q4_0$"):
        exact(replace(layer, bits=8, codes=layer.codes * np.uint8(17)), ["Q4_0"])
