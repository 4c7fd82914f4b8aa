"""Compress a causal language model into one small, checksummed, self-describing file.

import qtool
model = qtool.load("model.qtm")
tokenizer = qtool.load_tokenizer("model.qtm")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["__version__", "load", "load_tokenizer"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from formats.loader import load, load_tokenizer


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing torch takes seconds, and `qtool --help` does not need it.
    if name in ("load", "load_tokenizer"):
        from formats import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'qtool' has no attribute {name!r}")
