"""Compress runs that are stopped after a given step."""

from __future__ import annotations

import os

from invoke import refusal, run_qtool

import formats.writer
import qtool.journal
from qtool.states import HiddenStates


def stop_after(monkeypatch, n_steps, error):
    """Let a run finish `n_steps` steps (what lies outside the blocks is the first), then raise `error`."""
    commit = qtool.journal.Journal.commit

    def stopping(journal, *args):
        if len(journal.steps) == n_steps:
            raise error
        commit(journal, *args)

    monkeypatch.setattr(qtool.journal.Journal, "commit", stopping)


def refusal_of_resumed(command):
    """The line that ends a run which said before that it goes on."""
    result = run_qtool(*command)
    assert result.exit_code == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("resumes after ")
    return last.removeprefix("Error: ")


def interrupt(monkeypatch, command, n_steps=2):
    with monkeypatch.context() as patched:
        stop_after(patched, n_steps, KeyboardInterrupt())
        return refusal(*command)


def die_at(n, command):
    """Run in a child that dies, as by kill -9, before its nth act that changes what is on the disk; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            _die_before_act(n)
            run_qtool(*command)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _die_before_act(n):
    acts = []

    def counted(act):
        def counting(*args, **kwargs):
            acts.append(act)
            if len(acts) == n:
                os._exit(9)
            return act(*args, **kwargs)

        return counting

    for name in ("fsync", "replace", "link", "unlink", "truncate", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    Writer = formats.writer.Writer
    Writer._append = counted(Writer._append)  # half a file, and half a line
    HiddenStates._path = counted(HiddenStates._path)
