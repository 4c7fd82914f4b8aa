"""Windows of equal length from one long row of tokens: at random to calibrate, in order to evaluate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.errors import CalibrationError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenWindows:
    """A calibration sample.

    ids: [n_samples, seq_len] int64.
    source: the texts it came from; a local file's name without its folder, since paths stay out of the file.
    sha256: of the ids, see `sample_sha256`.
    n_tokens_available: length of all the texts the windows were drawn from.
    warnings, notes: sentences for the user; a warning means the sample is worse than was asked for.
    """

    ids: Ids
    source: str
    sha256: str
    n_tokens_available: int
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def draw_windows(tokens: Ids, n_samples: int, seq_len: int, rng: np.random.Generator, *, source: str = "text") -> Ids:
    """[n_samples, seq_len]: slices of `tokens` at random places; they may overlap, as in GPTQ."""
    _require_positive("--samples", n_samples)
    _require_window(tokens, seq_len, source)
    starts = rng.integers(0, len(tokens) - seq_len + 1, size=n_samples)  # [n_samples]
    return np.take(tokens, starts[:, None] + np.arange(seq_len))


def evaluation_windows(
    tokens: Ids, seq_len: int, max_windows: int | None = None, *, stride: int | None = None, source: str = "text"
) -> Ids:
    """[n, seq_len]: windows from the start of the text, each `stride` tokens behind the one before it.

    Without `stride` they stand side by side, as in GPTQ. The tail that fills none is dropped. A view of `tokens`:
    where windows overlap, a copy would be as many times the text.
    """
    _require_window(tokens, seq_len, source)
    if max_windows is not None:
        _require_positive("--max-windows", max_windows)
    views = np.lib.stride_tricks.sliding_window_view(tokens, seq_len, writeable=True)
    return views[:: stride or seq_len][:max_windows]


def repeat_warnings(n_tokens: int, n_samples: int, seq_len: int, source: str) -> tuple[str, ...]:
    """A warning when more than twice the text is drawn: the windows then repeat more than they add."""
    if n_samples * seq_len <= 2 * n_tokens:
        return ()
    return (
        f"{source}: {n_samples} windows of {seq_len} are {n_samples * seq_len} tokens, more than twice the "
        f"{n_tokens} in the text, so they repeat; give more text or a smaller --samples",
    )


def sample_sha256(ids: Ids) -> str:
    """SHA-256 over the shape and then the ids, all as little-endian int32."""
    digest = hashlib.sha256(np.array(ids.shape, "<i4").tobytes())
    digest.update(ids.astype("<i4").tobytes())
    return digest.hexdigest()


def merge_windows(parts: Sequence[TokenWindows]) -> TokenWindows:
    """The samples of several sources as one, in their order."""
    ids = np.concatenate([part.ids for part in parts])
    return TokenWindows(
        ids=ids,
        source=",".join(part.source for part in parts),
        sha256=sample_sha256(ids),
        n_tokens_available=sum(part.n_tokens_available for part in parts),
        warnings=tuple(dict.fromkeys(line for part in parts for line in part.warnings)),
        notes=tuple(dict.fromkeys(line for part in parts for line in part.notes)),
    )


def _require_window(tokens: Ids, seq_len: int, source: str) -> None:
    _require_positive("--seq-len", seq_len)
    if len(tokens) < seq_len:
        raise CalibrationError(
            f"{source}: the text has {len(tokens)} tokens and one window needs {seq_len}; "
            "give more text or a smaller --seq-len"
        )


def _require_positive(option: str, value: int) -> None:
    if value < 1:
        raise CalibrationError(f"{option} {value}: must be at least 1")
