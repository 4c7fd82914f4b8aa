"""Compress runs that are stopped after a given step."""

from __future__ import annotations

from invoke import refusal, run_qtool

import qtool.journal


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
