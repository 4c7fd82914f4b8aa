"""How a command ends that did not succeed: one line on stderr, exit code 1, no traceback."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from calibration.errors import CalibrationError
from formats.errors import FormatError, KernelError
from qtool.errors import QtoolError

DOMAIN_ERRORS = (QtoolError, CalibrationError, FormatError, KernelError)


class CommandGroup(click.Group):
    """Turns every error that a user can act on into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        received: list[int] = []
        try:
            with _interrupted_by_signals(received):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            raise  # whoever reads our output has seen enough; click ends quietly
        except (Exception, KeyboardInterrupt) as error:
            # Libraries turn an interrupt into whatever they raise when, say, an import of theirs fails.
            is_interrupted = bool(received) or isinstance(error, KeyboardInterrupt)
            message = f"interrupted; {outlook(error)}" if is_interrupted else _explain(error)
            if message is None:
                raise
            raise click.ClickException(message) from error


def _explain(error: BaseException) -> str | None:
    """The line for an error that a user can act on; None for one that is ours."""
    if isinstance(error, DOMAIN_ERRORS):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return _describe_os_error(error)
    # torch has no exception of its own for memory that the CPU allocator does not get.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return f"out of memory; use a shorter --seq-len; {outlook(error)}"
    return None


def outlook(error: BaseException) -> str:
    """What an interrupted command left: a run says so in a note on its error."""
    seen: BaseException | None = error
    while seen is not None:  # a second Ctrl-C, while the first is being seen to, has the first behind it
        if notes := getattr(seen, "__notes__", None):
            return str(notes[0])
        seen = seen.__context__
    return "nothing was left behind"


@contextmanager
def _interrupted_by_signals(received: list[int]) -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with its one line; only the main thread can see to that."""

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}{error.strerror}; {outlook(error)}, make room and run again"
    kept = f"; {outlook(error)}" if hasattr(error, "__notes__") else ""
    return f"{where}{error.strerror or error}{kept}"
