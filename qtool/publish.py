"""Where a command's result may be written, and a page that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qtool.errors import ConfigError, naming


def check_target(path: Path, option: str, *, overwrite: bool) -> None:
    """ConfigError, in one line, when nothing can or may be written under `path`; `option` is where it was given."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: exists already; give another {option} or --force")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; make it first")


def check_page(path: Path, option: str, endings: Iterable[str], *, overwrite: bool) -> None:
    """As `check_target`, for a file that a browser opens by its ending: no model is ever replaced by a picture."""
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option} {path}: the name must end in {' or '.join(endings)}")
    check_target(path, option, overwrite=overwrite)


def write_page(path: Path, text: str) -> None:
    """Put `text` under `path` in one step; what was there is replaced, and an error leaves it as it was."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with naming(path):
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
