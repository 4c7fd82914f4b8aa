"""Grids of levels: NF4 against QLoRA's procedure, the search of the nearest level, and levels fitted to a layer."""

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.layer import dequantize
from formats.layer.codebook import level_table
from qtool.codebook import Levels, choose_levels, fit_codebook, fit_levels
from qtool.factor import factorize
from qtool.gptq import gptq_quantize, rtn_quantize
from qtool.recipe import QuantSpec


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(name: str) -> Levels:
    return Levels.of(name, torch.from_numpy(level_table(name).copy()))


# ---- the nearest level


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_nearest_level_is_that_of_a_brute_force_search(name):
    units = 1.2 * normal(5000).clamp(-1, 1)
    codes, found = table(name).quantize(units)
    distances = (units[:, None].double() - torch.from_numpy(level_table(name).copy()).double()).abs()
    assert torch.equal((units.double() - found.double()).abs(), distances.amin(1))
    assert torch.equal(found, torch.from_numpy(level_table(name)[codes.long().numpy()]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=16), st.lists(st.integers(-50, 50), min_size=1, max_size=30))
def test_levels_may_stand_in_any_order_and_twice(levels, units):
    values, wanted = torch.tensor(levels) / 4, torch.tensor(units) / 8
    codes, found = Levels.of("fitted", values).quantize(wanted)
    assert torch.equal(found, values[codes.long()])
    assert torch.equal((wanted - found).abs(), (wanted[:, None] - values).abs().amin(1))


def test_fp4_by_hand():
    """Scale 12: levels of 0, 1/16, 2, 3, 4, 6, 8, 12. Of the two zeros the first one is written."""
    weight = torch.tensor([[12.0, 0.0, -5.5, 2.4, 0.06, -12.0]])
    solved = rtn_quantize(weight, QuantSpec(method="rtn", format="fp4", group_size=8))
    assert solved.decoded[0].tolist() == pytest.approx([12, 0, -6, 2, 1 / 16, -12])
    assert solved.layer.codes[0].tolist() == [3, 0, 13, 6, 1, 11]


# ---- NF4


def qlora_slowly(weight: np.ndarray) -> np.ndarray:
    """Blocks of 64 weights; each is divided by its largest magnitude, which fp16 stores; the nearest of the levels."""
    levels = level_table("nf4").astype(np.float64)
    decoded = np.empty_like(weight, np.float64)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 64):
            block = weight[row, first : first + 64].astype(np.float64)
            absmax = float(np.float16(np.abs(block).max()))
            nearest = np.abs(block[:, None] / absmax - levels[None]).argmin(1)
            decoded[row, first : first + 64] = absmax * levels[nearest]
    return decoded


@pytest.mark.parametrize("columns", [64, 256, 100])  # the last block may be short
def test_nf4_to_nearest_is_qloras_procedure(columns):
    weight = normal(16, columns, seed=columns)
    solved = rtn_quantize(weight, QuantSpec(method="rtn", format="nf4", group_size=64))
    assert solved.decoded.numpy() == pytest.approx(qlora_slowly(weight.numpy()), rel=1e-6)


def test_nf4_holds_zero_and_both_ends():
    weight = torch.tensor([[0.0, 2.0, -2.0, 1.0] * 2])
    solved = rtn_quantize(weight, QuantSpec(method="rtn", format="nf4", group_size=8))
    assert solved.layer.codes[0, :3].tolist() == [7, 15, 0]
    assert solved.decoded[0, :3].tolist() == [0.0, 2.0, -2.0]


def test_double_quantization_costs_little_error():
    weight = normal(64, 512)
    plain, twice = (
        rtn_quantize(weight, QuantSpec(method="rtn", format="nf4", group_size=64, double_quant=double))
        for double in (False, True)
    )
    assert twice.relative_error < 1.05 * plain.relative_error


def test_a_group_of_zeros_decodes_to_zeros():
    for name in ("nf4", "fp4", "fitted"):
        solved = rtn_quantize(torch.zeros(2, 16), QuantSpec(method="rtn", format=name, group_size=8))
        assert not dequantize(solved.layer).any()


@pytest.mark.parametrize("name", ["nf4", "fitted"])
def test_the_search_of_ranges_never_makes_the_weighted_error_larger(name):
    weight, x = normal(32, 64), normal(256, 64, seed=1) * torch.linspace(0.1, 5, 64)
    hessian = x.T @ x / 256
    spec = QuantSpec(format=name, group_size=64)
    levels = choose_levels(weight, spec, None, None)
    errors = []
    for metric in (None, hessian):
        _, decoded = fit_codebook(weight, spec, levels, hessian=metric).quantize(weight.T, torch.zeros(64).long())
        d = decoded.T - weight
        errors.append(((d @ hessian) * d).sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()


def test_nf4_and_plain_groups_of_128_lose_about_the_same():
    """QLoRA's format at 4.127 bits and the common 4-bit format of GPTQ at 4.16: neither is far behind."""
    weight, stats = make_layer(128, 256, seed=2)
    errors = []
    for spec in (QuantSpec(format="nf4", group_size=64, double_quant=True), QuantSpec(bits=4, group_size=128)):
        solved = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
        errors.append(output_error(weight, solved.decoded, stats.hessian))
    assert 0.7 < errors[0] / errors[1] < 1.3


# ---- fitted levels


def weighted_error(units: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor) -> float:
    nearest = (units[:, None] - levels).abs().amin(1).double()
    return float((importance * nearest.square()).sum())


def quantile_levels(units: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """The weighted quantiles in the middle of 2**bits equal parts, as fp16 holds them."""
    ordered, order = units.sort()
    share = importance[order].double().cumsum(0)
    wanted = (torch.arange(2**bits) + 0.5) / 2**bits
    return ordered[(share[None] / share[-1] < wanted[:, None]).sum(1).clamp(max=len(units) - 1)].half().float()


def test_two_point_masses_are_found_exactly():
    units = torch.tensor([-1.0] * 10 + [3.0] * 30)
    assert fit_levels(units, torch.ones(40), 1).tolist() == [-1.0, 3.0]
    assert set(fit_levels(units, torch.ones(40), 3).tolist()) == {-1.0, 3.0}


def test_a_uniform_distribution_gives_the_middles_of_equal_parts():
    units = torch.linspace(0, 1, 4001)
    assert fit_levels(units, torch.ones(4001), 2).tolist() == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=2e-3)


def test_the_normal_distribution_gives_lloyds_levels():
    """Max (1960), table I: for 4 levels ±0.4528 and ±1.510."""
    quantiles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    units = torch.special.ndtri(quantiles).float()
    assert fit_levels(units, torch.ones(20000), 2).tolist() == pytest.approx([-1.51, -0.4528, 0.4528, 1.51], abs=5e-3)


def test_what_matters_more_pulls_the_levels():
    """Masses at 0 and 1 in one level's reach: the weighted mean, 0.75; the third is apart."""
    units = torch.tensor([0.0, 1.0, 100.0])
    assert fit_levels(units, torch.tensor([1.0, 3.0, 4.0]), 1).tolist() == [0.75, 100.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(20, 300))
def test_lloyd_never_ends_behind_its_start(seed, bits, n):
    """No step of it can raise the error, but for the rounding of a level to fp16."""
    units, importance = normal(n, seed=seed), normal(n, seed=seed + 1).square() + 1e-3
    start = weighted_error(units, importance, quantile_levels(units, importance, bits))
    end = weighted_error(units, importance, fit_levels(units, importance, bits))
    assert end <= start * (1 + 1e-3) + 1e-6 * float(importance.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_levels_are_fp16_and_beat_equal_steps_and_nf4(bits):
    weight = normal(64, 512)
    fitted, equal = (
        rtn_quantize(weight, QuantSpec(method="rtn", format=name, bits=bits, group_size=64, symmetric=True))
        for name in ("fitted", "int")
    )
    assert fitted.layer.levels.dtype == np.float16
    assert fitted.relative_error < 0.9 * equal.relative_error
    if bits == 4:
        nf4 = rtn_quantize(weight, QuantSpec(method="rtn", format="nf4", group_size=64))
        assert fitted.relative_error < nf4.relative_error


def test_levels_are_fitted_where_errors_cost_something():
    """The second half of the inputs, all at one value, costs nothing: no level is spent on it."""
    weight = torch.cat([normal(64, 32), torch.full((64, 32), 0.01)], 1)
    weight[:, 32] = 10.0
    spec = QuantSpec(format="fitted", bits=2, group_size=32)
    cost = torch.cat([torch.ones(32), torch.full((32,), 1e-9)])
    alone = choose_levels(weight[:, :32], spec, None, None)
    assert choose_levels(weight, spec, None, cost).values.tolist() == pytest.approx(alone.values.tolist(), abs=1e-3)
    assert choose_levels(weight, spec, None, None).values.tolist() != pytest.approx(alone.values.tolist(), abs=1e-2)


def test_levels_of_a_large_layer_are_those_of_some_of_its_rows(monkeypatch):
    monkeypatch.setattr("qtool.codebook.FIT_SAMPLE", 8 * 64)
    weight, spec = normal(64, 64), QuantSpec(format="fitted", bits=3, group_size=64)
    assert torch.equal(
        choose_levels(weight, spec, None, None).values, choose_levels(weight[::8], spec, None, None).values
    )
