"""What the most expensive hostile files cost the reader: each is refused in under a second and under 200 MB.

Every digest in these files is right: an attacker can compute one. Each file is opened and verified in a process of
its own, whose whole peak memory counts, interpreter included.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tools import Limits, parser, print_table
from formats.encoding import Codebook, Encoding, Trellis, Uniform, align
from formats.encoding.codebook import FITTED
from formats.encoding.trellis import RUN_ROWS
from formats.preamble import MAX_HEADER_BYTES, build_preamble
from formats.strict_json import MAX_ENTRIES, MAX_ENTRY_CHARS, MAX_FREE_CHARS

MAX_SECONDS, MAX_MB = 1.0, 200.0
FREE = ("model", "provenance", "quality", "recipe")
EMPTY = {name: "{}" for name in FREE} | {"tensors": "[]", "files": "[]"}
OPEN_AND_VERIFY = """
import sys, time
from pathlib import Path
from formats.reader import verify
for path in sys.argv[1:]:
    start, refusal = time.perf_counter(), ""
    try:
        verify(path)
    except ValueError as error:
        refusal = type(error).__name__ + ": " + str(error)
    elapsed_s = time.perf_counter() - start
    print(elapsed_s, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], refusal)
"""


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    limits, rows = Limits(), []
    for name, attack in ATTACKS.items():
        path = args.work / "hostile.qtm"
        path.write_bytes(attack())
        seconds, peak_mb, refusal = cost_of(path)
        limits.at_most(f"{name}: seconds", seconds, MAX_SECONDS)
        limits.at_most(f"{name}: MB", peak_mb, MAX_MB)
        limits.at_most(f"{name}: not refused", not refusal.startswith("FormatError: "), 0)
        rows.append((name, f"{seconds:.2f} s", f"{peak_mb:.0f} MB", refusal.partition("hostile.qtm: ")[2]))
        path.unlink()
    print_table((f"file (limits: {MAX_SECONDS:g} s, {MAX_MB:g} MB)", "time", "peak", "refused with"), rows)
    limits.finish()


def cost_of(path: Path) -> tuple[float, float, str]:
    """Seconds to refuse a file, peak resident MB of the process, and the refusal."""
    command = [sys.executable, "-c", OPEN_AND_VERIFY, str(path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    seconds, peak_kb, refusal = output.split(" ", 2)
    return float(seconds), int(peak_kb) * 1024 / 1e6, refusal.strip()


def with_header(header: bytes, sections: bytes = b"") -> bytes:
    """A file of these bytes, with a preamble that is right about them; `sections` begin at byte 256."""
    offset = align(256 + len(sections), 256)
    body = bytes(256 - 64) + sections
    return build_preamble(offset, header) + body.ljust(offset - 64, b"\0") + header


def with_members(sections: bytes = b"", **members: str) -> bytes:
    """A file whose header has these members, written as JSON already; empty ones where nothing is given."""
    text = ",".join(f'"{name}":{value}' for name, value in (EMPTY | members).items())
    return with_header(f"{{{text}}}".encode(), sections)


def filled(item: str, size: int, brackets: str = "[]") -> str:
    """A list or object of as many `item` as fit `size` characters; `#` in it becomes its number."""
    n = (size - 2) // (len(item.replace("#", "0" * 7)) + 1)
    items = (item.replace("#", f"{i:07}") for i in range(n)) if "#" in item else [item] * n
    return brackets[0] + ",".join(items) + brackets[1]


def deep(n: int) -> str:
    return "[" * n + "]" * n


def tensors(n: int, last: str = '{"name":"last"}') -> str:
    """`n` good entries of two bytes each, 256 apart, and a last one."""

    def entries() -> Iterator[str]:
        digest = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"  # of two zero bytes
        for i in range(n):
            yield (
                f'{{"bytes":2,"dtype":"F16","encoding":"dense","name":"model.layers.{i}.mlp.experts.{i}.down_proj.weight"'
                f',"offset":{256 + 256 * i},"relative_error":0.00123456789012345,"sha256":"{digest}","shape":[1,1]}}'
            )

    return "[" + ",".join([*entries(), last]) + "]"


def quantized(n: int, encoding_of: Callable[[int], Encoding]) -> bytes:
    """`n` good entries, no two of which have a layout in common, and a bad one; encoding_of: of a group size."""
    entries, end = [], 0
    pairs = ((n_in, group_size) for n_in in itertools.count(1) for group_size in range(1, n_in + 1))
    for i, (n_in, group_size) in enumerate(itertools.islice(pairs, n)):
        encoding = encoding_of(group_size)
        offset, n_bytes = align(end, 256), encoding.section_bytes((1, n_in))
        place = {"name": f"{i}", "offset": 256 + offset, "bytes": n_bytes, "sha256": "0" * 64, "shape": [1, n_in]}
        entries.append(json.dumps(place | encoding.fields(), separators=(",", ":")))
        end = offset + n_bytes
    return with_members(bytes(end), tensors=f"[{','.join(entries)},{{}}]")


def everywhere(value: str) -> dict[str, str]:
    """The same value in all four free objects, and a fault behind them."""
    return {name: f'{{"x":{value}}}' for name in FREE} | {"files": "[0]"}


ALL_PARTS: dict[str, Any] = {"input_scales": True, "stat_bits": 7, "stat_rows": 1, "outliers": 1}
LAYOUTS: dict[str, Callable[[int], Encoding]] = {
    "uniform": lambda g: Uniform(bits=7, group_size=g, symmetric=False, input_scales=True),
    "uniform, all parts": lambda g: Uniform(bits=7, group_size=g, symmetric=False, **ALL_PARTS),
    "codebook": lambda g: Codebook(
        bits=7, levels=FITTED, group_size=g, double_quant=True, input_scales=True, outliers=1
    ),
    "trellis": lambda g: Trellis(bits=6, memory=9, run=RUN_ROWS, group_size=g, **ALL_PARTS),
}
QUARTER = MAX_FREE_CHARS // 4 - 64
ATTACKS: dict[str, Callable[[], bytes]] = {
    "one string": lambda: with_header(b'"' + bytes(MAX_HEADER_BYTES - 2) + b'"'),
    "white space": lambda: with_header(b" " * MAX_HEADER_BYTES),
    "empty lists": lambda: with_members(**everywhere(filled("[]", QUARTER))),
    "empty objects": lambda: with_members(**everywhere(filled("{}", QUARTER))),
    "objects with one key": lambda: with_members(**everywhere(filled('{"":0}', QUARTER))),
    "keys": lambda: with_members(**everywhere(filled('"#":0', QUARTER, "{}"))),
    "keys and strings": lambda: with_members(**everywhere(filled('"#":"#"', QUARTER, "{}"))),
    "a character of four bytes": lambda: with_members(**everywhere('["😀",' + filled('"#"', QUARTER - 9)[1:])),
    "a key that stands twice": lambda: with_members(model=filled('"#":0', QUARTER, "{}")[:-1] + ',"0000000":0}'),
    "floats": lambda: with_members(**everywhere(filled("1e9", QUARTER))),
    "integers": lambda: with_members(**everywhere(filled("12345", QUARTER))),
    "integers of 308 digits": lambda: with_members(**everywhere(filled("9" * 308, QUARTER))),
    "an integer of a million digits": lambda: with_members(model=f'{{"x":{"9" * QUARTER}}}'),
    "a number of a million digits": lambda: with_members(**everywhere("0." + "1" * (QUARTER - 2))),
    "escaped surrogates": lambda: with_members(**everywhere(filled(r'"\ud83d\ude00"', QUARTER))),
    "lists to depth 63": lambda: with_members(**everywhere(filled(deep(61), QUARTER))),
    "a list in a list, half a million deep": lambda: with_members(model=f'{{"x":{deep(QUARTER // 2)}}}'),
    "an object in an object, 100,000 deep": lambda: with_members(model='{"x":' * 100_000 + "1" + "}" * 100_000),
    "one entry after another, all empty": lambda: with_members(tensors=filled("{}", MAX_HEADER_BYTES // 2)),
    "entries of the longest kind": lambda: with_members(
        tensors=tensors(900, '{"name":"x","bits":[' + "9," * (MAX_ENTRY_CHARS // 2 - 30) + "9]}")
    ),
    "entries with colons": lambda: with_members(tensors=tensors(MAX_ENTRIES - 1).replace("model.layers", "m:::::::")),
    "as many good tensors as there may be, the last bad": lambda: with_members(
        bytes(256 * MAX_ENTRIES), tensors=tensors(MAX_ENTRIES - 1)
    ),
    **{
        f"as many of {kind}, none like another, the last bad": partial(quantized, MAX_ENTRIES - 1, encoding_of)
        for kind, encoding_of in LAYOUTS.items()
    },
    "good tensors, and lists to depth 63": lambda: with_members(
        bytes(256 * MAX_ENTRIES), tensors=tensors(MAX_ENTRIES - 2), **everywhere(filled(deep(61), QUARTER))
    ),
    "one tensor more than there may be": lambda: with_members(bytes(256 * MAX_ENTRIES), tensors=tensors(MAX_ENTRIES)),
}


if __name__ == "__main__":
    main()
