"""The statistics of a layer's inputs, and which linears of a block share them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibration import hessian
from calibration.capture import HessianCapture
from calibration.errors import CalibrationError
from calibration.hessian import HessianAccumulator

WIDTH = 8


def accumulate(batches, in_features):
    accumulator = HessianAccumulator(in_features)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


def mean_outer_product(x):
    """xᵀx / n in float64."""
    flat = x.reshape(-1, x.shape[-1]).double()
    return flat.T @ flat / len(flat)


def random_inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one Hessian


def test_hessian_by_hand():
    stats = accumulate([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], 2)
    assert stats.hessian.tolist() == [[5.0, 1.0], [1.0, 2.0]]
    assert stats.n_tokens == 2
    assert stats.absmax.tolist() == [3.0, 2.0]


def test_the_largest_magnitude_is_that_of_either_sign_over_all_batches():
    batches = [torch.tensor([[1.0, -5.0]]), torch.empty(0, 2), torch.tensor([[[-2.0, 4.0]], [[0.5, 0.0]]])]
    assert accumulate(batches, 2).absmax.tolist() == [2.0, 5.0]
    assert accumulate([], 2).absmax.tolist() == [0.0, 0.0]


def test_tokens_that_are_dropped_do_not_count_for_the_largest_magnitude():
    stats = accumulate([torch.tensor([[1.0, 2.0], [float("inf"), 3.0], [float("nan"), 9.0]])], 2)
    assert stats.absmax.tolist() == [1.0, 2.0]
    assert stats.n_dropped == 2


@pytest.mark.parametrize("in_features", [1, 7, 255, 256, 257, 600])  # edges of a stripe
def test_hessian_equals_float64(in_features):
    x = random_inputs(3, 50, in_features)
    stats = accumulate([x], in_features)
    torch.testing.assert_close(stats.hessian.double(), mean_outer_product(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert (stats.hessian.dtype, stats.n_tokens) == (torch.float32, 150)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), stripe=st.integers(1, 20), width=st.integers(1, 24))
def test_hessian_does_not_depend_on_the_split_into_batches(cuts, stripe, width):
    """Small integers make every sum exact, so the comparison is, too. Batches may be empty."""
    x = torch.randint(-8, 9, (60, width), generator=torch.Generator().manual_seed(width)).float()
    edges = [0, *sorted(cuts), 60]
    batches = [x[a:b] for a, b in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian, "STRIPE", stripe)
        stats = accumulate(batches, width)
    assert stats.n_tokens == 60
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.equal(stats.hessian, (x.double().T @ x.double() / 60).float())


def test_half_precision_inputs_are_summed_in_float32():
    x = random_inputs(4096, 4).half()
    torch.testing.assert_close(accumulate([x], 4).hessian.double(), mean_outer_product(x), rtol=1e-5, atol=1e-5)


def test_inputs_keep_no_graph():
    x = random_inputs(5, 4).requires_grad_()
    assert not accumulate([x], 4).hessian.requires_grad


# ---- a block


class Block(nn.Module):
    """Llama's shape: q, k and v read one tensor, gate and up another, o and down their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.calls_after_down = 0

    def forward(self, x):
        normed = x / x.norm(dim=-1, keepdim=True)
        x = x + self.o(self.q(normed) * self.k(normed) + self.v(normed))
        normed = x / x.norm(dim=-1, keepdim=True)
        y = self.down(torch.relu(self.gate(normed)) * self.up(normed))
        self.calls_after_down += 1
        return x + y


USED = ("q", "k", "v", "o", "gate", "up", "down")


def linears_of(block, names=USED):
    return {name: getattr(block, name) for name in names}


def some_batches():
    return [random_inputs(b, 6, WIDTH, seed=seed) for seed, b in enumerate((2, 3, 1))]


def inputs_by_hand(block, batches, names=USED):
    """Every input that every linear is handed."""
    seen = {name: [] for name in names}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in linears_of(block, names).items()
    ]
    with torch.no_grad():
        for batch in batches:
            block(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def test_capture_equals_hooks_on_each_linear():
    block, batches = Block(), some_batches()
    with torch.no_grad():
        stats = HessianCapture(linears_of(block)).run(block, batches)
    assert list(stats) == list(USED)
    for name, x in inputs_by_hand(block, batches).items():
        torch.testing.assert_close(stats[name].hessian.double(), mean_outer_product(x), rtol=1e-5, atol=1e-6)
        assert stats[name].n_tokens == 36


def test_linears_of_one_input_share_one_hessian():
    block = Block()
    with torch.no_grad():
        stats = HessianCapture(linears_of(block)).run(block, some_batches())
    assert stats["q"] is stats["k"] is stats["v"]
    assert stats["gate"] is stats["up"]
    assert len({id(stats[name]) for name in ("q", "o", "gate", "down")}) == 4


def test_equal_values_in_two_tensors_are_not_shared():
    """Only the very same tensor is; a copy may differ in the next batch."""

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
            self.scale = 1.0

        def forward(self, x):
            y = self.a(x) + self.b(x * self.scale)
            self.scale = 2.0
            return y

    block, batches = Copies(), some_batches()
    with torch.no_grad():
        stats = HessianCapture({"a": block.a, "b": block.b}).run(block, batches)
    assert stats["a"] is not stats["b"]
    x = torch.cat([batches[0].reshape(-1, WIDTH), *(2 * batch.reshape(-1, WIDTH) for batch in batches[1:])])
    torch.testing.assert_close(stats["b"].hessian.double(), mean_outer_product(x), rtol=1e-5, atol=1e-6)


def test_the_forward_stops_once_every_input_was_seen():
    """After the first batch, which shows what the last linear is; the results are those of full runs."""
    block, batches = Block(), some_batches()
    with torch.no_grad():
        stats = HessianCapture(linears_of(block)).run(block, batches)
        assert block.calls_after_down == 1
        alone = [HessianCapture(linears_of(block)).run(block, [batch]) for batch in batches]
    assert block.calls_after_down == 4
    for name in USED:
        full = sum(part[name].hessian * part[name].n_tokens for part in alone) / 36
        torch.testing.assert_close(stats[name].hessian, full, rtol=1e-5, atol=1e-6)


def test_outputs_are_the_block_s_and_the_statistics_those_of_a_run():
    block, batches = Block(), some_batches()
    with torch.no_grad():
        expected = HessianCapture(linears_of(block)).run(block, batches)
        capture = HessianCapture(linears_of(block))
        outputs = list(capture.outputs(block, batches))
        for output, batch in zip(outputs, batches, strict=True):
            assert torch.equal(output, block(batch))
    stats = capture.results()
    assert list(stats) == list(USED)
    for name in USED:
        assert torch.equal(stats[name].hessian, expected[name].hessian)
    assert stats["q"] is stats["k"] is stats["v"]


def test_linear_that_sees_no_token_is_left_out():
    block = Block()
    names = (*USED, "unused")
    with torch.no_grad():
        stats = HessianCapture(linears_of(block, names)).run(block, some_batches())
    assert list(stats) == list(USED)
    assert block.calls_after_down == 3  # a linear that may yet be called: no early stop


def test_experts_that_come_and_go():
    """The first batch calls one expert, the others both; nothing is cut off and nothing is mixed up."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

        def forward(self, x):
            right = x[..., 0] > 0 if len(x) > 2 else torch.zeros(x.shape[:-1], dtype=torch.bool)
            self.first(x[~right])
            if right.any():
                self.second(x[right])

    block, batches = Experts(), some_batches()
    with torch.no_grad():
        stats = HessianCapture({"first": block.first, "second": block.second}).run(block, batches)
    x = batches[1][batches[1][..., 0] > 0]
    assert (stats["first"].n_tokens, stats["second"].n_tokens) == (36 - len(x), len(x))
    torch.testing.assert_close(stats["second"].hessian.double(), mean_outer_product(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_activation_that_is_not_finite_names_the_layer(value):
    block, batches = Block(), some_batches()
    hook = block.down.register_forward_pre_hook(lambda _, args: args[0].fill_(value), prepend=True)
    with torch.no_grad(), pytest.raises(CalibrationError, match=r"^down: (\d+) of \1 tokens reach this layer with NaN"):
        HessianCapture(linears_of(block)).run(block, batches)
    hook.remove()


def test_hooks_are_gone_afterwards():
    block = Block()

    def fail(_):
        raise RuntimeError

    with torch.no_grad():
        HessianCapture(linears_of(block)).run(block, some_batches())
        with pytest.raises(RuntimeError):
            HessianCapture(linears_of(block)).run(fail, some_batches())
    assert not any(module._forward_pre_hooks for module in block.modules())
