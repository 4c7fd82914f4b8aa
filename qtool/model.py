"""A transformers model run one block at a time: find its blocks and linears, embed, run a block, score.

Nothing here knows an architecture by name. The block list is the ModuleList that holds the most
linear weights, and everything around it is transformers' own forward: with the blocks made to stop
or to pass through, it yields their inputs (`embed`) and turns their final output into logits (`logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.block_lists import BlockLists
from formats.errors import error_context
from formats.experts import expert_with, mixtures
from formats.kv_cache import PackedCache
from formats.skeleton import build_skeleton, is_linear, set_tensor
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What the model passes to one block besides the hidden states: the same for every sample of a shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states that a block is called with, and what else."""
    states = args[0] if args else kwargs["hidden_states"]
    return states, BlockCall(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})


class Stop(Exception):
    """Raised by the last block to leave the model's forward; carries the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class BlockwiseModel:
    """The model of a checkpoint; only what is inside a `with` block of `materialised` has weights."""

    def __init__(self, checkpoint: Checkpoint, *, kv_bits: int | None = None) -> None:
        """kv_bits: attention reads its keys and values as a cache in so many bits holds them; None: as they are."""
        self.checkpoint, self._kv_bits = checkpoint, kv_bits
        self.skeleton = self._build()
        if untied := checkpoint.untied(self.skeleton):
            # config.json says that the head is the embedding, the weights say that it is not: the weights are right.
            self._untie(untied)
        self.config = checkpoint.config.get_text_config()  # the language model's own, where it is one part of several
        self.lists = self._find_lists()
        self.blocks = [self.skeleton.get_submodule(self.lists.name(i)) for i in range(sum(self.lists.lengths))]
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self._blocks_return_tuples: bool | None = None  # known once one has run

    def _build(self) -> PreTrainedModel:
        with error_context(self.checkpoint.name):
            skeleton = build_skeleton(self.checkpoint.config, self.checkpoint.own_names)
        self.checkpoint.bind(skeleton)
        return skeleton

    def _untie(self, names: list[str]) -> None:
        self.checkpoint.config.tie_word_embeddings = False
        self.skeleton = self._build()

    def _find_lists(self) -> BlockLists:
        name, blocks = find_blocks(self.skeleton)
        return BlockLists((name,), (len(blocks),))

    # ---- what is where

    def block_name(self, index: int) -> str:
        return self.lists.name(index)

    def tensor_names(self, prefix: str = "") -> list[str]:
        """Every parameter and stored buffer under `prefix`, tied ones once, in the model's order."""
        stored = self.skeleton.state_dict().keys()
        named = [*self.skeleton.named_parameters(), *self.skeleton.named_buffers()]
        return [name for name, _ in named if name in stored and name.startswith(prefix)]

    def outside_names(self, *, head: bool = True) -> list[str]:
        """The tensors that belong to no block; without `head`, not the output embedding unless it is tied."""
        names = [n for n in self.tensor_names() if self.lists.number(n) is None]
        output = self.skeleton.get_output_embeddings()
        if head or output is None:
            return names
        own = {name for name, p in self.skeleton.named_parameters() if any(p is q for q in output.parameters())}
        return [n for n in names if n not in own or self._is_input_embedding(n)]

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Name -> module of every linear in block `index`."""
        name = self.block_name(index)
        return {f"{name}.{n}": m for n, m in self.blocks[index].named_modules() if is_linear(m)}

    def mixture(self, index: int) -> str | None:
        """The name of the block's mixture of experts, which can be run an expert at a time; None if it has not one."""
        found = [name for name, _ in mixtures(self.blocks[index])]
        return f"{self.block_name(index)}.{found[0]}" if len(found) == 1 else None

    def own_names(self, index: int) -> list[str]:
        """The tensors of block `index` but those of such a mixture's experts."""
        names = self.tensor_names(f"{self.block_name(index)}.")
        return names if self.mixture(index) is None else [n for n in names if expert_with(self.skeleton, n) is None]

    def own_linears(self, index: int) -> dict[str, nn.Module]:
        """As `linears`, but for those of such a mixture's experts."""
        mixture = self.mixture(index)
        return {n: m for n, m in self.linears(index).items() if mixture is None or not n.startswith(f"{mixture}.")}

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has embeddings for."""
        embedding: Any = self.skeleton.get_input_embeddings()
        return int(embedding.weight.shape[0])

    def check_tokens(self, ids: Tensor) -> None:
        """Refuse ids that the model has no embedding for: the tokenizer is another model's."""
        largest = int(ids.max())
        if largest >= self.vocab_size:
            raise CheckpointError(
                f"{self.checkpoint.name}: its tokenizer gives id {largest}, the model has {self.vocab_size} tokens; "
                "give the model its own tokenizer"
            )

    @property
    def max_seq_len(self) -> int | None:
        """The longest window the model was built for, or None when its config does not say."""
        value = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        return int(value) if value else None

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the first half of each window, and the decoder continues with the second."""
        return False

    def predicting(self, seq_len: int) -> slice:
        """The positions of a window's states that the head makes predictions of."""
        return slice(None)

    def before(self, states: Tensor) -> Tensor:
        """Of states [batch, seq, hidden] behind the last block, for each token but a window's first, the one
        [batch, seq - 1, hidden] that it is predicted from.
        """
        return states[:, :-1]

    def window_length(self, seq_len: int) -> int:
        """`seq_len`, cut to the model's context."""
        return min(seq_len, self.max_seq_len or seq_len)

    # ---- weights in and out of memory

    @contextmanager
    def materialised(self, names: list[str], *, instead: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The tensors `names` in float32 inside the `with`, some with other values `instead`; back to meta after it."""
        instead = instead or {}
        self.checkpoint.load(self.skeleton, [name for name in names if name not in instead])
        for name, value in instead.items():
            set_tensor(self.skeleton, name, value)
        self.skeleton.tie_weights()
        try:
            yield
        finally:
            for name in names:
                set_tensor(self.skeleton, name, torch.empty_like(find_tensor(self.skeleton, name), device="meta"))
            self.skeleton.tie_weights()

    @contextmanager
    def block(self, index: int, *, experts: bool = True) -> Iterator[nn.Module]:
        """Block `index` with its weights; without `experts`, as `own_names`."""
        prefix = f"{self.block_name(index)}."
        with self.materialised(self.tensor_names(prefix) if experts else self.own_names(index)):
            yield self.blocks[index]

    @contextmanager
    def outside(self, *, head: bool) -> Iterator[None]:
        """Everything around the blocks, as `outside_names`."""
        with self.materialised(self.outside_names(head=head)):
            yield

    def _is_input_embedding(self, name: str) -> bool:
        return any(find_tensor(self.skeleton, name) is p for p in self.skeleton.get_input_embeddings().parameters())

    # ---- running

    # Weights want no gradients, so none are computed for an input that wants none.

    def embed(self, ids: Tensor) -> Tensor:
        """The input [batch, seq, hidden] of the first block for token ids [batch, seq]; needs `outside`."""
        if self._blocks_return_tuples is None:
            self._blocks_return_tuples = self._probe(ids[:1, :2])
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        last = len(self.blocks) - 1

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, call = taken_apart(args, kwargs)
                calls.append(call)
                if index == 0:
                    hidden.append(states)
                if index == last:
                    raise Stop(hidden[0])
                return self._as_block_output(states)

            return forward

        with self._patched(record):
            try:
                self.skeleton(input_ids=ids, **self._caching())
            except Stop as stop:
                if self._kv_bits is not None and not any(_has_cache(call) for call in calls):
                    raise CheckpointError(
                        f"{self.checkpoint.name}: its blocks take no cache that --kv-bits could round; leave it out"
                    ) from stop
                self._remember_calls((ids.shape[0], ids.shape[1]), calls)
                return stop.hidden.float()
        raise CheckpointError(f"{self.checkpoint.name}: its blocks were not all run; architecture not supported")

    def learn_calls(self, batches: Iterable[Tensor]) -> None:
        """Make `run` ready for ids [batch, seq] of these shapes; needs `outside`."""
        for ids in {tuple(ids.shape): ids for ids in batches}.values():
            self.embed(ids)

    def _remember_calls(self, shape: tuple[int, int], calls: list[BlockCall]) -> None:
        known = self._calls.setdefault(shape, calls)
        for before, now in zip(known, calls, strict=True):
            if not same_values((before.args, before.kwargs), (now.args, now.kwargs)):
                raise CheckpointError(
                    f"{self.checkpoint.name}: its blocks take inputs that differ from sample to sample "
                    "besides the hidden states; architecture not supported"
                )

    def _probe(self, ids: Tensor) -> bool:
        """Whether blocks return a tuple, by running the first on a few tokens: the model's forward relies on it."""
        call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            call.append((args, kwargs))
            raise Stop(torch.empty(0))

        with self._patched(lambda index: forward), suppress(Stop):
            self.skeleton(input_ids=ids, use_cache=False)
        if not call:
            raise CheckpointError(f"{self.checkpoint.name}: its blocks were not run; architecture not supported")
        args, kwargs = call[0]
        mixture = self.mixture(0)
        with self.block(0, experts=False) as block, ExitStack() as stack:
            if mixture is not None:  # what it gives makes no difference: its experts need not be in memory
                experts = self.skeleton.get_submodule(mixture)
                stack.enter_context(instead_of(experts, lambda hidden, *routes, **named: hidden))
            return isinstance(block(*args, **kwargs), tuple)

    def _as_block_output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._blocks_return_tuples else hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """The output of block `index`, in memory, for its input [batch, seq, hidden] seen by `embed`."""
        call = self._calls[hidden.shape[0], hidden.shape[1]][index]
        output = self.blocks[index](
            hidden,
            *map(self._emptied, call.args),
            **{name: self._emptied(value) for name, value in call.kwargs.items()},
        )
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def _caching(self) -> dict[str, Any]:
        """What makes the model hand its blocks the cache that is asked for, or none."""
        if self._kv_bits is None:
            return {"use_cache": False}
        return {"use_cache": True, "cache": PackedCache(self.config, self._kv_bits)}

    def _emptied(self, value: Any) -> Any:
        """What a block is called with; for a cache an empty one, since each run is of whole windows."""
        return PackedCache(self.config, value.bits) if isinstance(value, PackedCache) else value

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [batch, seq, vocab] of the last block's output; needs `outside(head=True)`."""

        def replay(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._as_block_output(hidden)

        with self._patched(replay):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
            return self.skeleton(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]

    @contextmanager
    def _patched(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(instead_of(block, forward(index)))
            yield


@contextmanager
def instead_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of the module's own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # uncovers the class's own


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: the ModuleList whose linears hold the most weights."""

    def weights(blocks: nn.ModuleList) -> int:
        return sum(p.numel() for m in blocks.modules() if is_linear(m) for p in m.parameters(recurse=False))

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists or weights(max(lists, key=lambda item: weights(item[1]))[1]) == 0:
        raise CheckpointError(f"{type(model).__name__}: no list of blocks with linear layers found in the model")
    return max(lists, key=lambda item: weights(item[1]))


def _has_cache(call: BlockCall) -> bool:
    return any(isinstance(value, PackedCache) for value in (*call.args, *call.kwargs.values()))


def same_values(a: Any, b: Any) -> bool:
    """Whether two nested call arguments hold equal values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_values(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same_values, a, b))
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)
