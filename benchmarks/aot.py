"""Kernels compiled for a GPU that is not there, by the launches of `triton_launch`; read is what ptxas made of them."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from formats.kernels import triton_codes, triton_planes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SOURCE = re.compile(r'^\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
WIDE_LOADS = re.compile(r"(LDG|LDGSTS)\..*128")
TENSOR_CORES = re.compile(r"[A-Z]*MMA\b")
FROM_GLOBAL = re.compile(r"(LDG|LDGSTS)\.")
NARROW_STORES = re.compile(r"STS\.U(8|16)\b")
ATOMICS = re.compile(r"(ATOMG?|REDG?)\b")  # in global memory; those of shared memory give out room for results
INSTRUCTIONS_OF_A_LOAD = 5
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one launch would run."""

    kernel: str
    registers: int  # of a thread
    spilled: int  # instructions that go to local memory
    shared: int  # bytes of a program
    instructions: int
    wide_loads: int  # of 16 bytes, from global memory
    code_loads: int  # of codes
    wide_code_loads: int  # those of 16 bytes
    narrow_stores: int  # of less than 4 bytes, to shared memory
    tensor_cores: int  # instructions for them
    atomics: int  # whose sums come in any order


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles for sm_`capability` and runs nothing; the list gets what it compiled."""
    found: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        found.append(_read(self.fn.__name__, compiled))
        return compiled

    driver.set_active(_NoDriver(capability))  # type: ignore[no-untyped-call]
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch


class _NoDriver:
    """As much of a GPU as compiling for it takes."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # what is compiled is kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def _read(name: str, compiled: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage, listing = _tool("cuobjdump", "-res-usage", cubin), _tool("nvdisasm", "-c", "-g", cubin)
    found = list(_instructions(listing))
    names = [each for each, _ in found]
    codes = [each for each, place in found if place in _lines_of_codes() and FROM_GLOBAL.match(each)]
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not names:
        raise RuntimeError(f"{name}: cannot read what ptxas made of it: {usage!r}")
    return Compiled(
        kernel=name,
        registers=int(registers.group(1)),
        spilled=sum(bool(LOCAL_MEMORY.match(each)) for each in names),
        shared=compiled.metadata.shared,
        instructions=len(names),
        wide_loads=sum(bool(WIDE_LOADS.match(each)) for each in names),
        code_loads=len(codes),
        wide_code_loads=sum(bool(WIDE_LOADS.match(each)) for each in codes),
        narrow_stores=sum(bool(NARROW_STORES.match(each)) for each in names),
        tensor_cores=sum(bool(TENSOR_CORES.match(each)) for each in names),
        atomics=sum(bool(ATOMICS.match(each)) for each in names),
    )


def _instructions(listing: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """(name, where it is written) of each instruction; of calls inlined into one another, the innermost counts."""
    place, is_comment = ("", 0), False
    for line in listing.splitlines():
        if source := SOURCE.match(line):
            if not is_comment:
                place = Path(source["file"]).name, int(source["line"])
            is_comment = True
            continue
        is_comment = False
        if instruction := INSTRUCTION.match(line):
            yield instruction.group(1), place


@functools.cache
def _lines_of_codes() -> frozenset[tuple[str, int]]:
    """Where the kernels read codes: in three functions, and a few lines behind them, where nothing else is read.

    Triton writes a load as several instructions, zeros for what is masked first; each counts as a line further on.
    """
    places = set[tuple[str, int]]()
    for function in (triton_planes.words_of, triton_planes.bytes_of, triton_codes.path_words):
        lines, first = inspect.getsourcelines(function.fn)
        file = Path(inspect.getsourcefile(function.fn) or "").name
        places |= {(file, first + i) for i in range(len(lines) + INSTRUCTIONS_OF_A_LOAD)}
    return frozenset(places)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
