"""Streams of ternary values, made and read with numpy and compiled loops (SPEC 7.15, 7.16)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from formats.encoding import Arrays
from formats.encoding.ternary_dict import SHARES, TernaryDict
from formats.encoding.ternary_rans import LANES, N_SYMBOLS, SEGMENT_INPUTS, SLOTS, VALUES, TernaryRans
from formats.errors import FormatError
from formats.kernels import ternary_dict, ternary_rans
from formats.ternary import fitted_frequencies, longer_phrases, phrases, symbol_digits

I8 = npt.NDArray[np.int8]
SAMPLE_VALUES = 1 << 14
USUAL_SHARES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 48, 54, 61, 68, 76, 85)
"""Of -1 and of +1, in 256: a table takes half a megabyte and some time to make, and a file has few (SPEC 7.15.6)."""
WIDER = 4
"""So many larger shares are tried on a sample: behind a phrase that ended early, what comes next is not a zero."""
LANE_BITS = 2400
"""Of a segment's values at least: a state costs 24 bits more than it holds, which is to be one percent."""


class Stream(NamedTuple):
    """The values of a layer as they are stored."""

    fields: Mapping[str, int]  # of the encoding
    parts: Mapping[str, npt.NDArray[Any]]


# Dictionary


def encode_dict(codes: I8) -> Stream:
    """SPEC 7.15, with the dictionary that takes the fewest codewords for a sample.  codes: [out, in] i8"""
    low, high = choose_shares(codes)
    codewords, offsets = codewords_of(codes, low, high)
    fields = {"share_low": low, "share_high": high, "codewords": len(codewords)}
    return Stream(fields, {"codewords": codewords, "codeword_rows": offsets})


def choose_shares(codes: I8) -> tuple[int, int]:
    """The shares (in 256) of -1 and +1, alike, of those that were tried."""
    likely, sample = _likely_share(codes), _sample(codes)
    tried = USUAL_SHARES[max(0, likely - 1) : likely + WIDER]
    best = min(tried, key=lambda share: len(codewords_of(sample, share, share)[0]))
    return best, best


def foretold_dict(codes: I8) -> Mapping[str, int]:
    """About the fields that `encode_dict` comes to, by a sample and one dictionary: some percent more codewords."""
    sample = _sample(codes)
    share = USUAL_SHARES[min(_likely_share(codes) + 1, len(USUAL_SHARES) - 1)]
    n = len(codewords_of(sample, share, share)[0]) * codes.size // sample.size
    return {"share_low": share, "share_high": share, "codewords": n}


def _likely_share(codes: I8) -> int:
    """The place among the usual ones of the share that the values have."""
    return int(np.searchsorted(USUAL_SHARES, SHARES * int(np.count_nonzero(codes)) / (2 * codes.size)))


def _sample(codes: I8) -> I8:
    return codes[:: max(1, codes.size // SAMPLE_VALUES)]


def codewords_of(codes: I8, low: int, high: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """Codes [out, in] i8 in the dictionary of these shares: codewords [n], and where each row's begin [out + 1]."""
    found = np.empty(len(codes) * -(-codes.shape[1] // 2), np.uint16)
    offsets = np.empty(len(codes) + 1, np.uint32)
    n = ternary_dict.encode(np.ascontiguousarray(codes), longer_phrases(low, high), found, offsets)
    return found[:n].copy(), offsets


def decode_dict(
    arrays: Arrays, shares: tuple[int, int], n_in: int, rows: npt.NDArray[Any], values: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Any rows; see `TernaryStream.decode`."""
    codewords, offsets = arrays["codewords"], arrays["codeword_rows"]

    def fill(table: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        ternary_dict.decode(codewords, offsets, phrases(*shares), rows, table, found)

    return _filled(fill, n_in, values)


def row_pairs(arrays: Arrays, shares: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The pairs in the codewords of every row, whose offsets were checked.  -> [out] i64"""
    offsets = arrays["codeword_rows"]
    found = np.empty(len(offsets) - 1, np.int64)
    ternary_dict.lengths(arrays["codewords"], offsets, phrases(*shares), found)
    return found


# Asymmetric numeral systems


def encode_rans(codes: I8) -> Stream:
    """SPEC 7.16, with as many segments a row as cost one percent at most.  codes: [out, in] i8"""
    n_out, n_in = codes.shape
    symbols = np.empty((n_out, -(-n_in // VALUES)), np.uint8)
    counts = np.zeros(N_SYMBOLS, np.int64)
    ternary_rans.symbols_of(np.ascontiguousarray(codes), symbols, counts)
    frequencies, row_bits = fitted_frequencies(counts)
    n_segments = max(1, row_bits // n_out // LANE_BITS)
    segment = -(-n_in // (n_segments * SEGMENT_INPUTS)) * SEGMENT_INPUTS
    n_segments = -(-n_in // segment)
    offsets = np.empty(-(-n_out // LANES) * n_segments + 1, np.uint32)
    words, states = np.empty(symbols.size, np.uint16), np.empty((n_out, n_segments), np.uint32)
    starts = (np.cumsum(frequencies) - frequencies).astype(np.uint32)
    n = ternary_rans.encode(symbols, segment // VALUES, frequencies.astype(np.uint32), starts, words, offsets, states)
    parts = {"frequencies": frequencies, "words": words[len(words) - n :].copy(), "states": states}
    return Stream({"segment": segment, "words": n}, parts | {"word_blocks": np.uint32(n) - offsets})


def decode_rans(
    arrays: Arrays, segment_steps: int, n_in: int, rows: npt.NDArray[Any], values: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Any rows; see `TernaryStream.decode`."""
    states = arrays["states"]
    symbols = np.empty((LANES, states.shape[1] * segment_steps + 1), np.uint8)

    def fill(table: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        stream = _words(arrays), arrays["word_blocks"], states, *_slots(arrays["frequencies"])
        n_steps = -(-n_in // VALUES)
        ternary_rans.decode(*stream, segment_steps, n_steps, symbol_digits(), rows, table, symbols, found)

    return _filled(fill, n_in, values)


def walk_rans(arrays: Arrays, segment_steps: int, n_steps: int) -> npt.NDArray[np.uint8]:
    """The last symbol of every row [out] u8; FormatError for a stream that does not end where it must (SPEC 7.16.4)."""
    states = arrays["states"]
    last, symbols = np.empty(len(states), np.uint8), np.empty((LANES, segment_steps), np.uint8)
    stream = _words(arrays), arrays["word_blocks"], states, *_slots(arrays["frequencies"])
    block, wrong = ternary_rans.check(*stream, segment_steps, n_steps, symbols, last)
    if wrong == ternary_rans.WRONG_WORDS:
        raise FormatError(f"words of block {block}: its lanes take more, or fewer, than there are (SPEC 7.16.4)")
    if wrong:
        raise FormatError(f"a state of block {block} does not end at {ternary_rans.LOWEST} (SPEC 7.16.4)")
    return last


def _words(arrays: Arrays) -> npt.NDArray[np.uint16]:
    """At least one, that nobody is to take."""
    words = arrays["words"]
    return words if len(words) else np.zeros(1, np.uint16)


def _slots(frequencies: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """The symbol of every slot [2**14] u8, and frequency << 16 | first slot of every symbol [243] u32."""
    counts = frequencies.astype(np.int64)
    slots = np.zeros(SLOTS, np.uint8)
    found = np.repeat(np.arange(N_SYMBOLS, dtype=np.uint8), counts)[:SLOTS]
    slots[: len(found)] = found
    return slots, (counts << 16 | (np.cumsum(counts) - counts) & 0xFFFF).astype(np.uint32)


# Both


def check_offsets(name: str, offsets: npt.NDArray[np.uint32], n: int, paragraph: str) -> None:
    """SPEC 7.15.4, 7.16.3: from 0 to n, never falling."""
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, n):
        raise FormatError(f"{name} go from {first} to {last}: must be from 0 to {n} (SPEC {paragraph})")
    falls = (offsets[1:] < offsets[:-1]).nonzero()[0]
    if len(falls):
        raise FormatError(f"{name} fall behind number {int(falls[0])}: must never fall (SPEC {paragraph})")


def _filled(
    fill: Callable[[npt.NDArray[Any], npt.NDArray[Any]], None], n_in: int, values: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """What `fill` writes two values at a time, as one word.  values: [m, 2]  ->  [m, in] of the same type"""
    word = {1: np.uint16, 4: np.uint64}[values.itemsize]
    three = np.zeros((len(values), 4), values.dtype)
    three[:, 1:3] = values
    pair = np.arange(16)
    table = np.stack([three[:, pair & 3], three[:, pair >> 2]], axis=-1).reshape(len(values), 32)
    found = np.empty((len(values), n_in + n_in % 2), values.dtype)
    fill(table.view(word), found.view(word))
    return found if n_in % 2 == 0 else np.ascontiguousarray(found[:, :n_in])


ENCODERS: dict[str, Callable[[I8], Stream]] = {TernaryDict.name: encode_dict, TernaryRans.name: encode_rans}
