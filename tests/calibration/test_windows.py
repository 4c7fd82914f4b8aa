"""Windows: slices of the text, decided by the generator alone; what is said of a text too short."""

import hashlib
import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import CalibrationError
from calibration.windows import (
    TokenWindows,
    draw_windows,
    evaluation_windows,
    merge_windows,
    repeat_warnings,
    sample_sha256,
)

TOKENS = np.arange(10, dtype=np.int64)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class FixedStarts:
    """Stands for a generator; remembers the range it was asked for."""

    def __init__(self, *starts: int) -> None:
        self.starts = np.array(starts)

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        self.range = (low, high)
        return self.starts


def test_draw_windows_known_answer():
    fixed = FixedStarts(0, 6, 3)
    windows = draw_windows(TOKENS, 3, 4, fixed)
    assert windows.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [3, 4, 5, 6]]
    assert fixed.range == (0, 7)  # 7 places: the last window ends with the text


@given(n_tokens=st.integers(1, 60), n_samples=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_windows_are_slices_of_the_text(n_tokens, n_samples, seed, data):
    seq_len = data.draw(st.integers(1, n_tokens))
    tokens = np.arange(100, 100 + n_tokens)  # every token names its place
    windows = draw_windows(tokens, n_samples, seq_len, rng(seed))
    assert windows.shape == (n_samples, seq_len)
    for window in windows:
        start = window[0] - 100
        assert window.tolist() == tokens[start : start + seq_len].tolist()
    assert np.array_equal(windows, draw_windows(tokens, n_samples, seq_len, rng(seed)))


def test_another_seed_draws_other_windows():
    tokens = np.arange(10_000)
    assert not np.array_equal(draw_windows(tokens, 8, 4, rng(0)), draw_windows(tokens, 8, 4, rng(1)))


def test_both_ends_of_the_text_are_drawn():
    windows = draw_windows(TOKENS, 200, 9, rng())
    assert set(windows[:, 0]) == {0, 1}


@pytest.mark.parametrize("cut", [lambda t, s: draw_windows(t, 1, s, rng(), source="a.txt"),
                                 lambda t, s: evaluation_windows(t, s, source="a.txt")])  # fmt: skip
def test_too_short_a_text_says_what_it_has_and_what_is_needed(cut):
    message = "a.txt: the text has 10 tokens and one window needs 11; give more text or a smaller --seq-len"
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        cut(TOKENS, 11)
    assert cut(TOKENS, 10).tolist() == [list(range(10))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_windows(TOKENS, 0, 4, rng()), "--samples 0: must be at least 1"),
        (lambda: draw_windows(TOKENS, 4, 0, rng()), "--seq-len 0: must be at least 1"),
        (lambda: evaluation_windows(TOKENS, -1), "--seq-len -1: must be at least 1"),
        (lambda: evaluation_windows(TOKENS, 2, 0), "--max-windows 0: must be at least 1"),
    ],
)
def test_numbers_below_one(call, message):
    with pytest.raises(CalibrationError, match=f"^{message}$"):
        call()


def test_twice_the_text_is_no_warning_and_more_is():
    assert repeat_warnings(10, 5, 4, "a.txt") == ()
    assert repeat_warnings(10, 3, 7, "a.txt") == (
        "a.txt: 3 windows of 7 are 21 tokens, more than twice the 10 in the text, so they repeat; "
        "give more text or a smaller --samples",
    )


def test_evaluation_windows_known_answer():
    assert evaluation_windows(TOKENS, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert evaluation_windows(TOKENS, 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert evaluation_windows(TOKENS, 5, 99).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_evaluation_windows_that_overlap_known_answer():
    assert evaluation_windows(TOKENS, 4, stride=3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert evaluation_windows(TOKENS, 9, stride=1).tolist() == [list(range(9)), list(range(1, 10))]
    assert evaluation_windows(TOKENS, 9, stride=2).tolist() == [list(range(9))]
    assert evaluation_windows(TOKENS, 4, 2, stride=1).tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


@given(n_tokens=st.integers(1, 60), data=st.data())
def test_evaluation_windows_are_the_text_without_its_tail(n_tokens, data):
    seq_len = data.draw(st.integers(1, n_tokens))
    windows = evaluation_windows(np.arange(n_tokens), seq_len)
    assert windows.ravel().tolist() == list(range(windows.size))
    assert 0 <= n_tokens - windows.size < seq_len


def test_sample_sha256_known_answer():
    packed = struct.pack("<8i", 2, 3, 1, 2, 3, 4, 5, 70_000)
    ids = np.array([[1, 2, 3], [4, 5, 70_000]])
    assert sample_sha256(ids) == hashlib.sha256(packed).hexdigest()
    assert sample_sha256(ids) != sample_sha256(ids.reshape(3, 2))


def test_merge_windows_keeps_the_order_and_says_each_sentence_once():
    def part(value: int, source: str) -> TokenWindows:
        ids = np.full((1, 2), value, dtype=np.int64)
        return TokenWindows(ids=ids, source=source, sha256="", n_tokens_available=5, warnings=("w",),
                            notes=("n", source))  # fmt: skip

    merged = merge_windows([part(1, "a"), part(2, "b")])
    assert merged.ids.tolist() == [[1, 1], [2, 2]]
    assert merged.sha256 == sample_sha256(merged.ids)
    assert (merged.source, merged.n_tokens_available) == ("a,b", 10)
    assert (merged.warnings, merged.notes) == (("w",), ("n", "a", "b"))
