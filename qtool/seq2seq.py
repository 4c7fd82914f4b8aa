"""An encoder-decoder run one block at a time: the encoder's blocks, then the decoder's, over the same windows.

The encoder reads the first half of a window, the decoder goes on with the second, each token of which is predicted from
what is before it. From block to block the states of both are carried side by side, so that they are as long as the
window. Behind the encoder's last block, its states become what the model makes of them (by a norm, say) for the
decoder.

Nothing here knows an architecture by name either: which blocks are whose is asked of transformers, and what the first
block of each stack gives to those behind it, such as relative position biases, is found by running it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from formats.block_lists import BlockLists
from formats.errors import FormatError
from formats.experts import mixtures
from formats.kv_cache import PackedCache
from formats.skeleton import is_encoder_decoder, one_line, untie
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.errors import CheckpointError
from qtool.model import BlockCall, BlockwiseModel, Stop, find_blocks, instead_of, same_values, taken_apart
from qtool.protocol import encoder_tokens

ENCODED = object()
"""Stands for the encoder's output in what a block was called with."""


def blockwise_model(checkpoint: Checkpoint, *, kv_bits: int | None = None) -> BlockwiseModel:
    """The model of a checkpoint, whether it has an encoder or not."""
    if is_encoder_decoder(checkpoint.config):
        return Seq2SeqModel(checkpoint, kv_bits=kv_bits)
    return BlockwiseModel(checkpoint, kv_bits=kv_bits)


class Seq2SeqModel(BlockwiseModel):
    """As the class above it; states [batch, seq, hidden] are the encoder's, then the decoder's."""

    def __init__(self, checkpoint: Checkpoint, *, kv_bits: int | None = None) -> None:
        if kv_bits is not None:
            PackedCache(checkpoint.config, kv_bits)  # which refuses it
        super().__init__(checkpoint)
        self._start = self._decoder_start()
        self._besides: dict[tuple[tuple[int, int], int], tuple[Any, ...] | None] = {}
        """What the first block of a stack returns besides the states, by the shape of the ids; None: states alone."""
        self._output: Any = None  # transformers' class of what the encoder returns

    def _untie(self, names: list[str]) -> None:
        """These alone: the embeddings of encoder and decoder may be one tensor all the same."""
        untie(self.skeleton, names)
        self.checkpoint.bind(self.skeleton)

    def _find_lists(self) -> BlockLists:
        self._encoder: Any = self.skeleton.get_encoder()
        found = []
        for part in (self._encoder, self.skeleton.get_decoder()):
            path = next((name for name, module in self.skeleton.named_modules() if module is part), "")
            if not path:
                raise self._unsupported("transformers does not say what its encoder and its decoder are")
            found.append((path, *find_blocks(part)))
        (self._encoder_path, *_), _ = found
        self.n_encoder_blocks = len(found[0][2])
        return BlockLists(tuple(f"{p}.{name}" for p, name, _ in found), tuple(len(blocks) for *_, blocks in found))

    def _decoder_start(self) -> int:
        generation = self.checkpoint.generation_config()
        for name in ("decoder_start_token_id", "bos_token_id"):  # in transformers' order
            for config in (self.checkpoint.config, generation):
                token = getattr(config, name, None)
                if isinstance(token, int):
                    return token
        raise CheckpointError(f"{self.checkpoint.name}: config.json has no decoder_start_token_id; add it")

    def _unsupported(self, why: str) -> CheckpointError:
        kind = self.checkpoint.config.model_type
        return CheckpointError(f"{self.checkpoint.name}: encoder-decoders of type {kind!r} are not supported: {why}")

    @property
    def has_encoder(self) -> bool:
        return True

    def predicting(self, seq_len: int) -> slice:
        return slice(encoder_tokens(seq_len), None)

    def before(self, states: Tensor) -> Tensor:
        """The decoder reads its tokens one place later: the state at a place predicts the token there."""
        return states[:, 1:]

    @contextmanager
    def block(self, index: int, *, experts: bool = True) -> Iterator[nn.Module]:
        """As above; with the encoder's last block, what is behind it."""
        behind = self._behind_encoder() if index == self.n_encoder_blocks - 1 else []
        with self.materialised(behind), super().block(index, experts=experts) as block:
            yield block

    def _behind_encoder(self) -> list[str]:
        """What the encoder has besides blocks and the embeddings of tokens."""
        names = [n for n in self.outside_names(head=False) if n.startswith(f"{self._encoder_path}.")]
        return [n for n in names if find_tensor(self.skeleton, n).shape[:1] != (self.vocab_size,)]

    def embed(self, ids: Tensor) -> Tensor:
        shape, n_encoder = (ids.shape[0], ids.shape[1]), encoder_tokens(ids.shape[1])
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        last = len(self.blocks) - 1

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, call = taken_apart(args, kwargs)
                calls.append(call)
                if index in (0, self.n_encoder_blocks):
                    hidden.append(states)
                    if (shape, index) not in self._besides:
                        self._besides[shape, index] = self._run_first(index, states, call)
                if index == last:
                    raise Stop(states)
                return self._returned(shape, index, states)

            return forward

        encoder_ids, labels = ids[:, :n_encoder], ids[:, n_encoder:]
        decoder_ids = torch.cat([torch.full_like(labels[:, :1], self._start), labels[:, :-1]], dim=1)
        with self._patched(record):
            try:
                output = self._encoder(input_ids=encoder_ids)
                self.skeleton(encoder_outputs=output, decoder_input_ids=decoder_ids, use_cache=False)
            except Stop:
                self._output = type(output)
                calls = [_with_encoded(call, output.last_hidden_state) for call in calls]
                self._check(calls, hidden, ids)
                self._remember_calls(shape, calls)
                return torch.cat(hidden, dim=1).float()
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                if isinstance(error, FormatError) or "allocate" in str(error):
                    raise
                raise self._unsupported(one_line(error)) from error
        raise self._unsupported("its blocks were not all run")

    def _run_first(self, index: int, states: Tensor, call: BlockCall) -> tuple[Any, ...] | None:
        """What a block returns besides the states, which its experts have no part in."""
        block = self.blocks[index]
        with self.materialised(self.own_names(index)), ExitStack() as stack:
            for _, mixture in mixtures(block):
                stack.enter_context(instead_of(mixture, lambda x, *routes, **named: torch.zeros_like(x)))
            output = type(block).forward(block, states, *call.args, **call.kwargs)
        return output[1:] if isinstance(output, tuple) else None

    def _returned(self, shape: tuple[int, int], index: int, states: Tensor) -> Any:
        """What the stack is to be given as the output of a block."""
        besides = self._besides[shape, 0 if index < self.n_encoder_blocks else self.n_encoder_blocks]
        return states if besides is None else (states, *besides)

    def _check(self, calls: list[BlockCall], hidden: list[Tensor], ids: Tensor) -> None:
        if len(calls) != len(self.blocks) or len(hidden) != 2:
            raise self._unsupported("its blocks are not run one after the other")
        if not all(map(_reads_encoded, calls[self.n_encoder_blocks :])):
            raise self._unsupported("its decoder's blocks do not read what the encoder gives as it is")
        if sum(states.shape[1] for states in hidden) != ids.shape[1] or hidden[0].shape[2] != hidden[1].shape[2]:
            raise self._unsupported("its blocks do not read states of one width, one for each token")

    def run(self, index: int, hidden: Tensor) -> Tensor:
        shape = hidden.shape[0], hidden.shape[1]
        encoder, decoder = hidden.tensor_split([encoder_tokens(shape[1])], dim=1)
        call = self._calls[shape][index]
        if index < self.n_encoder_blocks:
            encoder = self._run_block(index, shape, encoder, call)
            if index == self.n_encoder_blocks - 1:
                encoder = self._finish_encoder(encoder)
        else:
            decoder = self._run_block(index, shape, decoder, _without_encoded(call, encoder))
        return torch.cat([encoder, decoder], dim=1)

    def _run_block(self, index: int, shape: tuple[int, int], states: Tensor, call: BlockCall) -> Tensor:
        output = self.blocks[index](states, *call.args, **call.kwargs)
        if not isinstance(output, tuple):
            return output  # type: ignore[no-any-return]
        if not same_values(self._returned(shape, index, output[0])[1:], output[1:]):
            raise self._unsupported(f"{self.block_name(index)} does not give the next block what it was given")
        return output[0]  # type: ignore[no-any-return]

    def _finish_encoder(self, states: Tensor) -> Tensor:
        """What the encoder makes of its last block's output."""
        shape = next(iter(self._calls))
        with self._patched(lambda index: lambda *args, **kwargs: self._returned(shape, index, states)):
            return self._encoder(inputs_embeds=states).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        shape = next(iter(self._calls))
        output = self._output(last_hidden_state=hidden[:, :1])  # nothing reads it
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with self._patched(lambda index: lambda *args, **kwargs: self._returned(shape, index, hidden)):
            outputs = self.skeleton(encoder_outputs=output, decoder_input_ids=ids, use_cache=False)
        return outputs.logits.float()  # type: ignore[no-any-return]


def _with_encoded(call: BlockCall, encoded: Tensor) -> BlockCall:
    return _replaced(call, lambda value: ENCODED if value is encoded else value)


def _without_encoded(call: BlockCall, encoded: Tensor) -> BlockCall:
    return _replaced(call, lambda value: encoded if value is ENCODED else value)


def _replaced(call: BlockCall, replace: Callable[[Any], Any]) -> BlockCall:
    return BlockCall(tuple(map(replace, call.args)), {name: replace(value) for name, value in call.kwargs.items()})


def _reads_encoded(call: BlockCall) -> bool:
    return any(value is ENCODED for value in (*call.args, *call.kwargs.values()))
