"""Experts that transformers lists one by one, in a module that holds nothing else: taken apart as fused ones are.

Every expert has linears of its own already, and names stay. But now the mixture can be run an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from formats.experts import SeparateExperts


class ListedExperts(SeparateExperts):
    """The same function as the list: each token's chosen experts, weighted and summed."""

    def __init__(self, listed: nn.Module, down_name: str, *, by_mask: bool) -> None:
        """by_mask: the list is told the experts of a token by zeros and ones, else by their numbers."""
        nn.Module.__init__(self)
        self.down_name, self._by_mask = down_name, by_mask
        self._names = [name for name, _ in listed.named_children()]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self.n_experts = len(self._names)
        for name, expert in listed.named_children():
            self.add_module(name, expert)

    def __getitem__(self, name: str) -> nn.Module:
        """As of the list: so transformers finds what it is to initialise."""
        return self.get_submodule(name)

    def chosen(self, route: Tensor) -> Tensor:
        """Of a mask [tokens, 1, experts], the number beyond the last expert where there is no one in it."""
        return torch.where(route.any(-1), route.int().argmax(-1), self.n_experts) if self._by_mask else route

    def number(self, child: str) -> int | None:
        return self._numbers.get(child)

    def expert(self, number: int) -> nn.Module:
        return self.get_submodule(self._names[number])

    def run(self, number: int, x: Tensor) -> Tensor:
        return self.expert(number)(x)  # type: ignore[no-any-return]

    def between(self, number: int, x: Tensor) -> Tensor:
        expert = self.expert(number)
        try:
            with _before(expert.get_submodule(self.down_name), _stop):
                expert(x)
        except _Reached as reached:
            return reached.x
        raise AssertionError("a list whose experts do not call all of their linears is not taken apart")


class _Reached(Exception):
    """A linear was called; carries what it reads."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def _stop(x: Tensor) -> None:
    raise _Reached(x)


def separate_listed_experts(model: nn.Module) -> None:
    """Put a `ListedExperts` in the place of every such list of `model`; others stay as they are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is not nn.Module.forward:
            down_name = _down_of(next(module.children())) if _are_alike(module) else None
            by_mask = None if down_name is None else _is_told_by_mask(module)
            if down_name is not None and by_mask is not None:
                model.set_submodule(name, ListedExperts(module, down_name, by_mask=by_mask))


def _are_alike(listed: nn.Module) -> bool:
    """Whether there is nothing but experts of one kind and shape."""
    kinds = [(type(e), {name: p.shape for name, p in e.named_parameters()}) for e in listed.children()]
    return bool(kinds) and all(one == kinds[0] for one in kinds) and not list(listed.parameters(recurse=False))


def _down_of(expert: nn.Module) -> str | None:
    """The one linear that reads something else than the expert does; None if it has not just one, or other matrices."""
    linears = {name: module for name, module in expert.named_children() if isinstance(module, nn.Linear)}
    if sum(p.dim() > 1 for p in expert.parameters()) == len(linears):
        for width in {module.in_features for module in linears.values()}:
            with suppress(Exception):  # the width is another, or the expert is called otherwise
                return _reader_of_others(expert, linears, width)
    return None


def _reader_of_others(expert: nn.Module, linears: Mapping[str, nn.Linear], width: int) -> str | None:
    x = torch.zeros(1, width, device=next(expert.parameters()).device)  # meta, mostly
    reads: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in linears.items():
            stack.enter_context(_before(module, partial(reads.__setitem__, name)))
        expert(x)
    others = [name for name, read in reads.items() if read is not x]
    return others[0] if len(others) == 1 and reads.keys() == linears.keys() else None


def _is_told_by_mask(listed: nn.Module) -> bool | None:
    """How a list is told the experts of a token; None unless it weights and sums what those give, and nothing else."""
    experts = list(listed.children())
    first, last = 0, len(experts) - 1
    x, weights = torch.tensor([[1.0, 2.0], [3.0, -1.0]], device="cpu"), torch.tensor([[0.5], [2.0]], device="cpu")
    numbers = torch.tensor([[first], [last]], device="cpu")
    want = x * weights * (3.0 + numbers)
    mask = nn.functional.pad(nn.functional.one_hot(numbers, len(experts)), (0, 0, 0, 0, 0, 1))  # and one without room
    padded = [nn.functional.pad(values, (0, 0, 0, 1), value=7.0) for values in (x, weights)]
    with ExitStack() as stack:
        stack.callback(listed.train, listed.training)
        listed.eval()
        for number in {first, last}:
            stack.enter_context(_instead(experts[number], partial(_times, 3.0 + number)))
        with suppress(Exception):  # of a list that is called otherwise
            if torch.equal(listed(padded[0], mask, padded[1]), nn.functional.pad(want, (0, 0, 0, 1))):
                return True
        with suppress(Exception):
            if torch.equal(listed(x, numbers, weights), want):
                return False
    return None


@contextmanager
def _instead(expert: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    expert.forward = forward
    try:
        yield
    finally:
        del expert.forward  # uncovers the class's own


def _times(factor: float, x: Tensor) -> Tensor:
    return factor * x


@contextmanager
def _before(linear: nn.Module, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """`see` is given what a linear reads."""
    hook = linear.register_forward_pre_hook(lambda module, args: see(args[0]))
    try:
        yield
    finally:
        hook.remove()
