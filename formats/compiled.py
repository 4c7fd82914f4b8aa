"""Functions compiled by numba, for loops that numpy has no single call for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba

MAX_THREADS = numba.get_num_threads()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function`, compiled when it is first called and kept for later processes, where a folder can be written for it.

    options: as numba.njit takes them.
    """
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # a read-only installation without a home: every process compiles for itself
        made = numba.njit(**options)(function)
    return cast(Callable[..., Any], made)


def use_threads(n_threads: int) -> None:
    """Let parallel loops of this thread take so many, as far as there are any."""
    numba.set_num_threads(min(n_threads, MAX_THREADS))
