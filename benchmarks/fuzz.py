"""Fuzz the reader with atheris: files that are wrong, and files that are wrong under digests that are right.

`make fuzz` runs it for FUZZ_SECONDS. An input is a whole file; one that is a finding is left in build/fuzz, where
`qtool verify` can read it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from formats.encoding import Dense, align, encoding_from_fields
from formats.errors import FormatError
from formats.header import parse_header, serialise_header
from formats.layer import dequantize
from formats.preamble import PREAMBLE_BYTES, build_preamble
from formats.reader import QtmFile, verify_file

SEEDS = Path(__file__).parents[1] / "tests/formats/golden"
MAX_INPUT_BYTES = 1 << 14
MAX_SECTION_BYTES = 1 << 11  # of one that `relay` makes
LIMITS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=16384"]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 9, 256, 2**31, 2**48, 2**63 - 1, 2**63, 10**30, 0.0, -0.5, 1e308, 5e-324),
    *("", ".", "..", "../x", "/x", "C:x", "é", "\ud800", "\0", "F16", "BF16", "F32", "nf4", "fp4", "fitted"),
    *("dense", "uniform", "codebook", "int8_rows", "trellis", "ternary", "ternary_dict", "ternary_rans"),
    *([], [0], [1], [3, 11], [2**32, 2**32], [1] * 9, [[]], {}, {"": {}}, {"config": {}}),
]
FIELDS = ["name", "shape", "encoding", "offset", "bytes", "sha256", "bits", "group_size", "symmetric", "dtype"]
FIELDS += ["input_scales", "relative_error", "transposed", "tensors", "files", "model", "perm"]
FIELDS += ["stat_bits", "stat_rows", "outliers", "levels", "double_quant", "columns", "memory", "run"]
FIELDS += ["share_low", "share_high", "codewords", "segment", "words"]


def check(data: bytes) -> bool:
    """Whether the reader takes these bytes for a file; fails unless they are one or are refused by FormatError."""
    try:
        file = QtmFile(data, "x.qtm")
        verify_file(file)
    except FormatError as error:
        assert re.match(r"x.qtm: (preamble|header|tensor ['\"]|file ['\"])", str(error)), error
        assert re.search(r"\(SPEC \d", str(error)), error
        return False
    for section in file.header.sections():
        assert len(file.section(section)) == section.n_bytes
    for entry in file.header.tensors:
        uniform = not isinstance(entry.encoding, Dense)
        values = dequantize(file.layer(entry.name)) if uniform else file.dense(entry.name)
        assert values.shape == entry.shape and values.dtype == "float32"
    header = serialise_header(file.header)
    (offset,) = struct.unpack_from("<Q", data, 16)
    assert parse_header(header, offset) == file.header
    return True


# ---- neighbours of a file


def mutated(file: bytes, rng: Random, mutate: Callable[[bytes], bytes]) -> bytes:
    """A neighbour of `file`: some bytes or the header's JSON changed, and most often the digests put right."""
    way = rng.randrange(4)
    parts = split(file)
    if way == 0 or parts is None:
        return mutate(file)
    body, header = parts
    if way == 1:
        header = mutate(header)
    elif way == 2:
        body = mutate(body)
    try:
        tree = json.loads(header)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        return join(body, header)
    if way == 3:
        for _ in range(rng.randrange(1, 4)):
            change(tree, rng)
    if rng.random() < 0.3:
        body = relay(tree, body, rng)
    if rng.random() < 0.9:
        rehash(tree, bytes(PREAMBLE_BYTES) + body)
    return join(body, json.dumps(tree).encode()) if rng.random() < 0.9 else file[:64] + body + header


def split(file: bytes) -> tuple[bytes, bytes] | None:
    """What lies between preamble and header, and the header, where the preamble says."""
    if len(file) < PREAMBLE_BYTES:
        return None
    (offset,) = struct.unpack_from("<Q", file, 16)
    return (file[PREAMBLE_BYTES:offset], file[offset:]) if PREAMBLE_BYTES <= offset <= len(file) else None


def join(body: bytes, header: bytes) -> bytes:
    """A file whose preamble is right about the place and the digest of its header."""
    return build_preamble(PREAMBLE_BYTES + len(body), header) + body + header


def splice(data: bytes, rng: Random) -> bytes:
    """A bit flipped, or a piece cut out, doubled or overwritten: what a fuzzer's own mutation does, in small."""
    if not data:
        return bytes([rng.randrange(256)])
    at, n = rng.randrange(len(data)), rng.randrange(1, 65)
    piece = data[at : at + n]
    changed = bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + n]
    return data[:at] + rng.choice([changed, b"", 2 * piece, bytes(len(piece))]) + data[at + n :]


def change(tree: Any, rng: Random) -> None:
    """Change one node of a JSON tree in place."""
    node = tree
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or rng.random() < 0.2:
            break
        node = node[key]
    value = node[key]
    if isinstance(value, int) and rng.random() < 0.5:
        node[key] = value + rng.choice([-256, -1, 1, 256, value])
    elif rng.random() < 0.5:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif rng.random() < 0.5:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(FIELDS)] = value
    else:
        node.append(value)


def relay(tree: dict[str, Any], body: bytes, rng: Random) -> bytes:
    """Give every section the bytes that its encoding takes and its place behind the last, as a writer would.

    So a changed shape or encoding is not refused for its size, and is decoded.  -> the sections
    """
    end, sections = 192, bytes(192)  # the first section stands at 256
    for entry in [*listed(tree, "tensors"), *listed(tree, "files")]:
        try:
            shape = tuple(entry["shape"]) if "shape" in entry else None
            n_bytes = entry["bytes"] if shape is None else encoding_from_fields(entry).section_bytes(shape)
            if type(n_bytes) is not int or not 0 <= n_bytes <= MAX_SECTION_BYTES:
                continue
        except (FormatError, TypeError, KeyError):
            continue
        sections = sections.ljust(align(end + PREAMBLE_BYTES, 256) - PREAMBLE_BYTES, b"\0")
        entry |= {"bytes": n_bytes, "offset": PREAMBLE_BYTES + len(sections)}
        start = rng.choice([192, rng.randrange(len(body) + 1)])
        sections += body[start : start + n_bytes].ljust(n_bytes, b"\0")
        end = len(sections)
    return sections.ljust(align(end + PREAMBLE_BYTES, 256) - PREAMBLE_BYTES, b"\0")


def rehash(tree: dict[str, Any], file: bytes) -> None:
    """Make every digest right."""
    for entry in [*listed(tree, "tensors"), *listed(tree, "files")]:
        place = (entry.get("offset"), entry.get("bytes"))
        if all(type(number) is int and 0 <= number <= len(file) for number in place):
            entry["sha256"] = hashlib.sha256(file[place[0] : place[0] + place[1]]).hexdigest()


def listed(tree: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The entries of a list in the header that are objects."""
    entries = tree.get(name)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


# ---- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"), help="folder for the corpus and findings")
    args = parser.parse_args()
    corpus = args.work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from benchmarks.fuzz import fuzz; fuzz()", *LIMITS, "-print_final_stats=1"]
    command += [f"-max_total_time={args.seconds}", f"-artifact_prefix={args.work}/finding-", str(corpus), str(SEEDS)]
    start = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            print(line, end="", flush=True)
    report = "".join(lines)
    executions = int(re.findall(r"stat::number_of_executed_units: (\d+)|$", report)[0] or 0)
    coverage = re.findall(r"cov: (\d+)", report)[-1:]
    n_findings = len(list(args.work.glob("finding-*")))
    seconds = time.monotonic() - start
    print(
        f"{executions} executions, {seconds:.0f} s, coverage {''.join(coverage)}, {n_findings} findings in {args.work}"
    )
    sys.exit(process.returncode or bool(n_findings))


def fuzz() -> None:
    """Run libFuzzer in this process; it ends the process."""
    import atheris

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        return mutated(data, rng, lambda part: atheris.Mutate(part, max(len(part) + 64, 256)))[:max_size]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
