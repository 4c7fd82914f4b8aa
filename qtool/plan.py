"""What will be done with every tensor of a model, before anything is done: the plan that a run carries out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from calibration.hessian import LayerStats
from formats.encoding import Dense, Encoding
from formats.experts import expert_with
from formats.skeleton import is_linear, is_transposed_linear, split_name
from qtool.checkpoint import find_tensor
from qtool.errors import ConfigError
from qtool.fit import planned_encoding
from qtool.model import BlockwiseModel
from qtool.recipe import QuantSpec, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor: as it will be stored, and why it is left dense if it is."""

    name: str
    shape: tuple[int, ...]  # as stored: [out, in] for every linear
    encoding: Encoding
    spec: QuantSpec | None  # None: left dense
    reason: str = ""
    transposed: bool = False
    in_block: bool = False
    is_expert: bool = False  # one of a mixture that is run an expert at a time
    is_overridden: bool = False  # by --layer: its bits are not a target's to choose

    @property
    def layer(self) -> str:
        """The name of the module that holds the tensor."""
        return split_name(self.name)[0]

    @property
    def n_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_block_linear(self) -> bool:
        """Whether the tensor counts for the bits per weight: a matrix of a block, quantized or not."""
        return self.in_block and len(self.shape) == 2


def plan_tensors(
    model: BlockwiseModel, recipe: Recipe, specs: Mapping[str, QuantSpec] | None = None
) -> list[TensorPlan]:
    """The plan of every tensor in the order of the file: what lies outside the blocks, then block by block.

    specs: those that a target chose, by the tensor's name. ConfigError for a pattern that matches no tensor.
    """
    plan = [_plan_tensor(model, name, recipe, in_block=False) for name in model.outside_names()]
    for index in range(len(model.blocks)):
        own = set(model.own_names(index))
        for name in model.tensor_names(f"{model.block_name(index)}."):
            tensor = _plan_tensor(model, name, recipe, in_block=True)
            plan.append(tensor if name in own else replace(tensor, is_expert=True))
    _refuse_idle_patterns(plan, recipe)
    if recipe.experts is not None and not any(tensor.spec == recipe.experts for tensor in plan):
        if any(expert_with(model.skeleton, tensor.name) is not None for tensor in plan):
            raise ConfigError("--expert-format: --layer and --ignore leave it no expert; take one of them back")
        raise ConfigError(
            "--expert-format: the model has no experts that can be taken apart; --format is for all linears"
        )
    return [_with_spec(tensor, (specs or {}).get(tensor.name)) for tensor in plan]


def _with_spec(tensor: TensorPlan, spec: QuantSpec | None) -> TensorPlan:
    if spec is None:
        return tensor
    return replace(tensor, spec=spec, encoding=planned_encoding(spec, tensor.shape))


def _refuse_idle_patterns(plan: list[TensorPlan], recipe: Recipe) -> None:
    """A pattern that matches nothing is a misspelt one."""
    names = [tensor.name for tensor in plan if len(tensor.shape) > 1]
    for option, patterns in (("--ignore", recipe.ignore), ("--layer", [pattern for pattern, _ in recipe.layers])):
        for pattern in patterns:
            matched = [tensor for tensor in plan if len(tensor.shape) > 1 and re.search(pattern, tensor.name)]
            if not matched:
                raise ConfigError(f"{option} {pattern!r}: matches no layer; they are called as {names[-1]}")
            if option == "--layer" and all(tensor.spec is None for tensor in matched):
                raise ConfigError(f"{option} {pattern!r}: {matched[0].name} is left dense: {matched[0].reason}")


def weight_of(model: BlockwiseModel, tensor: TensorPlan) -> Tensor:
    """The weight [out, in] f32 of a linear that is materialised."""
    weight = find_tensor(model.skeleton, tensor.name)
    return weight.T if tensor.transposed else weight


def by_input(
    tensors: list[TensorPlan], stats: Mapping[str, LayerStats]
) -> list[tuple[list[TensorPlan], LayerStats | None]]:
    """Linears grouped by the statistics they share, in the model's order; without statistics, each alone."""
    groups: dict[int, tuple[list[TensorPlan], LayerStats | None]] = {}
    for tensor in tensors:
        shared = stats.get(tensor.layer)
        groups.setdefault(id(shared or tensor), ([], shared))[0].append(tensor)
    return list(groups.values())


def _plan_tensor(model: BlockwiseModel, name: str, recipe: Recipe, *, in_block: bool) -> TensorPlan:
    module = model.skeleton.get_submodule(split_name(name)[0])
    shape = tuple(find_tensor(model.skeleton, name).shape)
    spec, reason = _spec_for(module, name, shape, recipe, in_block, is_head=_is_head(model, name))
    if spec is not None and recipe.experts is not None and expert_with(model.skeleton, name) is not None:
        spec = recipe.experts
    spec, reason, is_overridden = _overridden(name, spec, reason, recipe)
    transposed = spec is not None and is_transposed_linear(module)
    if transposed:
        shape = shape[::-1]
    encoding: Encoding = Dense(model.checkpoint.stored_dtype(name))
    if spec is not None:
        try:
            encoding = planned_encoding(spec, shape)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return TensorPlan(
        name=name,
        shape=shape,
        encoding=encoding,
        spec=spec,
        reason=reason,
        transposed=transposed,
        in_block=in_block,
        is_overridden=is_overridden,
    )


def _overridden(name: str, spec: QuantSpec | None, reason: str, recipe: Recipe) -> tuple[QuantSpec | None, str, bool]:
    """What --ignore and --layer make of a tensor's spec."""
    if spec is None:
        return spec, reason, False
    for pattern in recipe.ignore:
        if re.search(pattern, name):
            return None, f"left by --ignore {pattern}", True
    for pattern, bits in recipe.layers:
        if re.search(pattern, name):
            try:
                if spec.format == "ternary":  # given bits, it is as the other linears
                    spec = recipe.linears
                return replace(spec, bits=bits), reason, True
            except ConfigError as error:
                raise ConfigError(f"--layer {pattern}={bits}: {error}") from None
    return spec, reason, False


def _spec_for(
    module: nn.Module, name: str, shape: tuple[int, ...], recipe: Recipe, in_block: bool, *, is_head: bool
) -> tuple[QuantSpec | None, str]:
    """(how to quantize the tensor, or None; why it is left dense, or nothing)."""
    leaf = split_name(name)[1]
    if len(shape) < 2:
        return None, "norm, bias or other vector"
    if in_block and "router" in name.split("."):
        return None, "router of a mixture"  # small, and what it decides is not a matter of degree
    if leaf == "weight" and in_block and is_linear(module):
        return recipe.linears, ""
    if leaf == "weight" and not in_block and (isinstance(module, nn.Embedding) or is_head):
        if not is_head:
            return None, "embedding of something else than tokens"
        return recipe.embedding_spec, "" if recipe.embedding_spec else "embedding, left by --embeddings 16"
    if len(shape) == 3 and "experts" in name:
        return None, "fused experts of a kind that cannot be taken apart"
    return None, "not a linear layer of a block" if in_block else "linear layer outside the blocks"


def _is_head(model: BlockwiseModel, name: str) -> bool:
    """Whether `name` is the weight of the token embedding or of the output head."""
    tensor = find_tensor(model.skeleton, name)
    ends = (model.skeleton.get_input_embeddings(), model.skeleton.get_output_embeddings())
    return any(end is not None and tensor is end.weight for end in ends)
