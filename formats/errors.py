"""The one error of the file format."""

from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file or a value that breaks SPEC.md; the message names the place, the value and the paragraph."""


@contextmanager
def error_context(label: str) -> Iterator[None]:
    """Put `label: ` before the message of a FormatError raised inside."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{label}: {error}") from error
