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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from formats.skeleton import one_line
from qtool.energy import output_energy
from qtool.errors import QuantizeError
from qtool.journal import FORWARD, GRADIENT
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.states import HiddenStates

TOKENS, LEAST_BATCHES = 4096, 4
"""Tokens that are run backward, at least in so many batches: each gives one gradient of every weight."""
LOGITS_BACKWARD = 1 << 24
"""Entries of logits that are run backward together, which bounds their memory."""
SEED = 0
"""Of the tokens that the model draws."""


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """The Fisher information of one weight, as a product."""

    inputs: Tensor  # [in, in] f32: A, in nats for each token of the text
    outputs: Tensor  # [out] f32: the share of each output, 1 in all

    def of(self, lost: Tensor, outputs: Tensor) -> float:
        """Nats for each token of the text, when n rows whose shares are `outputs` [n] lose `lost` [n, in] f32."""
        return max(output_energy(outputs.float().sqrt()[:, None] * lost, self.inputs), 0.0)


def windows_backward(seq_len: int, windows_per_batch: int) -> int:
    """Windows that are run backward: whole batches of them."""
    return max(LEAST_BATCHES, TOKENS // (seq_len * windows_per_batch)) * windows_per_batch


class Gradients:
    """Runs the first of the windows `ids` [n, seq] forward and back; its files lie in `folder`."""

    def __init__(self, model: BlockwiseModel, ids: Tensor, folder: Path, windows_per_batch: int) -> None:
        ids = ids[: windows_backward(ids.shape[1], windows_per_batch)]
        steps = range(len(model.blocks) + 1)
        self._model, self._predicting = model, model.predicting(ids.shape[1])
        self._n_tokens = ids[:, self._predicting].numel()
        self._states = HiddenStates(folder, ids, windows_per_batch, [f"{FORWARD}{i}" for i in steps])
        self._gradients = HiddenStates(folder, ids, windows_per_batch, [f"{GRADIENT}{i}" for i in steps])
        self._head = _CostSum(self._n_tokens)
        self._generator = torch.Generator().manual_seed(SEED)

    def write(self) -> list[int]:
        """Make the gradients [batch, seq, hidden] f32 at every block's input, and at the last one's output.

        -> their checksums
        """
        n_blocks = len(self._model.blocks)
        for step in range(n_blocks + 1):  # what a run left that was stopped here
            self._states.remove(step)
            self._gradients.remove(step)
        checksums = [0] * (n_blocks + 1)
        with tqdm(total=2 * n_blocks, unit="block", desc="gradients", disable=None) as bar:
            self._forward(bar)
            with self._model.outside(head=True):
                checksums[n_blocks] = self._gradients.write(n_blocks, map(self._at_the_head, self._inputs(n_blocks)))
            release_free_memory()
            for index in reversed(range(n_blocks)):
                with self._model.block(index):
                    gradients = (g for g, _ in self._back(index, self._states.read(index)))
                    checksums[index] = self._gradients.write(index, gradients)
                self._states.remove(index + 1)
                release_free_memory()
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
        """The costs of the linears that tokens reach, by name, in block `index`, which has its weights.

        inputs: the block's, batch after batch; of all windows or of those that were run backward.
        """
        sums: dict[str, _CostSum] = {}
        for _, calls in self._back(index, inputs):
            for name, x, g in calls:
                sums.setdefault(name, _CostSum(self._n_tokens)).add_batch(x, g)
        return {name: total.result() for name, total in sums.items()}

    def cost_of_head(self) -> Cost | None:
        """Of the output head, if the model calls one: known once `write` is done."""
        return self._head.result() if self._head.is_reached else None

    def costs_of_lookups(self) -> Tensor:
        """[vocab] f32: what an error of length 1 in a row of the token embedding costs, in nats for each token."""
        embedding: Any = self._model.skeleton.get_input_embeddings()
        total = torch.zeros(self._model.vocab_size)
        with self._model.outside(head=False):
            for ids, gradient in zip(self._gradients.batches, self._gradients.read(0), strict=True):
                with torch.enable_grad(), _started(self._model.skeleton, embedding.weight) as started:
                    states = self._model.embed(ids)
                    found = torch.autograd.grad(states, [rows for _, rows, _ in started], gradient)
                unique, inverse = torch.cat([read.flatten() for read, _, _ in started]).unique(return_inverse=True)
                factors = [factor for _, _, factor in started]
                flat = torch.cat([f * g.float().flatten(0, -2) for f, g in zip(factors, found, strict=True)])
                summed = flat.new_zeros(len(unique), flat.shape[1]).index_add_(0, inverse, flat)
                total[unique] += summed.square().sum(1) / flat.shape[1]
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

    def _back(self, index: int, inputs: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[tuple[str, Tensor, Tensor]]]]:
        """For every batch the gradient at the block's input, and (name, input, gradient at the output) of linears."""
        linears = self._model.linears(index)
        for gradient, x in zip(self._gradients.read(index + 1), inputs, strict=False):
            x = _without_overflow(x).requires_grad_()
            with torch.enable_grad(), _refused(self._model.block_name(index)), _calls(linears) as calls:
                output = self._model.run(index, x.clone())
                calls = [call for call in calls if call[2].requires_grad]  # others do not depend on the block's input
                wanted = [x, *(y for _, _, y in calls)]
                found = torch.autograd.grad(output, wanted, gradient, allow_unused=True, materialize_grads=True)
            seen = [(name, given.detach(), g) for (name, given, _), g in zip(calls, found[1:], strict=True)]
            yield _finite(found[0]), seen

    def _at_the_head(self, states: Tensor) -> Tensor:
        """The gradient of the drawn tokens' log-likelihood at the last block's output [batch, seq, hidden]."""
        read = states[:, self._predicting]
        rows = read.reshape(-1, 1, states.shape[-1])  # each a sequence of its own: the head looks at nothing beside
        step = max(1, LOGITS_BACKWARD // self._model.vocab_size)
        gradient = torch.zeros_like(states)
        gradient[:, self._predicting] = torch.cat([self._at_logits(part) for part in rows.split(step)]).view_as(read)
        return gradient

    def _at_logits(self, rows: Tensor) -> Tensor:
        head: Any = self._model.skeleton.get_output_embeddings()
        rows = rows.clone().requires_grad_()
        with torch.enable_grad(), _refused("the output head"), _calls({} if head is None else {"": head}) as calls:
            logits = self._model.logits(rows)[:, 0]
            drawn = torch.multinomial(logits.detach().nan_to_num(0.0).softmax(-1), 1, generator=self._generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            found, *at_outputs = torch.autograd.grad(loss, [rows, *(y for _, _, y in calls)])
        for (_, x, _), g in zip(calls, at_outputs, strict=True):
            self._head.add_tokens(x.detach(), g)
        return _finite(found)


class _CostSum:
    """Sums what the gradients of one weight say."""

    def __init__(self, n_tokens: int) -> None:
        self._inputs, self._outputs, self._scale = torch.tensor(0.0), torch.tensor(0.0), 0.5 / n_tokens

    @property
    def is_reached(self) -> bool:
        return self._outputs.dim() > 0

    def add_batch(self, x: Tensor, g: Tensor) -> None:
        """Of one batch: x [..., in], g [..., out] are what the layer read, and the gradient at its output."""
        x, g = _usable(x, g)
        gradient = g.T @ x  # [out, in]
        self._inputs = torch.add(self._inputs, gradient.T @ gradient, alpha=self._scale)
        self._outputs = self._outputs + self._scale * gradient.square().sum(1)

    def add_tokens(self, x: Tensor, g: Tensor) -> None:
        """The same, each token by itself: of the head, a batch's gradient would be as large as the head."""
        x, g = _usable(x, g)
        squares = g.square().mul_(self._scale)
        self._inputs = self._inputs + x.T @ (squares.sum(1, keepdim=True) * x)
        self._outputs = self._outputs + squares.sum(0)

    def result(self) -> Cost:
        return Cost(self._inputs, self._outputs / self._outputs.sum().clamp(min=torch.finfo(torch.float32).tiny))


def _usable(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] and [n, out] f32 of the tokens that do not overflow in either."""
    x, g = (values.reshape(-1, values.shape[-1]).float() for values in (x, g))
    finite = torch.isfinite(torch.linalg.vector_norm(x, dim=1)) & torch.isfinite(torch.linalg.vector_norm(g, dim=1))
    return (x, g) if finite.all() else (x[finite], g[finite])


def _finite(gradient: Tensor) -> Tensor:
    """Zeros where a token overflows: through the attention NaN would reach all others."""
    return gradient if torch.isfinite(gradient.sum()) else gradient.nan_to_num(0.0, 0.0, 0.0)


def _without_overflow(states: Tensor) -> Tensor:
    """`states`, in which tokens that overflow are zeros now: through the attention they would spoil all others."""
    states[~torch.isfinite(states).all(-1)] = 0.0
    return states


@contextmanager
def _calls(linears: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(name, input, output) of every call of a linear, in their order."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append((name, args[0], output))
            if output.requires_grad:
                output.register_hook(_finite)

        return note

    hooks = [module.register_forward_hook(noting(name)) for name, module in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _started(model: nn.Module, weight: Tensor) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """(ids, output, factor) of every look-up in the embedding `weight`: gradients are to go back to the output, in
    which the rows have that factor.
    """
    seen: list[tuple[Tensor, Tensor, float]] = []

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows, output = weight.detach()[args[0]], output.detach()
        factor = float(output.norm() / rows.norm().clamp(min=1e-30))
        seen.append((args[0], output.requires_grad_(), factor))
        return output

    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    with ExitStack() as stack:
        for embedding in embeddings:
            stack.callback(embedding.register_forward_hook(start).remove)
        yield seen


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """One line for an operation without a gradient, or one in place."""
    try:
        yield
    except RuntimeError as error:
        if "allocate" in str(error):
            raise
        raise QuantizeError(
            f"{name}: its gradients cannot be computed, which a target is measured by ({one_line(error)}); give --bits"
        ) from error
