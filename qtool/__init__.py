"""Compress a causal language model into one small, checksummed, self-describing file.

import qtool
model = qtool.load("model.qtm")
tokenizer = qtool.load_tokenizer("model.qtm")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from formats.plugin_hook import register_when_imported

__all__ = ["__version__", "load", "load_tokenizer"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from formats.embedded import load_tokenizer
    from formats.loader import load

_MODULES = {"load": "formats.loader", "load_tokenizer": "formats.embedded"}


register_when_imported()


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing torch takes seconds, and `qtool --help` does not need it.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'qtool' has no attribute {name!r}")
