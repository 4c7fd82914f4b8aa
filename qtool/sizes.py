"""What a tensor costs in the file, and bytes as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from formats.encoding import Encoding, Shape, align
from formats.encoding.trellis import RUN_ROWS
from formats.header import SECTION_ALIGNMENT


def stored_bytes(encoding: Encoding, shape: Shape) -> int:
    """Bytes of a tensor's section with the padding up to the next one."""
    return align(encoding.section_bytes(shape), SECTION_ALIGNMENT)


def bits_per_weight(tensors: Iterable[tuple[Encoding, Shape]]) -> float:
    """Bits stored per parameter over all tensors, scales, zeros and padding counted; 0 when there are none."""
    pairs = list(tensors)
    n_parameters = sum(math.prod(shape) for _, shape in pairs)
    return 8 * sum(stored_bytes(*pair) for pair in pairs) / n_parameters if n_parameters else 0.0


def format_bytes(n_bytes: float) -> str:
    """Bytes in the largest unit that leaves a number of at least one: 93.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


MAX_RUN = 256


def run_length(out_features: int) -> int:
    """Rows of a trellis path: as few paths as MAX_RUN allows, since a path's start is less free than its rest."""
    n_runs = -(-out_features // MAX_RUN)
    return -(-out_features // (n_runs * RUN_ROWS)) * RUN_ROWS
