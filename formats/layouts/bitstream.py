"""Codes as a dense little-endian bit stream that starts anew every 32 codes: the order of GPTQ and compressed-tensors.

32 codes of b bits take b words of 32 bits whatever b is; a code may lie across two of them.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError

U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]
WORD_BITS = 32


def stream_words(n: int, bits: int) -> int:
    """Words that n codes take."""
    return -(-n * bits // WORD_BITS)


def pack_stream(codes: U8, bits: int) -> U32:
    """codes [rows, n] u8 < 2**bits, bits 1 to 8  ->  [rows, stream_words(n, bits)] u32, unused bits zero"""
    rows, n = codes.shape
    chunks = -(-n // WORD_BITS)
    padded = np.pad(codes, ((0, 0), (0, chunks * WORD_BITS - n)))
    # Code i of every chunk beside each other, so that each step below goes over memory as it lies.
    lanes = np.ascontiguousarray(padded.reshape(rows * chunks, WORD_BITS).T)  # [32, rows * chunks]
    words = np.zeros((bits, rows * chunks), np.uint32)
    for i, lane in enumerate(lanes):
        word, offset = divmod(i * bits, WORD_BITS)
        wide = lane.astype(np.uint32)
        words[word] |= wide << np.uint32(offset)
        if offset + bits > WORD_BITS:
            words[word + 1] |= wide >> np.uint32(WORD_BITS - offset)
    return words.T.reshape(rows, chunks * bits)[:, : stream_words(n, bits)]


def unpack_stream(words: U32, bits: int, n: int) -> U8:
    """The codes of `pack_stream`.  words: [rows, stream_words(n, bits)] u32 -> [rows, n] u8"""
    rows, n_words = words.shape
    if n_words != stream_words(n, bits):
        raise FormatError(f"{n_words} words a row: {n} codes of {bits} bits take {stream_words(n, bits)}")
    chunks = -(-n // WORD_BITS)
    padded = np.pad(words, ((0, 0), (0, chunks * bits - n_words)))
    streams = np.ascontiguousarray(padded.reshape(rows * chunks, bits).T)  # [bits, rows * chunks]
    codes = np.empty((WORD_BITS, rows * chunks), np.uint8)
    for i in range(WORD_BITS):
        word, offset = divmod(i * bits, WORD_BITS)
        field = streams[word] >> np.uint32(offset)
        if offset + bits > WORD_BITS:
            field = field | streams[word + 1] << np.uint32(WORD_BITS - offset)
        codes[i] = field & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(codes.T).reshape(rows, chunks * WORD_BITS)[:, :n]
