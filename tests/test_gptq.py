"""GPTQ against an obvious float64 version that updates the inverse Hessian, and against its own theorems."""

import dataclasses

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error, stats_of

from formats.layer import dequantize, group_index
from qtool import gptq
from qtool.errors import QuantizeError
from qtool.factor import factorize, fit_input_scales
from qtool.gptq import _round_columns, gptq_quantize, rtn_quantize
from qtool.grid import UniformGrid, fit_uniform
from qtool.recipe import QuantSpec

PLAIN = QuantSpec(bits=3, group_size=16, act_order=False, scale_search=False, input_scales=False)


def solve_slowly(
    weight: torch.Tensor, hessian: torch.Tensor, grid: UniformGrid, group_size: int, bits: int
) -> torch.Tensor:
    """GPTQ as the paper derives it (eq. 2 and 3), column by column: the inverse is updated after every one."""
    free, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty_like(free)
    for j in range(weight.shape[1]):
        group = j // group_size
        codes[:, j] = torch.clamp(torch.round(free[:, j] / grid.scales[group]) + grid.zeros[group], 0, 2**bits - 1)
        error = (free[:, j] - grid.scales[group] * (codes[:, j] - grid.zeros[group])) / inverse[j, j]
        free -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_equal_those_of_the_papers_algorithm(bits):
    weight, stats = make_layer()
    spec = dataclasses.replace(PLAIN, bits=bits)
    factor = factorize(stats, [weight], spec, "layer")
    grid = fit_uniform(weight, 16, bits, symmetric=False)
    slow = solve_slowly(weight, factor.damped, grid, 16, bits)
    assert np.array_equal(gptq_quantize(weight, factor, spec).layer.codes, slow.numpy().astype(np.uint8))


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
def test_the_block_size_changes_speed_only(block_size):
    """In float64, where no rounding of the sums can move a weight over the edge between two codes."""
    weight, stats = make_layer()
    factor = factorize(stats, [weight], PLAIN, "layer")
    factor = dataclasses.replace(factor, shares=factor.shares.double())
    grid = fit_uniform(weight, 16, 3, symmetric=False)
    grid = UniformGrid(grid.scales.double(), grid.zeros.double(), 3)
    groups = torch.from_numpy(group_index(40, 16))
    whole = _round_columns(weight.double(), factor, grid, groups, block_size=1000)
    blocked = _round_columns(weight.double(), factor, grid, groups, block_size=block_size)
    assert torch.equal(blocked.codes, whole.codes)
    assert torch.equal(blocked.decoded, whole.decoded)
    assert blocked.lost_energy == pytest.approx(whole.lost_energy, rel=1e-9)


def test_an_identity_hessian_gives_round_to_nearest():
    weight, _ = make_layer()
    stats = stats_of(torch.eye(40), 1)
    solved = gptq_quantize(weight, factorize(stats, [weight], PLAIN, "layer"), PLAIN)
    assert np.array_equal(solved.layer.codes, rtn_quantize(weight, PLAIN).layer.codes)


def test_every_step_lowers_the_output_error_on_this_layer():
    """An observation on one correlated Hessian, not a theorem."""
    weight, stats = make_layer(rows=64, columns=96)
    ladder = [
        dataclasses.replace(PLAIN, **options)
        for options in (
            {},
            {"act_order": True},
            {"act_order": True, "scale_search": True, "input_scales": True},
        )
    ]
    rtn = output_error(weight, rtn_quantize(weight, PLAIN).decoded, stats.hessian)
    errors = [rtn] + [
        output_error(weight, gptq_quantize(weight, factorize(stats, [weight], s, "l"), s).decoded, stats.hessian)
        for s in ladder
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("input_scales", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_decoded_is_what_the_file_decodes_to(symmetric, input_scales):
    weight, stats = make_layer()
    spec = QuantSpec(bits=4, group_size=16, symmetric=symmetric, input_scales=input_scales)
    solved = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
    assert np.array_equal(dequantize(solved.layer), solved.decoded.numpy())
    assert solved.layer.symmetric == symmetric
    assert 0 < solved.relative_error < 0.05


@pytest.mark.parametrize("rows_together", [5, 1000])
@pytest.mark.parametrize("percdamp", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("input_scales", [False, True])
def test_spec_5_5_the_error_recorded_is_that_of_the_undamped_hessian(
    monkeypatch, input_scales, percdamp, rows_together
):
    monkeypatch.setattr(gptq, "MAX_ELEMENTS", rows_together * 40)
    weight, stats = make_layer()
    stats.hessian[4] = stats.hessian[:, 4] = 0  # an input that never fires costs nothing
    spec = QuantSpec(bits=3, group_size=16, input_scales=input_scales, percdamp=percdamp)
    solved = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
    assert solved.relative_error == pytest.approx(output_error(weight, solved.decoded, stats.hessian), rel=1e-3)


def test_act_order_rounds_the_most_active_input_first():
    _, stats = make_layer()
    spec = dataclasses.replace(PLAIN, act_order=True)
    factor = factorize(stats, [make_layer()[0]], spec, "layer")
    assert factor.perm[0] == stats.hessian.diagonal().argmax()
    assert sorted(factor.perm.tolist()) == list(range(40))


def test_rows_do_not_depend_on_each_other():
    weight, stats = make_layer()
    spec = QuantSpec(bits=3, group_size=16)
    factor = factorize(stats, [weight], spec, "layer")
    half = gptq_quantize(weight[:7], factor, spec)
    assert np.array_equal(gptq_quantize(weight, factor, spec).layer.codes[:7], half.layer.codes)


def test_input_scales_undo_a_rescaling_of_the_inputs():
    """Inputs times f and columns divided by f is the same layer; the scales take f out again."""
    weight, stats = make_layer()
    f = torch.exp(torch.randn(40, generator=torch.Generator().manual_seed(3)))
    before = fit_input_scales([weight], stats.hessian.diagonal())
    after = fit_input_scales([weight / f], stats.hessian.diagonal() * f * f)
    ratio = after * f / before
    assert ((ratio / ratio.mean() - 1).abs() < 2.0**-9).all()  # two roundings to fp16


def test_input_scales_are_fp16_and_centred():
    weight, stats = make_layer()
    scales = fit_input_scales([weight, weight[:5]], stats.hessian.diagonal())
    assert torch.equal(scales, scales.half().float())
    assert scales.log().mean().exp().item() == pytest.approx(1, rel=1e-2)


def test_an_input_that_never_fires_is_rounded_to_nearest():
    weight, stats = make_layer()
    hessian = stats.hessian.clone()
    hessian[5] = hessian[:, 5] = 0
    dead = stats_of(hessian, 500)
    solved = gptq_quantize(weight, factorize(dead, [weight], PLAIN, "layer"), PLAIN)
    assert np.array_equal(solved.layer.codes[:, 5], rtn_quantize(weight, PLAIN).layer.codes[:, 5])


def test_an_all_zero_input_and_column_have_harmless_scales():
    weight, stats = make_layer()
    weight[:, 3] = 0
    hessian = stats.hessian.clone()
    hessian[7] = hessian[:, 7] = 0
    spec = QuantSpec(bits=4, group_size=16)
    solved = gptq_quantize(weight, factorize(stats_of(hessian, 500), [weight], spec, "layer"), spec)
    assert torch.isfinite(solved.decoded).all()
    assert solved.decoded[:, 3].abs().max() == 0
    assert (solved.decoded[:, 7] - weight[:, 7]).abs().max() < 1


def test_a_singular_hessian_is_damped_harder_and_says_how_much():
    """An indefinite matrix stands for one that rounding broke: the first damping is not enough."""
    weight, _ = make_layer(columns=32)
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = factorize(stats_of(hessian, 10), [weight], PLAIN, "layer")
    assert factor.percdamp == pytest.approx(0.1)


def test_a_hopeless_hessian_names_the_layer_and_the_fix():
    hessian = -torch.eye(32) + 2 * torch.diag(torch.arange(32) % 2)
    message = "model.layers.3.mlp.up_proj.weight: Hessian not positive definite even with percdamp=100 and 10 tokens; "
    with pytest.raises(QuantizeError, match=message + "use more calibration tokens"):
        factorize(stats_of(hessian, 10), [torch.ones(2, 32)], PLAIN, "model.layers.3.mlp.up_proj.weight")


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_the_weight_stays_as_it_was(rows, outliers):
    """Also one that lies as the solver wants it, and so needs no rearranging: a transposed one, or a single row."""
    weight, stats = make_layer(rows)
    spec = QuantSpec(group_size=16, act_order=False, input_scales=False, outliers=outliers)
    apart = weight.T.contiguous().T
    before = apart.clone()
    solved = gptq_quantize(apart, factorize(stats, [apart], spec, "layer"), spec)
    assert torch.equal(apart, before)
    again = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
    assert np.array_equal(solved.layer.codes, again.layer.codes)
    assert torch.equal(solved.decoded, again.decoded)
