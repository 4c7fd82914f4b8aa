"""What a file of a baseline's log-probabilities holds: 16-bit codes that lose next to nothing.

A safetensors file. Every scored token has a row of codes over the vocabulary, code * step + low, from its most likely
token down to 32 nats below; what lies lower is raised to there. Read back, a row is normalised again. Then no
log-probability is off by more than a step, at most 32 / 65535 nats, and since the probabilities still sum to 1, KL is
off by at most that step times sum(p |log p - log q|), plus the step squared. The score of the token that came, and
the most likely token, are stored as they are: perplexity and agreement are exact.

    __metadata__   what the rows are of (qtool.protocol.Sample), the vocabulary, and the SHA-256 of codes, then the rest
    low, step      [n] float32
    nll, top       [n] float32, int32
    codes          [n, vocab] uint16
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.protocol import Sample

FORMAT = "qtool baseline log-probabilities 1"
RANGE = 32.0  # nats below the most likely token: all that is further down weighs 1e-8 in the largest vocabularies
MAX_CODE = 2**16 - 1
NO_SHA256 = "0" * 64
COLUMNS = {"low": "<f4", "step": "<f4", "nll": "<f4", "top": "<i4"}  # one value a row, in the order of the file
_DTYPES = {"<f4": "F32", "<i4": "I32"}


def encode(log_probs: Tensor) -> tuple[npt.NDArray[np.uint16], Tensor, Tensor]:
    """[n, vocab] float32 -> codes [n, vocab], low [n], step [n]."""
    least, most = log_probs.aminmax(dim=1)  # [n]
    low = torch.maximum(least, most - RANGE)
    step = ((most - low) / MAX_CODE).clamp(min=torch.finfo(torch.float32).tiny)  # 0 where all are equally likely
    codes = ((log_probs - low[:, None]) / step[:, None]).round_().clamp_(0, MAX_CODE)
    return codes.numpy().astype("<u2"), low, step


def decode(codes: npt.NDArray[np.uint16], low: Tensor, step: Tensor) -> Tensor:
    """The log-probabilities [n, vocab] float32 that `encode` took, normalised."""
    values = torch.from_numpy(codes.astype(np.float32))
    return torch.log_softmax(values.mul_(step[:, None]).add_(low[:, None]), dim=1)


def metadata_of(sample: Sample, vocab_size: int) -> dict[str, str]:
    """What the rows are of; a safetensors header holds strings."""
    described = asdict(sample) | {"vocab_size": vocab_size}
    return {"format": FORMAT} | {key: str(value) for key, value in described.items() if value is not None}


def tensors_of(n_rows: int, vocab_size: int) -> dict[str, Any]:
    """The header's entries, in the form of the safetensors format."""
    entries: dict[str, Any] = {}
    end = 0
    for name, kind in COLUMNS.items():
        entries[name] = {"dtype": _DTYPES[kind], "shape": [n_rows], "data_offsets": [end, end + 4 * n_rows]}
        end += 4 * n_rows
    shape, n_bytes = [n_rows, vocab_size], 2 * n_rows * vocab_size
    return entries | {"codes": {"dtype": "U16", "shape": shape, "data_offsets": [end, end + n_bytes]}}


def build_header(sample: Sample, vocab_size: int, sha256: str) -> bytes:
    """As many bytes whatever the SHA-256, so that it can be filled in at the end."""
    metadata = metadata_of(sample, vocab_size) | {"sha256": sha256}
    text = json.dumps({"__metadata__": metadata} | tensors_of(sample.tokens, vocab_size), separators=(",", ":"))
    data = text.encode("utf-8")
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data


def column_bytes(n_rows: int) -> int:
    """Bytes of all that comes before the codes."""
    return 4 * n_rows * len(COLUMNS)


def data_bytes(n_rows: int, vocab_size: int) -> int:
    return column_bytes(n_rows) + 2 * n_rows * vocab_size
