"""How much memory this process holds, and sizes as people write them."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

from qtool.errors import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: str | int, option: str) -> int:
    """Bytes of `2GB`, `1.5GiB`, `800M` or a plain number."""
    text = str(size)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?|)B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"{option} {text}: not a size; write it as 2GB, 1.5GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def rss_bytes() -> int:
    """Resident set of this process now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak_rss_bytes()


def reset_peak() -> None:
    """Let `peak_rss_bytes` count from now, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Largest resident set of this process, since `reset_peak` or its start."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent that started us, whose peak outlives exec
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
