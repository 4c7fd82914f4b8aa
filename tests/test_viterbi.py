"""The trellis: its search against every code there is, the compiled kernel against python, and what it is good for."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from correlated import make_layer
from hypothesis import given
from hypothesis import strategies as st

from formats.encoding.trellis import RUN_ROWS
from formats.layer import group_index
from formats.trellis import SUBSETS, subsets
from qtool.factor import factorize
from qtool.gptq import _round_columns, gptq_quantize
from qtool.recipe import QuantSpec
from qtool.sizes import MAX_RUN, run_length
from qtool.statistics import FP16_TINY
from qtool.trellis import TrellisGrid, _extend, _extend_compiled, _round_block, fit_trellis, gaussian_levels

LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497}
"""The least mean squared error of a scalar quantizer on a normal distribution, by bits (Max, 1960)."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_grid(levels: torch.Tensor, bits: int, memory: int, run: int, rows: int) -> TrellisGrid:
    """One group, its scale 1."""
    return TrellisGrid(torch.ones(1, rows), levels, bits, memory, run)


def decode_path(codes: np.ndarray, levels: np.ndarray, memory: int, run: int) -> np.ndarray:
    """codes [rows, in], as SPEC 7.14 has them, on scale 1."""
    return levels[subsets(codes & np.uint8(1), memory, run) + 4 * (codes >> 1)]


# ---- the search


@pytest.mark.parametrize(("bits", "memory"), [(1, 2), (2, 2), (1, 3)])
def test_the_path_is_the_best_of_all_code_sequences(bits, memory):
    """Integers, so that every sum is exact and the costs must be the same number."""
    n_rows, generator = 5, np.random.default_rng(bits + memory)
    sequences = np.array(list(itertools.product(range(1 << bits), repeat=n_rows)), np.uint8).T  # [5, all]
    for _ in range(30):
        levels = generator.integers(-12, 13, 2 << bits).astype(np.float32)
        weight = generator.integers(-15, 16, n_rows).astype(np.float32)
        best = np.square(decode_path(sequences, levels, memory, 32) - weight[:, None]).sum(0).min()
        grid = unit_grid(torch.from_numpy(levels), bits, memory, 32, n_rows)
        codes, decoded = grid.quantize(torch.from_numpy(weight), 0)
        assert np.array_equal(decode_path(codes.numpy().astype(np.uint8)[:, None], levels, memory, 32)[:, 0], decoded)
        assert float((decoded - torch.from_numpy(weight)).square().sum()) == best


def test_a_sequence_that_the_trellis_holds_is_found():
    generator = np.random.default_rng(0)
    levels = np.arange(16, dtype=np.float32) - 7.5
    codes = generator.integers(0, 8, (200, 3)).astype(np.uint8)
    weight = torch.from_numpy(decode_path(codes, levels, 5, 64))
    found, decoded = unit_grid(torch.from_numpy(levels), 3, 5, 64, 200).quantize(weight.T, torch.zeros(3).long())
    assert np.array_equal(found.numpy().T, codes)
    assert torch.equal(decoded.T, weight)


def block_arguments(memory: int, bits: int, columns: int, rows: int, run: int) -> list:
    """What `_round_block` takes, of a block whose columns affect each other."""
    shares = torch.eye(columns) + 0.3 * torch.ones(columns, columns).triu(1)
    shape = (columns, rows)
    return [
        normal(*shape).numpy(),
        normal(*shape, seed=3).numpy(),
        shares.numpy(),
        np.full(columns, 1.5, np.float32),
        (normal(*shape, seed=1).abs() + 0.5).numpy(),
        np.ascontiguousarray(normal(2 << bits, seed=2).numpy().reshape(-1, 4).T),
        SUBSETS[memory][: 1 << memory],
        run,
        np.empty(shape, np.uint8),
        np.empty(shape, np.float32),
    ]


@pytest.mark.parametrize(("memory", "bits", "run"), [(2, 1, 32), (3, 3, 32), (6, 2, 64)])
def test_the_compiled_kernel_is_its_python(memory, bits, run):
    from qtool.trellis import _round_block_compiled

    plain, compiled = (block_arguments(memory, bits, 3, 40, run) for _ in range(2))
    _round_block(*plain)
    _round_block_compiled(*compiled)
    for one, other in zip(plain, compiled, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("memory", sorted(SUBSETS))
def test_each_state_is_entered_by_the_cheaper_of_two_ways(memory):
    """Against every window of path bits taken one by one; small integers, so that there are ties and no rounding."""
    n_states = 1 << memory
    generator = np.random.default_rng(memory)
    cost = generator.integers(0, 4, n_states).astype(np.float32)
    error = generator.integers(0, 4, 4).astype(np.float32)
    subset = SUBSETS[memory][:n_states:2]
    arguments = cost, (subset & 1).astype(np.float32), (subset >> 1).astype(np.float32), error
    wanted = np.full(n_states, np.inf, np.float32)
    for window, of_window in enumerate(SUBSETS[memory]):  # its oldest bit leaves the state, its newest comes in
        state = window % n_states
        wanted[state] = min(wanted[state], cost[window >> 1] + error[of_window])
    for extend in (_extend, _extend_compiled):
        found = np.empty_like(cost)
        extend(arguments[0], found, *arguments[1:])
        assert np.array_equal(found, wanted)


def test_runs_do_not_touch_each_other():
    weight = normal(4, 150)
    grid = fit_trellis(weight.T.contiguous(), QuantSpec(format="trellis", group_size=8, bits=2, memory=4))
    grid = dataclasses.replace(grid, run=64)
    groups = torch.zeros(4).long()
    codes, decoded = grid.quantize(weight, groups)
    for first in (0, 64, 128):
        rows = slice(first, min(first + 64, 150))
        alone, values = grid.rows(rows).quantize(weight[:, rows], groups)
        assert torch.equal(alone, codes[:, rows])
        assert torch.equal(values, decoded[:, rows])


def test_one_column_is_quantized_as_among_others():
    weight = normal(3, 70)
    grid = unit_grid(gaussian_levels(2, 3), 2, 3, 96, 70)
    codes, decoded = grid.quantize(weight, torch.zeros(3).long())
    alone = grid.quantize(weight[1], 0)
    assert torch.equal(alone[0], codes[1]) and torch.equal(alone[1], decoded[1])


# ---- in GPTQ's loop


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_the_block_size_changes_speed_only(block_size):
    """The sums are rounded in another order, which on this layer moves no code."""
    weight, stats = make_layer(64, 40)
    spec = QuantSpec(format="trellis", bits=3, group_size=16, memory=4, input_scales=False)
    factor = factorize(stats, [weight], spec, "layer")
    grid, groups = fit_trellis(weight, spec), torch.from_numpy(group_index(40, 16))
    whole = _round_columns(weight, factor, grid, groups, block_size=1000)
    blocked = _round_columns(weight, factor, grid, groups, block_size=block_size)
    assert torch.equal(blocked.codes, whole.codes)
    assert torch.equal(blocked.decoded, whole.decoded)


def test_stripes_of_rows_are_whole_runs(monkeypatch):
    weight, stats = make_layer(300, 40)
    spec = QuantSpec(format="trellis", bits=2, group_size=16, memory=3)
    factor = factorize(stats, [weight], spec, "layer")
    whole = gptq_quantize(weight, factor, spec)
    assert whole.layer.run == 160
    monkeypatch.setattr("qtool.gptq.MAX_ELEMENTS", 40 * 170)
    assert np.array_equal(gptq_quantize(weight, factor, spec).layer.codes, whole.layer.codes)


def test_rounding_to_nearest_widens_nothing():
    """No errors are taken up: the levels are the best for the spread as it is."""
    weight = normal(64, 96)
    spread = weight.square().mean(1).sqrt()[None]
    grid = fit_trellis(weight, QuantSpec(method="rtn", format="trellis", bits=5, group_size=-1, memory=3))
    torch.testing.assert_close(grid.scales, spread, rtol=1e-3, atol=0)


@pytest.mark.parametrize("stat_bits", [0, 8])
def test_scales_are_wider_than_the_spread_of_the_weights(stat_bits):
    """By WIDENING, where no weight is beyond the TAIL; what is stored is what is used."""
    weight = normal(64, 96)
    spec = QuantSpec(format="trellis", bits=3, group_size=32, memory=3, stat_bits=stat_bits)
    grid = fit_trellis(weight, spec)
    spread = weight.view(64, 3, 32).square().mean(2).sqrt().T
    torch.testing.assert_close(grid.scales, 1.1 * spread, rtol=0.02 if stat_bits else 1e-3, atol=0)
    stored = grid.layer(np.zeros((64, 96), np.uint8), 32, None, None).scales
    assert np.array_equal(stored.values() if stat_bits else stored.astype(np.float32), grid.scales.numpy().T)


def test_it_loses_less_than_a_grid_of_the_same_bytes():
    """About 2 dB of the output's error."""
    weight, stats = make_layer(128, 128, seed=1)
    errors = []
    for spec in (QuantSpec(format="trellis", bits=3, memory=6), QuantSpec(format="int", bits=3, symmetric=True)):
        errors.append(gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec).relative_error)
    assert errors[0] < 0.75 * errors[1]


# ---- on a normal distribution


def mean_squared_error(bits: int, memory: int) -> float:
    weight = normal(64, MAX_RUN, seed=7)
    grid = unit_grid(gaussian_levels(bits, memory), bits, memory, MAX_RUN, MAX_RUN)
    _, decoded = grid.quantize(weight, torch.zeros(64).long())
    return float((weight - decoded).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_the_best_scalar_quantizer_by_a_decibel(bits):
    """The limit of all codes, of whatever length, is 4**-bits."""
    error = mean_squared_error(bits, 8)
    assert 4.0**-bits < error < LLOYD_MAX[bits] / 10**0.1


def test_more_memory_never_hurts():
    errors = [mean_squared_error(2, memory) for memory in range(2, 10)]
    for less, more in itertools.pairwise(errors):
        assert more < 1.005 * less
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [1, 3])
def test_levels_of_the_normal_distribution_rise_and_mirror_each_other(bits):
    levels = gaussian_levels(bits, 4)
    assert len(levels) == 2 << bits
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels, levels.half().float())


# ---- the grid


def test_scales_are_root_mean_squares_widened():
    weight = torch.tensor([[3.0, 4.0, 1.0], [0.0, 0.0, -2.0]])
    grid = fit_trellis(weight, QuantSpec(format="trellis", group_size=-1))
    wanted = [1.15 * (26 / 3) ** 0.5, 1.15 * (4 / 3) ** 0.5]
    assert grid.scales.flatten().tolist() == pytest.approx(wanted, rel=2.0**-11)
    grouped = dataclasses.replace(QuantSpec(format="trellis"), group_size=8)
    assert fit_trellis(torch.ones(2, 20), grouped).scales.tolist() == [[1.150390625] * 2] * 3
    assert fit_trellis(torch.zeros(2, 20), grouped).scales.unique().tolist() == [FP16_TINY]


def test_input_scales_are_divided_out():
    weight, factors = normal(6, 16), torch.linspace(0.5, 2, 16).half().float()
    spec = QuantSpec(format="trellis", group_size=8)
    assert torch.equal(
        fit_trellis(weight * factors, spec, input_scales=factors).scales, fit_trellis(weight, spec).scales
    )


@pytest.mark.parametrize(
    ("rows", "want"), [(1, 32), (32, 32), (33, 64), (100, 128), (256, 256), (257, 160), (576, 192), (1536, 256)]
)
def test_the_length_of_a_run_by_hand(rows, want):
    """257 rows take two runs, of 129 rows rounded up to whole words; 576 take three of 192."""
    assert run_length(rows) == want


@given(st.integers(1, 100_000))
def test_runs_are_few_and_alike(rows):
    run = run_length(rows)
    assert run % RUN_ROWS == 0 and RUN_ROWS <= run <= MAX_RUN
    n_runs = -(-rows // run)
    assert n_runs <= -(-rows // MAX_RUN)
    assert run - RUN_ROWS < -(-rows // n_runs)  # no longer than what that number of runs takes
