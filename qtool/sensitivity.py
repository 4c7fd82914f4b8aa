"""What an error in a weight costs, from gradients: the KL divergence of the model's predictions, to second order.

A changed weight ΔW costs ½ E ⟨G, ΔW⟩² nats, where G is the gradient, at the weight, of the log-likelihood of tokens
that the model itself draws in a window of text: the Fisher information. It is taken for a product of one factor for the
inputs and one for the outputs (as K-FAC does, arXiv 1503.05671): Σ_o outputs_o Δw_o A Δw_oᵀ with A = ½ E GᵀG. The sum
over a window's tokens stays inside of G, since errors add up where attention averages: on the reference model a value
projection costs two to four times what its tokens would one by one.

The gradients at the blocks' inputs and outputs come from one pass forward and one back, and are kept on disk; those of
its weights are made when a block's turn has come, since all of them would take as much space as the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qtool.gptq import output_energy
from qtool.journal import FORWARD, GRADIENT
from qtool.model import BlockwiseModel
from qtool.states import HiddenStates

TOKENS = 4096
"""Tokens that are run backward: enough, since every entry of a weight's gradient speaks for the factors."""
LOGITS_AT_A_TIME = 1 << 24
SEED = 0
"""Of the tokens that the model draws."""


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """The Fisher information of one weight, as a product."""

    inputs: Tensor  # [in, in] f32: A, in nats for each token of the text
    outputs: Tensor  # [out] f32: the share of each output, 1 in all

    def of(self, lost: Tensor, outputs: Tensor) -> float:
        """Of losing `lost` [n, in] from n rows whose shares are `outputs` [n]."""
        return max(output_energy(outputs.float().sqrt()[:, None] * lost, self.inputs), 0.0)


def windows_backward(seq_len: int, windows_per_batch: int) -> int:
    """Windows that are run backward: whole batches of them."""
    return max(1, TOKENS // (seq_len * windows_per_batch)) * windows_per_batch


class Gradients:
    """Runs the first of the windows `ids` [n, seq] forward and back; its files lie in `folder`."""

    def __init__(self, model: BlockwiseModel, ids: Tensor, folder: Path, windows_per_batch: int) -> None:
        ids = ids[: windows_backward(ids.shape[1], windows_per_batch)]
        steps = range(len(model.blocks) + 1)
        self._model, self._n_tokens = model, ids.numel()
        self._states = HiddenStates(folder, ids, windows_per_batch, [f"{FORWARD}{i}" for i in steps])
        self._gradients = HiddenStates(folder, ids, windows_per_batch, [f"{GRADIENT}{i}" for i in steps])
        self._head = _HeadCost(ids.numel())
        self._generator = torch.Generator().manual_seed(SEED)

    def write(self) -> list[int]:
        """Make the gradients at every block's input, and at the last one's output.  -> their checksums"""
        n_blocks = len(self._model.blocks)
        checksums = [0] * (n_blocks + 1)
        with tqdm(total=2 * n_blocks, unit="block", desc="gradients", disable=None) as bar:
            self._forward(bar)
            with self._model.outside(head=True):
                checksums[n_blocks] = self._gradients.write(n_blocks, map(self._at_the_head, self._inputs(n_blocks)))
            for index in reversed(range(n_blocks)):
                with self._model.block(index):
                    inputs = self._inputs(index)
                    checksums[index] = self._gradients.write(index, (g for g, _ in self._back(index, inputs, {})))
                self._states.remove(index + 1)
                bar.update()
        self._states.remove(0)
        return checksums

    def remove(self, index: int) -> None:
        """What block `index` read, once it is done."""
        self._gradients.remove(index + 1)

    def check(self, checksums: Sequence[int], first: int) -> None:
        """ConfigError unless the files that blocks from `first` on read are those that `write` made."""
        for index in range(first + 1, len(checksums)):
            self._gradients.check(index, checksums[index])

    def costs(self, index: int, inputs: Iterable[Tensor]) -> dict[str, Cost]:
        """By the name of the linear, of block `index`, which has its weights, for its first inputs or all of them."""
        linears = self._model.linears(index)
        sums = {name: _CostSum(self._n_tokens) for name in linears}
        for _, calls in self._back(index, inputs, linears):
            for name, x, g in calls:
                sums[name].add(x, g)
        return {name: total.result() for name, total in sums.items() if total.is_reached}

    def cost_of_head(self) -> Cost:
        """Of the output head, token by token: known once `write` is done."""
        return self._head.result()

    def costs_of_lookups(self) -> Tensor:
        """[vocab] f32: what an error of length 1 in a row of the token embedding costs, in nats for each token."""
        embedding: Any = self._model.skeleton.get_input_embeddings()
        total = torch.zeros(self._model.vocab_size)
        with self._model.outside(head=False):
            for ids, gradient in zip(self._gradients.batches, self._gradients.read(0), strict=True):
                with torch.enable_grad(), _started(embedding) as rows:
                    states = self._model.embed(ids)
                    (found,) = torch.autograd.grad(states, rows, gradient)
                for tokens, g in zip(ids, found.float(), strict=True):
                    unique, inverse = tokens.unique(return_inverse=True)
                    summed = g.new_zeros(len(unique), g.shape[1]).index_add_(0, inverse, g)
                    total[unique] += summed.square().sum(1) / g.shape[1]
        self._gradients.remove(0)
        return total.mul_(0.5 / self._n_tokens)

    def _forward(self, bar: Any) -> None:
        with self._model.outside(head=False):
            self._states.write(0, map(self._model.embed, self._states.batches))
        for index in range(len(self._model.blocks)):
            with self._model.block(index):
                self._states.write(index + 1, (self._model.run(index, x) for x in self._inputs(index)))
            bar.update()

    def _inputs(self, index: int) -> Iterator[Tensor]:
        return map(_without_overflow, self._states.read(index))

    def _back(
        self, index: int, inputs: Iterable[Tensor], linears: dict[str, nn.Module]
    ) -> Iterator[tuple[Tensor, list[tuple[str, Tensor, Tensor]]]]:
        """For every batch the gradient at the block's input, and (name, input, gradient at the output) of linears."""
        for gradient, x in zip(self._gradients.read(index + 1), inputs, strict=False):
            x = _without_overflow(x).requires_grad_()
            with torch.enable_grad(), _calls(linears) as calls:
                output = self._model.run(index, x.clone())
                wanted = [x, *(y for _, _, y in calls)]
                found = torch.autograd.grad(output, wanted, gradient, allow_unused=True, materialize_grads=True)
            seen = [(name, given.detach(), g) for (name, given, _), g in zip(calls, found[1:], strict=True)]
            yield found[0].nan_to_num_(0.0, 0.0, 0.0), seen

    def _at_the_head(self, states: Tensor) -> Tensor:
        """The gradient of the drawn tokens' log-likelihood at the last block's output [batch, seq, hidden]."""
        rows = states.reshape(-1, 1, states.shape[-1])  # each a sequence of its own: the head looks at nothing beside
        step = max(1, LOGITS_AT_A_TIME // self._model.vocab_size)
        return torch.cat([self._at_logits(part) for part in rows.split(step)]).view_as(states)

    def _at_logits(self, rows: Tensor) -> Tensor:
        head: Any = self._model.skeleton.get_output_embeddings()
        rows = rows.clone().requires_grad_()
        with torch.enable_grad(), _calls({"": head}) as calls:
            logits = self._model.logits(rows)[:, 0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self._generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            [(_, x, y)] = calls
            found, g = torch.autograd.grad(loss, [rows, y])
        self._head.add(x.detach(), g)
        return found.nan_to_num_(0.0, 0.0, 0.0)


class _CostSum:
    """Sums what the gradients of one weight say."""

    def __init__(self, n_tokens: int) -> None:
        self._inputs, self._outputs, self._scale = torch.tensor(0.0), torch.tensor(0.0), 0.5 / n_tokens
        self.is_reached = False

    def add(self, x: Tensor, g: Tensor) -> None:
        """x [..., in], g [..., out]: what the layer read, and the gradient at its output; [n, seq, .] are n windows."""
        if x.dim() != 3:
            x, g = x.reshape(1, -1, x.shape[-1]), g.reshape(1, -1, g.shape[-1])
        self.is_reached |= x.shape[1] > 0
        for one_x, one_g in zip(x.float(), g.float(), strict=True):
            gradient = (one_g.T @ one_x).nan_to_num_(0.0, 0.0, 0.0)  # [out, in]
            self._inputs = self._inputs + self._scale * (gradient.T @ gradient)
            self._outputs = self._outputs + self._scale * gradient.square().sum(1)

    def result(self) -> Cost:
        return _cost(self._inputs, self._outputs)


class _HeadCost:
    """The same of the head, each token by itself: a window's gradient would be as large as the head."""

    def __init__(self, n_tokens: int) -> None:
        self._inputs, self._outputs, self._scale = torch.tensor(0.0), torch.tensor(0.0), 0.5 / n_tokens

    def add(self, x: Tensor, g: Tensor) -> None:
        x, squares = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]).square().mul_(self._scale)
        squares.nan_to_num_(0.0, 0.0)
        self._inputs = self._inputs + x.T @ (squares.sum(1, keepdim=True) * x)
        self._outputs = self._outputs + squares.sum(0)

    def result(self) -> Cost:
        return _cost(self._inputs, self._outputs)


def _cost(inputs: Tensor, outputs: Tensor) -> Cost:
    return Cost(inputs, outputs / outputs.sum().clamp(min=torch.finfo(torch.float32).tiny))


def _without_overflow(states: Tensor) -> Tensor:
    """`states`, in which tokens that overflow are zeros now: through the attention they would spoil all others."""
    states[~torch.isfinite(states).all(-1)] = 0.0
    return states


@contextmanager
def _calls(linears: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(name, input, output) of every call of a linear, in their order."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def noting(name: str) -> Any:
        return lambda module, args, output: seen.append((name, args[0], output))

    hooks = [module.register_forward_hook(noting(name)) for name, module in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _started(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of `module`, each of which gradients are to go back to."""
    seen: list[Tensor] = []

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = module.register_forward_hook(start)
    try:
        yield seen
    finally:
        hook.remove()
