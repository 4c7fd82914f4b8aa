"""How numbers are computed everywhere (float32 in full precision, no gradients), and what libraries may print."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products in full precision, without gradients; as before afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice from transformers: our own bar and messages say what matters."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # logging.CRITICAL
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def release_free_memory() -> None:
    """Hand what the allocator holds free back to the system.

    Layers leave holes of many sizes behind; glibc keeps them, and a run over 30 blocks grows by half without this.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
