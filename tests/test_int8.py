"""LLM.int8() offline: which inputs stay in 16 bits, rows by hand, and what it is good for."""

import dataclasses

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error

from calibration.hessian import LayerStats
from formats.layer import dequantize
from formats.section import pack, unpack
from qtool.fit import planned_encoding
from qtool.gptq import rtn_quantize
from qtool.int8 import int8_quantize, outlier_features
from qtool.recipe import QuantSpec

INT8 = QuantSpec(method="int8")


def stats_with(absmax: list[float]) -> LayerStats:
    return LayerStats(torch.eye(len(absmax)), 10, torch.tensor(absmax))


def test_inputs_that_reach_the_threshold_stay():
    stats = stats_with([1.0, 6.0, 5.99, 20.0])
    assert outlier_features(stats, INT8).tolist() == [1, 3]
    assert outlier_features(stats, QuantSpec(method="int8", activation_threshold=5.5)).tolist() == [1, 2, 3]
    assert outlier_features(stats, QuantSpec(method="int8", activation_threshold=21)).tolist() == []


def test_a_count_takes_the_largest_inputs_in_rising_order():
    stats = stats_with([1.0, 9.0, 2.0, 20.0, 7.0])
    assert outlier_features(stats, QuantSpec(method="int8", outlier_features=2)).tolist() == [1, 3]
    assert outlier_features(stats, QuantSpec(method="int8", outlier_features=99)).tolist() == [0, 1, 2, 3, 4]


def test_a_row_by_hand():
    """Input 1 fires: its weight stays as it is, and 63.5 is then the row's largest: half a step is 127 codes."""
    weight = torch.tensor([[63.5, 1000.0, -0.5, 0.3], [0.0, 0.1, 0.0, 0.0]])
    solved = int8_quantize(weight, stats_with([1.0, 8.0, 1.0, 1.0]), INT8)
    layer = solved.layer
    assert layer.scales.tolist() == [0.5, 0.0]
    assert layer.codes.tolist() == [[127, 0, -1, 1], [0, 0, 0, 0]]
    assert layer.columns.tolist() == [1]
    assert layer.values.tolist() == [[1000.0], [np.float16(0.1)]]
    assert solved.decoded.tolist() == [[63.5, 1000.0, -0.5, 0.5], [0.0, np.float16(0.1), 0.0, 0.0]]


@pytest.mark.parametrize("absmax", [1.0, 7.0])  # no input stays, or every one
def test_decoded_is_what_the_file_decodes_to(absmax):
    weight, stats = make_layer()
    stats = dataclasses.replace(stats, absmax=torch.full((40,), absmax))
    solved = int8_quantize(weight, stats, INT8)
    layer = unpack(pack(solved.layer), solved.layer.shape, solved.layer.encoding)
    assert np.array_equal(dequantize(layer), solved.decoded.numpy())
    assert layer.encoding.columns == (40 if absmax > 6 else 0)
    assert solved.relative_error == pytest.approx(output_error(weight, solved.decoded, stats.hessian), rel=1e-3)


def test_scales_are_those_of_a_row_in_127_steps():
    weight, stats = make_layer()
    solved = int8_quantize(weight, dataclasses.replace(stats, absmax=torch.ones(40)), INT8)
    assert np.array_equal(solved.layer.scales, weight.abs().amax(1).numpy() / np.float32(127))
    assert np.abs(solved.layer.codes).max(1).tolist() == [127] * 24
    step = torch.from_numpy(solved.layer.scales)[:, None]
    assert ((solved.decoded - weight).abs() <= 0.5001 * step).all()


def test_a_count_is_planned_to_the_byte():
    weight, stats = make_layer()
    spec = QuantSpec(method="int8", outlier_features=3)
    section = pack(int8_quantize(weight, stats, spec).layer)
    assert planned_encoding(spec, weight.shape).section_bytes(weight.shape) == len(section)


def test_outlier_features_are_what_it_is_good_for():
    """Three inputs fire a hundred times as strongly: what their weights lose is what the layer's output loses."""
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(32, 96, generator=generator), torch.randn(400, 96, generator=generator)
    x[:, [4, 50, 77]] *= 100
    stats = LayerStats(x.T @ x / 400, 400, x.abs().amax(0))
    rounded = rtn_quantize(weight, QuantSpec(method="rtn", bits=8, group_size=-1, symmetric=True))
    mixed = int8_quantize(weight, stats, QuantSpec(method="int8", activation_threshold=30))
    assert mixed.layer.columns.tolist() == [4, 50, 77]
    assert mixed.relative_error < 0.02 * output_error(weight, rounded.decoded, stats.hessian)
