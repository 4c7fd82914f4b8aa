"""Mixtures of experts taken apart: every expert's matrices are linears of their own.

transformers fuses the experts of a block into tensors [experts, ...]. A `SeparateExperts` stands where such a module
stood, its tensors called `<module>.<expert>.<projection>.weight` (and `.bias`), each [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SEPARATE = re.compile(r"(.+)\.(\d+)\.(gate_up_proj|up_proj|down_proj)\.(weight|bias)")
_LISTED = re.compile(r"(.+\.experts)\.[a-z_]*(\d+)\..+\.weight")
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
"""What transformers notes on every module whose experts it can run in several ways."""


class FusedTensor(NamedTuple):
    """Where transformers has a tensor of one expert."""

    name: str
    expert: int


class Expert(nn.Module):
    """Two linears; what lies between them is the mixture's."""

    def __init__(self, up_name: str, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self._up_name = up_name
        self.add_module(up_name, up)
        self.down_proj = down

    @property
    def up(self) -> nn.Module:
        """gate_up_proj, or up_proj where there is no gate."""
        return self.get_submodule(self._up_name)


class SeparateExperts(nn.Module):
    """The same function as the fused module: each token's chosen experts, weighted and summed."""

    n_experts: int
    down_name = "down_proj"
    """Of the linear in every expert that does not read what the expert reads."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self._fused = (fused,)  # in a tuple, so that it is no submodule: its activation is asked for, its tensors go
        self._has_gate, self.is_transposed = bool(fused.has_gate), bool(fused.is_transposed)
        up_name = "gate_up_proj" if self._has_gate else "up_proj"
        up, down = fused.get_parameter(up_name), fused.get_parameter("down_proj")
        for expert in range(len(up)):
            made = [_linear(fused, tensor.shape[1:], bool(fused.has_bias)) for tensor in (up, down)]
            self.add_module(str(expert), Expert(up_name, *made))
        self.n_experts = len(up)
        self.post_expert_norm: Any = fused.post_expert_norm if fused.has_post_expert_norm else nn.Identity()
        for name, _ in list(fused.named_parameters(recurse=False)):
            delattr(fused, name)

    def forward(self, hidden_states: Tensor, *routes: Tensor, **named: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; by position or name, which experts [tokens, k] i64, and their weights."""
        chosen, weights = (*routes, *named.values())
        chosen = self.chosen(chosen)
        rows, slots, counts = self.routed(chosen)
        gathered = hidden_states[rows]
        outputs = torch.empty_like(gathered)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                outputs[start : start + count] = self.run(expert, gathered[start : start + count])
                start += count
        summed = hidden_states.new_zeros(chosen.numel(), hidden_states.shape[-1])
        summed[slots] = outputs * weights.reshape(-1)[slots, None].to(outputs.dtype)
        return summed.view(*chosen.shape, -1).sum(-2)

    def chosen(self, route: Tensor) -> Tensor:
        """Which experts [tokens, k] i64 the first of the two routes stands for."""
        return route

    def routed(self, chosen: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Of chosen experts [tokens, k], in the order of the experts: tokens, places in `chosen`, how many of each.

        Numbers beyond the last expert stand for none.
        """
        flat = chosen.reshape(-1)
        slots = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.n_experts)[: self.n_experts].tolist()
        slots = slots[: sum(counts)]
        return slots // chosen.shape[-1], slots, counts

    def number(self, child: str) -> int | None:
        """Of the expert that the submodule of this name is; None if it is none."""
        return int(child) if child.isdecimal() else None

    def expert(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def run(self, number: int, x: Tensor) -> Tensor:
        """The output of one expert for its tokens x [n, hidden]."""
        down: Any = self.expert(number).down_proj
        return self.post_expert_norm(down(self.between(number, x)))  # type: ignore[no-any-return]

    def between(self, number: int, x: Tensor) -> Tensor:
        """What an expert's down projection reads, of the expert's tokens x [n, hidden]."""
        expert: Any = self.expert(number)
        fused: Any = self._fused[0]
        projected = expert.up(x)
        return fused._apply_gate(projected) if self._has_gate else fused.act_fn(projected)  # type: ignore[no-any-return]


def _linear(fused: Any, shape: torch.Size, bias: bool) -> nn.Linear:
    out_features, in_features = reversed(shape) if fused.is_transposed else shape
    with torch.device("meta"):
        return nn.Linear(in_features, out_features, bias=bias)


def separate_experts(model: nn.Module, stored: Container[str] = ()) -> None:
    """Put a `SeparateExperts`, on meta, in the place of every fused mixture of `model`; others stay as they are.

    stored: names of tensors that there are. A mixture whose fused tensor is one of them stays whole: files had it so
    before experts were taken apart (SPEC 2.3.3).
    """
    for name, module in list(model.named_modules()):
        if _is_fused(module) and f"{name}.down_proj" not in stored:
            model.set_submodule(name, SeparateExperts(module))


def _is_fused(module: Any) -> bool:
    """Whether all tensors of `module` are those that a fused mixture has."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    expected = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    own = dict(module.named_parameters(recurse=False))
    norms = [name for name, _ in module.named_children() if name != "act_fn"]
    return own.keys() == expected and norms == ["post_expert_norm"] * bool(module.has_post_expert_norm)


def mixtures(model: nn.Module) -> Iterator[tuple[str, SeparateExperts]]:
    """Name and module of every mixture that has been taken apart."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SeparateExperts))


def expert_of(name: str) -> tuple[str, int] | None:
    """Mixture and number of the expert that has the weight `name`, going by the name."""
    match = _SEPARATE.fullmatch(name) or _LISTED.fullmatch(name)
    return None if match is None or not name.endswith(".weight") else (match[1], int(match[2]))


def expert_with(model: nn.Module, name: str) -> int | None:
    """The number of the expert that has the tensor `name`, in a mixture that has been taken apart."""
    module = model
    for part in name.split(".")[:-1]:
        if isinstance(module, SeparateExperts):
            return module.number(part)
        module = module.get_submodule(part)
    return None


def fused_tensor(model: nn.Module, name: str) -> FusedTensor | None:
    """The tensor of transformers that the tensor `name` is a part of, unless it is a tensor there too."""
    match = _SEPARATE.fullmatch(name)
    if match is None or not isinstance(model.get_submodule(match[1]), SeparateExperts):
        return None
    suffix = "_bias" if match[4] == "bias" else ""
    return FusedTensor(f"{match[1]}.{match[3]}{suffix}", int(match[2]))


def fuse_experts(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of experts put together as transformers has them; of each mixture all or none are given."""
    fused: dict[str, list[Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        part = fused_tensor(model, name)
        if part is None:
            others[name] = tensor
        else:
            mixture = model.get_submodule(part.name.rpartition(".")[0])
            assert isinstance(mixture, SeparateExperts)
            parts = fused.setdefault(part.name, [tensor] * mixture.n_experts)
            parts[part.expert] = tensor.T if mixture.is_transposed and tensor.dim() == 2 else tensor
    return others | {name: torch.stack(parts) for name, parts in fused.items()}
