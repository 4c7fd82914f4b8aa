"""Ternary weights: QMoE's grid and the one that loses less, rounded and solved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error
from invoke import qtool_json, refusal, run_qtool

from formats.layer import TernaryLinear
from qtool.factor import factorize
from qtool.fit import fit_grid
from qtool.gptq import gptq_quantize, rtn_quantize
from qtool.recipe import QuantSpec
from qtool.ternary import TernaryGrid, share_of_zeros

MINMAX = QuantSpec(
    format="ternary", bits=2, group_size=-1, percdamp=0.1, act_order=False, scale_search=False, input_scales=False
)
MSE = QuantSpec(format="ternary", bits=2, group_size=-1, percdamp=0.1, act_order=False, input_scales=False)
ROUNDED = QuantSpec(method="rtn", format="ternary", bits=2, group_size=-1)


def test_known_answers_by_hand():
    """{row min, 0, row max}, split in the middle; a row without negatives has no low value but 0."""
    weight = torch.tensor([[-2.0, -1.0, -1.25, 0.5, 1.0, 0.75], [1.0, 3.0, 1.5, 2.0, 0.0, 1.75]])
    solution = rtn_quantize(weight, ROUNDED)
    layer = solution.layer
    assert isinstance(layer, TernaryLinear)
    assert layer.scales.tolist() == [[-2.0, 1.0], [0.0, 3.0]]
    assert layer.codes.tolist() == [[-1, 0, -1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]
    assert solution.decoded.tolist() == [[-2.0, 0, -2.0, 0, 1.0, 1.0], [0, 3.0, 0, 3.0, 0, 3.0]]
    np.testing.assert_array_equal(layer.dequantize(), solution.decoded.numpy())
    assert share_of_zeros(layer) == 5 / 12


@pytest.mark.parametrize(("n", "zeros"), [(768, 0.882), (4096, 0.926), (14336, 0.949)])
def test_zeros_of_normal_rows_are_as_published(n, zeros):
    """What the range of so many normal values leaves: QMoE's sparsity is the grid's."""
    weight = torch.randn(200, n, generator=torch.Generator().manual_seed(0))
    assert share_of_zeros(rtn_quantize(weight, ROUNDED).layer) == pytest.approx(zeros, abs=0.005)


def test_the_search_finds_the_values_that_lose_least():
    """Of normal weights: levels at 1.22 standard deviations, 46% zeros, an error of 0.19 of their energy."""
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, MSE, hessian=torch.eye(2048))
    codes, decoded = grid.quantize(weight.T, torch.zeros(2048, dtype=torch.long))
    assert (codes == 1).float().mean().item() == pytest.approx(0.46, abs=0.03)
    error = (weight - decoded.T).square().mean().item()
    assert error == pytest.approx(0.19, abs=0.01)
    rounded = rtn_quantize(weight, ROUNDED).decoded
    assert (weight - rounded).square().mean().item() > 3 * error


@pytest.mark.parametrize("seed", range(3))
def test_the_solver_loses_less_than_rounding(seed):
    weight, stats = make_layer(32, 96, seed)
    errors = {}
    for name, spec in (("minmax", MINMAX), ("mse", MSE)):
        solution = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
        errors[name] = output_error(weight, solution.decoded, stats.hessian)
        np.testing.assert_array_equal(solution.layer.dequantize(), solution.decoded.numpy())
    rounded = output_error(weight, rtn_quantize(weight, ROUNDED).decoded, stats.hessian)
    assert errors["mse"] < errors["minmax"] < 0.8 * rounded


def test_rows_of_zeros_and_of_one_value():
    weight = torch.zeros(3, 20)
    weight[1], weight[2, 4] = -1.5, 7.0
    solution = rtn_quantize(weight, ROUNDED)
    assert torch.equal(solution.decoded, weight)
    assert solution.relative_error == 0


def test_a_wide_layer_takes_less_than_a_bit_all_counted():
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    layer = rtn_quantize(weight, ROUNDED).layer
    assert 8 * layer.encoding.section_bytes(layer.shape) / weight.numel() < 0.6  # entropy 0.45 at 92.6 % zeros


@pytest.mark.parametrize(("shape", "coding"), [((8, 64), "ternary_dict"), ((256, 2048), "ternary_rans")])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_smaller_coding_is_taken(shape, coding, zeros):
    """For a few values a table of frequencies is too much; whatever a sample foretells, the other is never smaller."""
    generator = np.random.default_rng(0)
    codes = generator.choice(np.array([0, 1, 2], np.uint8), shape, p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    grid = TernaryGrid(-torch.ones(1, shape[0]), torch.ones(1, shape[0]))
    layer = grid.layer(codes, shape[1], None, None)
    other = dataclasses.replace(layer, coding=({"ternary_dict", "ternary_rans"} - {layer.coding}).pop())
    sizes = [made.encoding.section_bytes(shape) for made in (layer, other)]
    assert sizes == sorted(sizes)
    assert layer.coding == coding or zeros == 1.0


@pytest.mark.parametrize("options", [("--method", "ternary"), ("--bits", "0.8"), ("--expert-format", "ternary")])
def test_experts_become_ternary_and_nothing_else(tiny_files, options):
    file = tiny_files.compressed("mixtral", *options)
    found = qtool_json("inspect", file, "--experts")
    kinds = {
        ".experts." in row["name"]: row["encoding"] for row in found["tensors"] if row["name"].endswith("proj.weight")
    }
    assert kinds[False] == "uniform" and kinds[True].startswith("ternary_")
    assert all(0 < row["zeros"] < 1 for row in found["experts"])
    assert file.read_bytes() == tiny_files.compressed("mixtral", "--method", "ternary").read_bytes()


def test_experts_that_are_not_ternary_are_listed_beside_those_that_are(tiny_files):
    file = tiny_files.compressed("mixtral", "--method", "ternary", "--layer", "experts[.]0[.]=4")
    zeros = {row["expert"]: row["zeros"] for row in qtool_json("inspect", file, "--experts")["experts"]}
    assert zeros[0] is None and all(0 < zeros[n] < 1 for n in (1, 2, 3))


def test_all_linears_become_ternary_if_asked(tiny_files):
    found = qtool_json("inspect", tiny_files.compressed("llama", "--format", "ternary", "--group-size", "-1"))
    linears = [row for row in found["tensors"] if row["name"].endswith("proj.weight")]
    assert all(row["encoding"].startswith("ternary_") for row in linears)


def test_too_few_zeros_are_told_with_what_they_cost(tiny_files, tmp_path):
    result = run_qtool(
        "compress", tiny_files.model("mixtral"), "-o", tmp_path / "out.qtm",
        *tiny_files.compress_options("--method", "rtn", "--expert-format", "ternary"),
    )  # fmt: skip
    [line] = [line for line in result.stderr.splitlines() if "zeros" in line]
    assert line.startswith("24 of 24 ternary layers have fewer than 80% zeros (7")
    assert line.endswith("bits a weight, not less than one; --bits 2 --group-size -1 would take 2.0, and lose less")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", ("--method", "ternary"),
         "--expert-format: the model has no experts that can be taken apart; --format is for all linears"),
        ("mixtral", ("--method", "ternary", "--ignore", "experts"),
         "--expert-format: --layer and --ignore leave it no expert; take one of them back"),
        ("llama", ("--bits", "nan"),
         "--bits nan: must be whole, or below 1 for ternary experts; --target-bits mixes widths"),
        ("mixtral", ("--method", "rtn", "--expert-format", "ternary", "--ternary-grid", "mse"),
         "--ternary-grid mse: is searched by the Hessian, --method rtn has none; leave it out"),
        ("llama", ("--bits", "3.5"),
         "--bits 3.5: must be whole, or below 1 for ternary experts; --target-bits mixes widths"),
        ("llama", ("--ternary-grid", "mse"), "--ternary-grid mse: is for ternary weights; give --method ternary"),
        ("mixtral", ("--method", "ternary", "--ternary-grid", "best"),
         "ternary_grid='best': must be one of minmax, mse"),
        ("mixtral", ("--expert-format", "int"), "expert_format='int': must be one of ternary"),
        ("mixtral", ("--method", "int8", "--group-size", "-1", "--expert-format", "ternary"),
         "--method int8: ternary weights are found by gptq or rtn"),
        ("llama", ("--format", "ternary"), "group_size=16: ternary has its values by row; leave it out"),
        ("llama", ("--format", "ternary", "--group-size", "-1", "--outliers", "1%"),
         "ternary: has two values a row in 16 bits and no outliers; leave those options out"),
        ("llama", ("--format", "ternary", "--group-size", "-1", "--no-scale-search"),
         "--no-scale-search: ternary has --ternary-grid mse for it"),
        ("llama", ("--format", "ternary", "--group-size", "-1", "--sym"),
         "--sym: ternary has no zeros to choose; leave it out"),
        ("llama", ("--format", "ternary", "--group-size", "-1", "--effort", "best"),
         "--effort best: ternary is solved in one way; leave it out"),
        ("mixtral", ("--expert-format", "ternary", "--target-bits", "3"),
         "target: chooses bits; ternary has none to choose from; give one of the two"),
    ],
)  # fmt: skip
def test_refusals(tiny_files, tmp_path, family, options, message):
    command = ("compress", tiny_files.model(family), "-o", tmp_path / "o.qtm", *tiny_files.compress_options(*options))
    assert refusal(*command) == message
