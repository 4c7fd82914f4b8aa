"""A fault campaign: compress runs killed at random moments, disks that are full, files that were corrupted.

It makes its own small random model and needs no other files. It passes only if nothing was lost and nothing was
wrongly accepted: whatever stopped a run, the same command goes on where it was and ends in the bytes of a run in one
go, and every corrupted file is refused (benchmarks.faults_files).
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults_files import Tally, corrupt
from benchmarks.faults_run import BLOCKS, Job, Kill
from benchmarks.tools import print_table

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLED_AGAIN = 0.5  # share of resumed runs that are killed too
SHOWN = 20  # of what was lost; each is also written to stderr when it happens


def main() -> None:
    args = _parser().parse_args()
    # A shell that starts this in the background has it ignore Ctrl-C, and whatever it starts: the signal would be lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started, rng = time.perf_counter(), random.Random(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    job = Job(args.work)
    job.measure()
    steps: Counter[int] = Counter()
    tallies = [
        kill(job, args.kills, rng, steps),
        fill_disks(job, args.full_disks, rng),
        corrupt(job.wanted, job.other, args.work / "corrupted.qtm", args.corrupted, rng),
    ]
    print_table(("what", "survived", "total"), [tally.row() for tally in tallies])
    came = ", ".join(f"{n} after {step}" for step, n in sorted(steps.items()))
    print(f"kills by steps finished, of {BLOCKS + 1}: {came}; {(time.perf_counter() - started) / 60:.0f} minutes")
    if lost := [line for tally in tallies for line in tally.lost]:
        sys.exit("\n".join(lost[:SHOWN]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--corrupted", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the choices; the machine decides what they hit")
    parser.add_argument("--work", type=Path, default=Path("build/faults"), help="folder to write to")
    return parser


def kill(job: Job, n: int, rng: random.Random, steps: Counter[int]) -> Tally:
    """Kill `n` runs; `steps` counts how far each had come."""
    with Tally("kills", n) as tally:
        while tally.total < n:
            job.empty()
            for fault, n_steps, problems in kill_until_finished(job, n - tally.total, rng):
                steps[n_steps] += 1
                tally.add(f"{fault.signal.name} after {fault.delay_s:.2f} s, {n_steps} steps", problems)
    return tally


def kill_until_finished(job: Job, n: int, rng: random.Random) -> list[tuple[Kill, int, list[str]]]:
    """Kill one run and those that go on with it, at most `n` of them, until one ends.  -> kill, steps, problems"""
    killed: list[tuple[Kill, int, list[str]]] = []
    while True:
        fault = draw_kill(job, rng) if not killed or (len(killed) < n and rng.random() < KILLED_AGAIN) else None
        n_before, was_there = job.n_finished(), job.output.exists()
        ended = job.run(fault)
        if fault is None or ended.by_itself:
            lock_may_stay = bool(killed) and killed[-1][0].signal == signal.SIGKILL
            problems = job.finish(ended, n_before, was_there=was_there, lock_may_stay=lock_may_stay)
            if killed:  # the last of them is what this run had to go on from
                killed[-1][2].extend(problems)
            elif fault and problems:
                killed.append((fault, n_before, problems))
            return killed
        problems = job.check_stopped(n_before)
        if fault.signal != signal.SIGKILL and ended.begun and not ended.is_interrupted:
            problems.append(f"not one line that says so: {ended}")
        killed.append((fault, job.n_finished(), problems))


def draw_kill(job: Job, rng: random.Random) -> Kill:
    """Any moment of a run; every other one lies behind the imports, which take half of its time."""
    earliest = rng.choice((0.0, job.imports_s))
    return Kill(rng.choice(SIGNALS), rng.uniform(earliest, job.whole_s))


def fill_disks(job: Job, n: int, rng: random.Random) -> Tally:
    """Let no file of a run grow beyond some size below that of the result, as if the disk were full."""
    with Tally("full disks", n) as tally:
        for _ in range(n):
            job.empty()
            limit = rng.randrange(1, len(job.wanted))
            ended = job.run(limit_bytes=limit)
            n_finished, problems = job.n_finished(), job.check_stopped(0)
            last = (ended.stderr.splitlines() or [""])[-1]
            told = last.startswith("Error: ") and "File too large" in last and "make room" in last
            if ended.code != 1 or ended.stdout or "Traceback" in ended.stderr or not told or job.output.exists():
                problems.append(f"not one line that says so: {ended}")
            problems += job.finish(job.run(), n_finished, was_there=False, lock_may_stay=False)
            tally.add(f"at most {limit:,} bytes a file, {n_finished} steps", problems)
    return tally


if __name__ == "__main__":
    main()
