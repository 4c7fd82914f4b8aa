"""English that every Python brings along: the language reference of `pydoc_data` and the standard library's
docstrings. Nothing is downloaded and nothing but `pydoc_data.topics` is imported. The text differs between
Python versions, which the sample's SHA-256 shows."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from calibration.errors import CalibrationError

Split = Literal["train", "test"]

# The last document of each five is test, so that both parts cover all subjects. One of eight left test with
# less than 50k tokens on most Python versions, one of six still did on some distributions.
TEST_EVERY = 5

# Parsing is nearly all of the time. Modules with fewer triple quotes than one in this many bytes take 30 % of
# it and hold 14 % of the docstrings' text, so they are left out: 3.4 s becomes 2.4 s.
BYTES_PER_QUOTE = 1000

# Tests and tools hold little prose; `encodings` is 120 tables; `distutils` is absent from Python 3.12 on.
SKIPPED_FOLDERS = frozenset(
    {"distutils", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def builtin_documents(split: Split) -> list[str]:
    """The documents of one part; train and test have no topic and no docstring in common."""
    return [
        document
        for index, document in enumerate(_all_documents())
        if (index % TEST_EVERY == TEST_EVERY - 1) == (split == "test")
    ]


@cache  # parsing takes seconds, and a run that calibrates and evaluates asks for both parts
def _all_documents() -> tuple[str, ...]:
    """Topics by key, then modules by path."""
    groups = _without_duplicates([*_topics(), *_module_docstrings()])
    if not groups:
        raise CalibrationError("builtin: this Python has no sources to read; give a text file instead")
    return tuple("\n\n".join(passages) for passages in groups)


def _without_duplicates(groups: list[list[str]]) -> list[list[str]]:
    """What occurs twice stays where it comes first: copies would stand on both sides of the split."""
    seen: set[str] = set()
    unique = []
    for passages in groups:
        fresh = [passage for passage in dict.fromkeys(passages) if passage not in seen]
        seen.update(fresh)
        unique.append(fresh)
    return [passages for passages in unique if passages]


def _topics() -> Iterator[list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions strip it; half a corpus in silence would be worse
        raise CalibrationError(
            "builtin: this Python comes without pydoc_data.topics; give a text file instead"
        ) from error
    for key in sorted(topics):
        yield [inspect.cleandoc(topics[key])]


def _module_docstrings() -> Iterator[list[str]]:
    for path in _modules(Path(sysconfig.get_path("stdlib"))):
        source = path.read_bytes()
        if source.count(b'"""') * BYTES_PER_QUOTE < len(source):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            module = ast.parse(source)
        yield list(_docstrings(module))


def _modules(folder: Path) -> Iterator[Path]:
    """Pure-Python modules of a folder and, recursively, of the packages in it."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            yield path
        elif (path / "__init__.py").is_file() and not _is_skipped(path.name):
            yield from _modules(path)


def _is_skipped(folder_name: str) -> bool:
    return folder_name.startswith("_") or folder_name in SKIPPED_FOLDERS


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in source order. Only statements are visited: going
    into expressions as `ast.walk` does takes several times as long and finds nothing."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=True)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings(child)
