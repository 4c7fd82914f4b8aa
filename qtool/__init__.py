"""Compress a causal language model into one small, checksummed, self-describing file.

import qtool
qtool.compress("./my-model", "model.qtm", bits=4)
model = qtool.load("model.qtm")
tokenizer = qtool.load_tokenizer("model.qtm")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from formats.plugin_hook import register_when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from formats.embedded import load_tokenizer
    from formats.loader import load
    from qtool.api import (
        compress,
        dry_run,
        evaluate,
        evaluate_kl,
        evaluate_tasks,
        export,
        generate,
        import_,
        inspect,
        plot,
        verify,
        warm,
    )

__all__ = [
    "__version__",
    "compress",
    "dry_run",
    "evaluate",
    "evaluate_kl",
    "evaluate_tasks",
    "export",
    "generate",
    "import_",
    "inspect",
    "load",
    "load_tokenizer",
    "plot",
    "verify",
    "warm",
]
_ELSEWHERE = {"load": "formats.loader", "load_tokenizer": "formats.embedded"}


register_when_imported()


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing torch takes seconds, and `qtool --help` does not need it.
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "qtool.api")), name)
    raise AttributeError(f"module 'qtool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
