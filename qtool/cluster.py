"""Work is done by the workers of a Ray cluster: its object store carries it, it is done again where a worker dies."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from types import TracebackType
from typing import Any

import torch

import qtool
from qtool.errors import ConfigError
from qtool.numerics import exact_float32
from qtool.solve import Solved, Work, solve

CONNECT_SECONDS = 5
RETRIES = 3
"""Of work whose worker dies; an error of its own is told at once."""


class RayCluster:
    """Context manager; `address` as ray.init takes it, or `local` for workers on this machine."""

    is_elsewhere = True

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--cluster {address}: needs the extra: pip install 'qtool[cluster]'") from error
        self._ray: Any = ray
        self._address = address
        self._threads = torch.get_num_threads()  # sums are rounded by them: the same everywhere gives the same bytes
        self.workers = 1

    def __enter__(self) -> RayCluster:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # where Ray says that a worker died; results go to stdout
            self._connect()
            self._stack = stack.pop_all()
        return self

    def _connect(self) -> None:
        self._is_own = not self._ray.is_initialized()
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of work that nobody waits for after an error
        self._check_reachable()
        options: dict[str, Any] = {"include_dashboard": False} if self._address == "local" else {}
        try:
            if self._is_own:
                self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:
            raise self._unreachable(error) from error
        cpus = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        self.workers = sum(n // self._threads for n in cpus)
        if not self.workers:
            raise ConfigError(
                f"--cluster {self._address}: no machine of it has the {self._threads} CPUs that this process computes "
                f"with; set OMP_NUM_THREADS to {max(cpus, default=0)} or less"
            )
        remote = self._ray.remote(max_retries=RETRIES, num_cpus=self._threads, retry_exceptions=False)
        self._remote = remote(_solve_there)

    def _check_reachable(self) -> None:
        """Ray itself takes minutes to say that nobody is there."""
        host, separator, port = self._address.removeprefix("ray://").rpartition(":")
        if separator and port.isdigit():
            try:
                socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            except (OSError, OverflowError) as error:
                raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> ConfigError:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return ConfigError(f"--cluster {self._address}: cannot be reached ({reason}); start it by ray start")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._is_own:
                self._ray.shutdown()

    def start(self, works: Iterable[Work]) -> Iterator[Solved]:
        """As `Solver.start`; all work is sent before anything is taken: what cannot be kept in memory, Ray spills."""
        sent: deque[tuple[Work, Any]] = deque()
        for work in works:
            reference = self._remote.remote(work, self._threads, versions())
            sent.append((replace(work, weights=[]), reference))
        return self._taken(sent)

    def _taken(self, sent: deque[tuple[Work, Any]]) -> Iterator[Solved]:
        while sent:
            yield from self._received(*sent.popleft())

    def _received(self, work: Work, reference: Any) -> Iterator[Solved]:
        errors = self._ray.exceptions
        try:
            solved: list[Solved] = self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--cluster {self._address}: {work.names[0]}: given up after {RETRIES + 1} tries: {reason}"
            ) from error
        for index, one in enumerate(solved):
            yield replace(one, stats=work.stats[index if work.alike else 0])


def count_workers(address: str) -> int:
    """How many workers a cluster has for a run; ConfigError unless it can be reached and one that is asked has all that
    is needed, in the right versions.
    """
    with RayCluster(address) as cluster:
        for _ in cluster.start([Work(names=[], weights=[], specs=[], stats=[None])]):
            pass
        return cluster.workers


def versions() -> dict[str, str]:
    """What has to be alike on all machines."""
    libraries = {name: version(name) for name in ("numpy", "numba")}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"qtool": qtool.__version__, "torch": torch.__version__, "instructions": instructions} | libraries


def _solve_there(work: Work, n_threads: int, wanted: dict[str, str]) -> list[Solved]:
    """`solve` on a worker; what it is given belongs to Ray, and is not to be changed."""
    if (own := versions()) != wanted:
        raise ConfigError(f"--cluster: a worker has {own}, this run {wanted}; install the same on all machines")
    torch.set_num_threads(n_threads)
    with exact_float32():
        mine = replace(work, weights=[weight.clone() for weight in work.weights])
        return [replace(one, stats=None) for one in solve(mine)]
