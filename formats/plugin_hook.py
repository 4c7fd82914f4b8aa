"""Registers `formats.plugin` with transformers as soon as that chooses quantizers, without importing it before.

transformers takes a second to import and has no entry point for plug-ins; `import qtool` has to be enough.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Now, if transformers is here already, and whenever it is imported (again)."""
    if REGISTRY in sys.modules:
        _register()
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    """What goes wrong is told, but breaks nobody's transformers."""
    try:
        importlib.import_module("formats.plugin").register()
    except Exception as error:
        warnings.warn(f"qtool: folders of `export --to transformers` cannot be loaded: {error}", stacklevel=2)


class _Hook(MetaPathFinder):
    """Finds one module as the finders behind it do, to register when it has been executed."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = find_spec(name)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
