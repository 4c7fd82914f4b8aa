"""Corrupted copies of a good file: every one has to be refused, by the name of what is wrong with it."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from formats.errors import FormatError
from formats.header import Section
from formats.loader import load
from formats.preamble import PREAMBLE_BYTES, build_preamble, read_preamble
from formats.reader import QtmFile, verify

LOADED = 20  # every so many of them are loaded too: that takes longer
MAX_RUN_BYTES = 4096
NAMED = re.compile(r"(tensor '|file '|header|preamble).*SPEC \d", re.DOTALL)


class Tally:
    """Context manager: survived and total of one kind of fault, with a progress bar; remembers what was lost."""

    def __init__(self, what: str, n: int) -> None:
        self.what, self.total = what, 0
        self.lost: list[str] = []
        self._bar = tqdm(total=n, desc=what)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, fault: str, problems: Sequence[str]) -> None:
        self.total += 1
        if problems:
            self.lost.append(f"{self.what}: {fault}: {'; '.join(problems)}")
            self._bar.write(self.lost[-1], file=sys.stderr)
        self._bar.update()

    def row(self) -> tuple[str, int, int]:
        return self.what, self.total - len(self.lost), self.total


@dataclass(frozen=True, slots=True)
class Original:
    """The bytes of a good file, those of one with the same sections and other values, and where the sections lie."""

    data: bytes
    other: bytes
    sections: list[Section]
    header_offset: int

    def random_run(self, rng: random.Random) -> slice:
        """A stretch of the file; short ones are as likely as long ones."""
        start = rng.randrange(len(self.data))
        return slice(start, start + int(MAX_RUN_BYTES ** rng.random()))


def corrupt(data: bytes, other: bytes, path: Path, n: int, rng: random.Random) -> Tally:
    """Write `n` corrupted copies of `data` to `path`, one after another, and have each refused."""
    with QtmFile(data, "the original") as file:
        original = Original(data, other, file.header.sections(), read_preamble(data).offset_bytes)
    slowest_s = 0.0
    with Tally("corrupted files", n) as tally:
        for index in range(n):
            kind, corruption = rng.choice(list(CORRUPTIONS.items()))
            while (corrupted := corruption(original, rng)) == data:  # zeroed what was zero
                pass
            path.write_bytes(corrupted)
            start = time.perf_counter()
            problems = wrong_answer(verify, path)
            slowest_s = max(slowest_s, time.perf_counter() - start)
            if index % LOADED == 0:
                problems += wrong_answer(load, path)
            tally.add(f"number {index}, {kind}", problems)
    tally.what += f", answered within {slowest_s:.2f} s"
    path.unlink(missing_ok=True)
    return tally


def wrong_answer(check: Callable[[Path], object], path: Path) -> list[str]:
    """What is wrong with the answer to a corrupted file: only a FormatError that says where and why is right."""
    name = check.__name__
    try:
        check(path)
    except FormatError as error:
        message = str(error).removeprefix(f"{path}: ")
        return [] if NAMED.match(message) else [f"{name} does not say what is wrong: {error}"]
    except Exception as error:
        return [f"{name}: {type(error).__name__}: {error}"]
    return [f"{name} accepts it"]


def flip_a_bit(original: Original, rng: random.Random) -> bytes:
    data = bytearray(original.data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zero_a_run(original: Original, rng: random.Random) -> bytes:
    run = original.random_run(rng)
    return _replaced(original.data, run, bytes(len(original.data[run])))


def truncate(original: Original, rng: random.Random) -> bytes:
    return original.data[: rng.randrange(len(original.data))]


def append(original: Original, rng: random.Random) -> bytes:
    return original.data + rng.randbytes(rng.randint(1, MAX_RUN_BYTES))


def swap_two_sections(original: Original, rng: random.Random) -> bytes:
    """Of one size, so that everything else stays where it is."""
    one = rng.choice(original.sections)
    two = rng.choice([section for section in original.sections if section.n_bytes == one.n_bytes])
    swapped = _replaced(original.data, _bytes_of(one), original.data[_bytes_of(two)])
    return _replaced(swapped, _bytes_of(two), original.data[_bytes_of(one)])


def take_a_section_of_another_file(original: Original, rng: random.Random) -> bytes:
    place = _bytes_of(rng.choice(original.sections))
    return _replaced(original.data, place, original.other[place])


def forge_the_header(original: Original, rng: random.Random) -> bytes:
    """Another value in a section's entry, under a digest that is right again."""
    tree = json.loads(original.data[original.header_offset :])
    entry = rng.choice(tree["tensors"] + tree["files"])
    field = rng.choice([field for field in FORGERIES if field in entry])
    entry[field] = FORGERIES[field](entry[field], rng)
    header = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    preamble = build_preamble(original.header_offset, header)
    return preamble + original.data[PREAMBLE_BYTES : original.header_offset] + header


CORRUPTIONS: dict[str, Callable[[Original, random.Random], bytes]] = {
    "a bit flipped": flip_a_bit,
    "a run of bytes zeroed": zero_a_run,
    "truncated": truncate,
    "bytes appended": append,
    "two sections swapped": swap_two_sections,
    "a section of another file": take_a_section_of_another_file,
    "a forged header": forge_the_header,
}
# Each makes the entry one that cannot be right; a shape of the same size, say, would be another good file.
FORGERIES: dict[str, Callable[[Any, random.Random], Any]] = {
    "offset": lambda value, rng: value + rng.choice((-256, -1, 1, 256, 1 << 40)),
    "bytes": lambda value, rng: value + rng.choice((-256, -1, 1, 256, 1 << 40)),
    "sha256": lambda value, rng: rng.randbytes(32).hex(),
    "shape": lambda value, rng: [*value[:-1], value[-1] + rng.choice((-64, 64, 1 << 40))],
    "bits": lambda value, rng: rng.choice([bits for bits in range(10) if bits != value]),
    "group_size": lambda value, rng: rng.choice((0, -value, value // 2, 2 * value)),
    "encoding": lambda value, rng: {"dense": "uniform", "uniform": "dense"}[value],
}


def _bytes_of(section: Section) -> slice:
    return slice(section.offset_bytes, section.offset_bytes + section.n_bytes)


def _replaced(data: bytes, place: slice, by: bytes) -> bytes:
    return data[: place.start] + by + data[place.start + len(by) :]
