"""Layers of version 1.1: their bytes, numbers by hand, and torch against numpy."""

import numpy as np
import pytest
import torch
from format_samples import make_layer, same_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_samples import (
    LAYERS,
    make_affine,
    make_codebook,
    make_int8,
    make_outliers,
    make_spqr,
    make_trellis,
    with_outliers,
)

from formats.encoding import encoding_of
from formats.kernels.cpu import Rows
from formats.kernels.cpu_linear import hold
from formats.layer import Layer, dequantize
from formats.modules import QuantLinear
from formats.section import check_section, pack, part_arrays, unpack

all_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def parts_of(layer: Layer) -> dict[str, np.ndarray]:
    return part_arrays(bytearray(pack(layer)), layer.shape, encoding_of(layer))


def section_of(layer: Layer) -> torch.Tensor:
    return torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8)


def quant_linear(layer: Layer, bias: torch.Tensor | None = None) -> QuantLinear:
    return QuantLinear(section_of(layer), layer.shape, encoding_of(layer), bias)


def rows_of(layer: Layer, index: Rows) -> torch.Tensor:
    """What `Encoding.rows` decodes of some rows: input scales are not applied."""
    encoding = encoding_of(layer)
    return encoding.rows(hold(section_of(layer), encoding, layer.shape), index, layer.shape)


def check_bits_agree(layer: Layer) -> None:
    """That the section gives the layer back, and torch the weight that numpy gives."""
    section, encoding, want = pack(layer), encoding_of(layer), dequantize(layer)
    check_section(section, layer.shape, encoding)
    assert same_layer(unpack(section, layer.shape, encoding), layer)
    assert want.dtype == np.float32 and want.shape == layer.shape and np.isfinite(want).all()
    assert encoding.decode(parts_of(layer), layer.shape).numpy().tobytes() == want.tobytes()


@all_layers
def test_numpy_and_torch_agree_on_every_bit(layer):
    check_bits_agree(layer)


@all_layers
def test_rows_by_index_and_by_slice_are_those_of_the_whole(layer):
    whole, last = rows_of(layer, slice(None)), layer.out_features - 1
    assert torch.equal(rows_of(layer, slice(1, 2)), whole[1:2])
    assert torch.equal(rows_of(layer, slice(1, None)), whole[1:])
    assert torch.equal(rows_of(layer, torch.tensor([last, 0, 0])), whole[[last, 0, 0]])


@all_layers
def test_looked_up_rows_are_those_of_the_weight(layer):
    ids = torch.tensor([[layer.out_features - 1, 0], [0, 1]])
    assert torch.equal(quant_linear(layer).rows(ids), torch.from_numpy(dequantize(layer))[ids])


@all_layers
def test_quant_linear_multiplies_by_the_decoded_weight(layer, monkeypatch):
    monkeypatch.setattr("formats.kernels.cpu_linear.MAX_DECODED_ELEMENTS", 2 * layer.in_features)  # stripes of two rows
    bias = torch.linspace(-1, 1, layer.out_features)
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)
    weight = torch.from_numpy(dequantize(layer))
    want = x.double() @ weight.double().T + bias.double()
    # fp32: one rounding a product and a sum, so |error| <= (n + 2) eps Σ|x w| at most.
    bound = (layer.in_features + 2) * 2.0**-23 * (x.abs() @ weight.abs().T + bias.abs()).double()
    assert ((quant_linear(layer, bias)(x).double() - want).abs() <= bound).all()


sizes = st.tuples(st.integers(1, 9), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(2, 8), st.integers(1, 70), st.booleans(), st.integers(2, 8), st.integers(1, 12))
def test_spec_7_9_any_two_levels(shape, bits, group_size, symmetric, stat_bits, stat_rows):
    layer = make_spqr(*shape, bits, min(group_size, shape[1]), symmetric, stat_bits, stat_rows, scaled=bits % 2 == 0)
    check_bits_agree(layer)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 30), st.booleans())
def test_spec_7_10_any_outliers(shape, every, scaled):
    plain = make_layer(*shape, 4, min(16, shape[1]), scaled=scaled)
    check_bits_agree(with_outliers(plain, min(every, plain.codes.size)))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(2, 8), st.integers(1, 70), st.sampled_from(["f16", "two_level", "double_quant"]))
def test_spec_7_11_any_codebook(shape, bits, group_size, statistics):
    layer = make_codebook(*shape, bits, min(group_size, shape[1]), "fitted", statistics, scaled=bits % 2 == 0)
    check_bits_agree(layer)


@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_spec_7_13_any_int8_rows(shape, data):
    columns = data.draw(st.sets(st.integers(0, shape[1] - 1)))
    check_bits_agree(make_int8(*shape, tuple(sorted(columns))))


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(2, 8), st.integers(1, 70), st.booleans(), st.integers(2, 8), st.integers(0, 9))
def test_spec_7_17_any_affine(shape, bits, group_size, symmetric, stat_bits, stat_groups):
    levels = (symmetric, stat_bits, stat_groups) if stat_groups else (False, 0, 0)
    check_bits_agree(make_affine(*shape, bits, min(group_size, shape[1]), *levels))


def check_any_rows(layer, data):
    """A stripe of rows, and single ones in any order, are those of the whole."""
    whole, n_rows = rows_of(layer, slice(None)), layer.shape[0]
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n_rows), st.integers(0, n_rows))))
    assert torch.equal(rows_of(layer, slice(start, stop)), whole[start:stop])
    some = torch.tensor(data.draw(st.lists(st.integers(0, n_rows - 1), max_size=5)), dtype=torch.int64)
    assert torch.equal(rows_of(layer, some), whole[some])


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(2, 9), st.sampled_from([32, 64, 96]))
def test_spec_7_14_any_trellis(data, bits, memory, run):
    shape = data.draw(st.tuples(st.integers(1, 200), st.integers(1, 9)))
    layer = make_trellis(*shape, bits, shape[1], memory, run, scaled=bits % 2 == 0)
    check_bits_agree(layer)
    check_any_rows(layer, data)


def test_spec_7_10_columns_of_a_wide_matrix_take_32_bits():
    layer = with_outliers(make_layer(1, 65537, 2, 65537), every=65537)
    assert parts_of(layer)["outlier_columns"].tolist() == [65536]
    assert {part.name: part.dtype for part in encoding_of(layer).parts((1, 65537))}["outlier_columns"] == "<u4"
    check_bits_agree(layer)
    assert make_outliers(1, 65536).columns.dtype == np.uint16


@pytest.mark.parametrize("statistics", ["f16", "two_level", "double_quant"])
def test_real_shapes(statistics):
    check_bits_agree(with_outliers(make_codebook(576, 1536, 4, 64, "nf4", statistics), every=200))
    if statistics == "two_level":
        check_bits_agree(with_outliers(make_spqr(576, 1536, 3, 16, False, 3, 16), every=200))


def test_double_quantization_costs_what_qlora_says():
    """4.127 bits a weight for groups of 64 (arXiv 2305.14314): 4 + 8 / 64 + 32 / (64 * 256)."""
    shape = (4096, 4096)
    encoding = encoding_of(make_codebook(1, 64, group_size=64, statistics="double_quant"))
    assert 8 * encoding.section_bytes(shape) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_spqr_costs_what_it_says():
    """3.625 bits before outliers: 3 + (3 + 3) / 16 + 4 * 16 / (16 * 16); an outlier takes 32 (arXiv 2306.03078)."""
    plain = make_spqr(16, 16, 3, 16, False, 3, 16)
    bits = 8 * encoding_of(plain).section_bytes((4096, 4096)) / 4096**2
    assert bits == pytest.approx(3.625, abs=1e-4)
    outliers = encoding_of(with_outliers(plain, every=16))
    per_row = 32 * 4097  # the row pointers
    extra = 8 * (outliers.section_bytes((4096, 4096)) - encoding_of(plain).section_bytes((4096, 4096)))
    assert extra == pytest.approx(per_row + 16 * 32, abs=8 * 3 * 64)
