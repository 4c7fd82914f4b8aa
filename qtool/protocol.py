"""What an evaluation scores: how a text becomes windows, which tokens of them count, and where BOS stands.

Two protocols are in use, and the same model has another perplexity in each.

gptq: as the GPTQ paper (Frantar et al. 2023) and those after it. The text is tokenized once and cut into windows
of 2048 tokens side by side; the tail is dropped; every token of a window but its first is scored. With a stride the
windows overlap, and of each but the first only the tokens that no window before it scored are, so that all but
those at the start have at least seq_len - stride tokens before them (the sliding window of transformers' guide).

llama.cpp: as its llama-perplexity. Windows of 512 tokens side by side, the first token of each replaced by BOS where
the model's tokenizer adds one, and only what has half a window before it is scored: the tokens from
seq_len // 2 + 1 on. Special tokens that are spelled out in the text are read as ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calibration.corpus import Text, evaluation_windows, sample_sha256, tokenize
from calibration.windows import Ids
from qtool.errors import ConfigError
from qtool.recipe import one_of

ProtocolName = Literal["gptq", "llama.cpp"]
_DEFAULT_SEQ_LEN: dict[ProtocolName, int] = {"gptq": 2048, "llama.cpp": 512}
_LEAST_SEQ_LEN: dict[ProtocolName, int] = {"gptq": 2, "llama.cpp": 3}  # a shorter window has no scored token
LEAST_STRETCHES = 10  # from fewer, the spread between stretches is itself known to no better than a quarter


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What the user asks for; None stands for the protocol's own value."""

    name: ProtocolName = "gptq"
    seq_len: int | None = None
    stride: int | None = None  # tokens from one window's start to the next's
    max_windows: int | None = None

    def __post_init__(self) -> None:
        one_of("protocol", self.name, tuple(_DEFAULT_SEQ_LEN))
        if self.stride is not None and self.name != "gptq":
            raise ConfigError(
                f"--stride {self.stride}: windows of --protocol {self.name} stand side by side; use --protocol gptq"
            )

    def window_length(self, longest: int | None) -> int:
        """Tokens in a window, for a model whose context is `longest` (None: any length)."""
        if self.seq_len is None:
            return min(_DEFAULT_SEQ_LEN[self.name], longest or _DEFAULT_SEQ_LEN[self.name])
        least = _LEAST_SEQ_LEN[self.name]
        if self.seq_len < least or (longest is not None and self.seq_len > longest):
            most = "any length" if longest is None else f"{longest}, the context the model was built for"
            raise ConfigError(f"--seq-len {self.seq_len}: must be {least} to {most}")
        return self.seq_len

    def window_stride(self, seq_len: int) -> int:
        if self.stride is None:
            return seq_len
        if not 1 <= self.stride <= seq_len:
            raise ConfigError(f"--stride {self.stride}: must be 1 to {seq_len}, the tokens in a window")
        return self.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was measured on, so that figures can be compared, or seen to be of different things."""

    data: str
    data_sha256: str
    protocol: ProtocolName
    bos: str  # where the tokenizer's BOS stands: every window, start of the text, none
    seq_len: int
    encoder_tokens: int | None = None  # of each window, what an encoder reads; of a model that has one
    stride: int
    windows: int
    tokens: int  # scored ones
    tokens_sha256: str  # of the row of tokens that the windows were cut from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """ids: [n, seq_len] int64; a view of the text where windows overlap.
    first: [n] int64, the first position in each window whose prediction is scored; all behind it are, but the last,
    which predicts nothing that is there.
    """

    ids: Tensor
    first: Tensor
    sample: Sample

    def split(self, n_windows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, first) of `n_windows` at a time."""
        return zip(self.ids.split(n_windows), self.first.split(n_windows), strict=True)

    def stretches(self) -> npt.NDArray[np.int64] | None:
        """[tokens]: which stretch of the text, each as long as a window, every scored token lies in.

        The error bar is taken over these: a hard passage is hard in many tokens at once, so tokens in a row say less
        than as many independent ones. Over the first 48 windows of 512 tokens of WikiText-2, a model of 135 million
        parameters has a perplexity of 29.17 +/- 1.54 that way, and +/- 0.59 if every token counts for itself. None
        stands for that: for llama.cpp, whose formula it is, and where there are fewer than LEAST_STRETCHES.
        """
        of_window = np.arange(self.sample.windows) * self.sample.stride // self.sample.seq_len
        if self.sample.protocol == "llama.cpp" or of_window[-1] + 1 < LEAST_STRETCHES:
            return None
        return np.repeat(of_window, _n_scored(self.first, self.sample.seq_len).numpy())


def encoder_tokens(seq_len: int) -> int:
    """How many tokens of a window an encoder reads: the first half; the decoder continues with the second."""
    return seq_len // 2


def scored(first: Tensor, seq_len: int) -> Tensor:
    """[n, seq_len - 1] bool for `first` [n]: the positions whose prediction, of the next token, is scored."""
    return torch.arange(seq_len - 1) >= first[:, None]


def cut_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    longest: int | None,
    source: str,
    halves: bool = False,
) -> Windows:
    """The windows of `text`, named `source` in errors, for a model with a context of `longest` tokens.

    halves: an encoder reads the first half of each, which is not scored.
    """
    seq_len = protocol.window_length(longest)
    stride = protocol.window_stride(seq_len)
    bos = added_bos(tokenizer)
    tokens = _tokens(text, tokenizer, protocol.name, bos)
    ids = torch.from_numpy(evaluation_windows(tokens, seq_len, protocol.max_windows, stride=stride, source=source))
    n_windows = len(ids)
    if protocol.name == "llama.cpp":
        first = torch.full((n_windows,), seq_len // 2)
        if bos is not None:
            ids = ids.clone()
            ids[:, 0] = bos
    else:
        first = torch.full((n_windows,), max(seq_len - 1 - stride, 0))
        first[0] = 0
    if halves:
        first.clamp_(min=encoder_tokens(seq_len) - 1)
    sample = Sample(
        data=text.name,
        data_sha256=text.sha256,
        protocol=protocol.name,
        bos="none" if bos is None else "every window" if protocol.name == "llama.cpp" else "start of the text",
        seq_len=seq_len,
        encoder_tokens=encoder_tokens(seq_len) if halves else None,
        stride=stride,
        windows=n_windows,
        tokens=int(_n_scored(first, seq_len).sum()),
        tokens_sha256=sample_sha256(tokens[: (n_windows - 1) * stride + seq_len]),
    )
    return Windows(ids=ids, first=first, sample=sample)


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS that `tokenizer` starts a text with; None when it starts none with it."""
    probe = "a"
    plain: list[int] = list(tokenizer(probe, add_special_tokens=False).input_ids)
    whole: list[int] = list(tokenizer(probe).input_ids)
    bos: Any = tokenizer.bos_token_id
    return int(bos) if bos is not None and whole[: len(plain) + 1] == [bos, *plain] else None


def _tokens(text: Text, tokenizer: PreTrainedTokenizerBase, protocol: ProtocolName, bos: int | None) -> Ids:
    """[n] int64: the whole text in one piece, with what the tokenizer puts around one."""

    def encode(joined: str) -> list[int]:
        if protocol == "gptq":
            return list(tokenizer(joined, verbose=False).input_ids)
        ids = tokenizer(joined, verbose=False, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids] if bos is None else [bos, *ids]

    return tokenize(text, encode)


def _n_scored(first: Tensor, seq_len: int) -> Tensor:
    """[n] int64: scored tokens of each window."""
    return seq_len - 1 - first
