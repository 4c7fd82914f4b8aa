"""What can go wrong, one class per place the user has to look.

QtoolError
├── ConfigError       an option, or a combination of options, that makes no sense
├── CheckpointError   the source model: missing, truncated, not a model, NaN in a weight
└── QuantizeError     the numerics: a Hessian that cannot be factored, a non-finite activation
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class QtoolError(Exception):
    """Base of the errors a user can act on; the message is one line: the thing, the value, the fix."""


class ConfigError(QtoolError):
    pass


class CheckpointError(QtoolError):
    pass


class QuantizeError(QtoolError):
    pass


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a system error say which file it was about: a write that fails does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def either(values: Iterable[object], word: str = "or") -> str:
    """Values as a message lists them: a, b or c."""
    *most, last = map(str, values)
    return f"{', '.join(most)} {word} {last}" if most else last
