"""What can go wrong with a file, and with what runs it."""

from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file or a value that breaks SPEC.md; the message names the place, the value and the paragraph."""


class KernelError(RuntimeError):
    """A device, or what is installed for it, that cannot run a file; the message names the fix."""


@contextmanager
def error_context(label: str) -> Iterator[None]:
    """Put `label: ` before the message of a FormatError raised inside."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{label}: {error}") from error
