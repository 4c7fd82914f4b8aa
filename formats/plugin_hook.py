"""Registers `formats.plugin` with transformers as soon as that chooses quantizers, without importing it before.

transformers takes a second to import and has no entry point for plug-ins; `import qtool` has to be enough.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Now, if transformers is here already."""
    if REGISTRY in sys.modules:
        importlib.import_module("formats.plugin")
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook(MetaPathFinder):
    """Finds one module as others do, to register right behind it; then it is gone."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("formats.plugin")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
