"""Which blocks are fastest on this GPU: a few are tried for each class of shapes, and the best is kept in a file.

Nothing is tried when a model runs: what the file does not know is launched with `blocks_for`. `qtool warm` tries.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from formats.encoding import WORD_BITS
from formats.kernels.blocks import (
    DECODED,
    LEAST_INPUTS,
    LEAST_OF_TENSOR_CORES,
    MOST_SPLITS,
    Blocks,
    blocks_for,
    ceil_div,
    tile_for,
)
from formats.kernels.layout import TRELLIS, Layout

LARGEST_CLASS = 4096
CLASSES = [1 << power for power in range(LARGEST_CLASS.bit_length())]
DECODED_TRIED_FROM = 16
"""So many tokens; from `DECODED_FROM` on it is what is taken untried."""
VERSION = 4
"""Of the kernels: raised when they change so that old timings mislead."""


def token_class(n_tokens: int) -> int:
    """The power of two that stands for so many tokens."""
    return min(int(triton.next_power_of_2(n_tokens)), LARGEST_CLASS)


def candidates(layout: Layout, n_tokens: int, n_outputs: int, has_tiles: bool = True) -> list[Blocks]:
    """The blocks that are tried: those of `blocks_for` first, then smaller ones and other splits.

    None has larger blocks than the first, whose registers and shared memory are known to suffice.
    """
    n_tokens = token_class(n_tokens)
    first = blocks_for(layout, n_tokens, n_outputs, has_tiles)
    if first == DECODED:
        return [DECODED, *([tile_for(layout, n_tokens, n_outputs)] if has_tiles else [])]
    most = min(ceil_div(layout.n_inputs, first.inputs), MOST_SPLITS)
    least_outputs = WORD_BITS if layout.kind == TRELLIS else LEAST_OF_TENSOR_CORES if first.is_tile else 1
    tried = [
        first,
        replace(first, splits=min(2 * first.splits, most)),
        replace(first, splits=max(first.splits // 2, 1)),
        replace(first, outputs=max(first.outputs // 2, least_outputs)),
        replace(first, inputs=max(first.inputs // 2, LEAST_INPUTS)),
    ]
    return list(dict.fromkeys([*tried, *([DECODED] if n_tokens >= DECODED_TRIED_FROM else [])]))


@functools.lru_cache(maxsize=4096)
def choose(layout: Layout, n_tokens: int, n_outputs: int, device: torch.device, has_tiles: bool = True) -> Blocks:
    """The blocks to launch with: what was found fastest here, or else those of `blocks_for`."""
    tried = candidates(layout, n_tokens, n_outputs, has_tiles)
    if device.type == "cuda":
        found = known(cache_file(device)).get(class_key(layout, n_tokens, n_outputs))
        # Not what the file says, which may be equal and of other types.
        return next((blocks for blocks in tried if blocks == found), tried[0])
    return tried[0]


def tune(
    layout: Layout,
    n_tokens: int,
    n_outputs: int,
    device: torch.device,
    time: Callable[[Blocks], float],
    has_tiles: bool = True,
) -> tuple[Blocks, dict[Blocks, float]]:
    """The fastest candidate by `time` (any unit), from now on chosen and in the file; and what each took."""
    seconds = {blocks: time(blocks) for blocks in candidates(layout, n_tokens, n_outputs, has_tiles)}
    best = min(seconds, key=seconds.__getitem__)
    known(cache_file(device))[class_key(layout, n_tokens, n_outputs)] = best
    choose.cache_clear()
    return best, seconds


def class_key(layout: Layout, n_tokens: int, n_outputs: int) -> str:
    """Shapes that share their blocks: one layout, so many outputs, and a class of tokens."""
    return f"{token_class(n_tokens)} tokens, {n_outputs} outputs, {', '.join(map(str, layout))}"


@functools.cache
def known(path: Path) -> dict[str, Blocks]:
    """What a file says of a kind of GPU. One that cannot be read is as none: it holds nothing but timings."""
    try:
        rows = json.loads(path.read_text())
        return {key: Blocks(**values) for key, values in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def save(device: torch.device) -> Path:
    """Write what is known; other processes see the old file or the new one."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    rows = {key: asdict(blocks) for key, blocks in sorted(known(path).items())}
    try:
        part.write_text(json.dumps(rows, indent=0) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def cache_file(device: torch.device) -> Path:
    """Below the user's cache folder, one for each kind of GPU and version of Triton and of the kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    safe = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Path(base) / "qtool" / f"blocks-{safe}-triton-{triton.__version__}-v{VERSION}.json"
