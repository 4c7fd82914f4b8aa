"""What the GPU kernels compile to, without a GPU: registers, spills, shared memory, wide loads, tensor cores.

    python -m benchmarks.kernels [--sm 80 90] [--update]

Each is compiled with the blocks it would be launched with. Fails when a kernel spills, needs more than a multiprocessor
has or adds in any order; when it loads codes by less than 16 bytes a thread, leaves the tensor cores idle or hands them
weights two bytes at a time (but for the trellis, whose codes lie across); and, with the version of Triton that
`kernels.json` was made by, when a figure of that table has grown worse.
`--update` writes the table's rows of these architectures anew.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.tools import Limits, print_table
from formats.encoding import Affine, Codebook, Int8Rows, MatrixEncoding, TernaryDict, TernaryRans, Trellis, Uniform

TABLE = Path(__file__).with_name("kernels.json")
# By capability: bytes of shared memory that one program can have (CUDA programming guide, table of capabilities).
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SHAPE = (4096, 4096)
WIDE_SHAPE = (16384, 4096)  # programs enough for the widest blocks
ODD_SHAPE = (1, 203)
ROWS, ODD = -1, -2  # instead of tokens: rows by their numbers, one token of ODD_SHAPE
SOME_WORSE = 1.1
SOME_NARROW = 2  # scales of inputs, not weights


def _uniform(bits: int, **fields: Any) -> Uniform:
    return Uniform(**({"bits": bits, "group_size": 128, "symmetric": False, "input_scales": True} | fields))


SPQR = _uniform(3, group_size=16, stat_bits=3, stat_rows=16, outliers=80_000)
NF4 = Codebook(bits=4, group_size=64, levels="nf4", double_quant=True)
FITTED = Codebook(bits=3, group_size=64, levels="fitted")
TRELLIS = Trellis(bits=3, memory=9, run=256, group_size=128, input_scales=True)
TERNARY = {
    "ternary, dictionary": TernaryDict(share_low=20, share_high=20, codewords=770_000, input_scales=True),
    "ternary, rANS": TernaryRans(segment=4100, words=660_000, input_scales=True),
}
FEW = {
    **{f"{bits} bits": _uniform(bits) for bits in range(2, 9)},
    "SpQR, 3 bits": SPQR,
    "NF4, double quantization": NF4,
    "fitted, 3 bits": FITTED,
    "int8, 64 columns": Int8Rows(columns=64),
    "trellis, 3 bits": TRELLIS,
    "Q4_K": Affine(bits=4, group_size=32, symmetric=False, stat_bits=6, stat_groups=8),
    "Q6_K": Affine(bits=6, group_size=16, symmetric=True, stat_bits=8, stat_groups=16),
    "4 bits, ordered": _uniform(4, input_order=True, input_scales=False),
    "Q4_1": Affine(bits=4, group_size=32, symmetric=False),
}
FEWER = "7 bits", "6 bits", "5 bits"
MANY = {name: encoding for name, encoding in FEW.items() if name not in FEWER}
DECODED = "4 bits", "SpQR, 3 bits", "int8, 64 columns", "trellis, 3 bits", "Q4_K", "4 bits, ordered"
WIDE, FLOAT16, TILE = "wide", "float16", "by tiles"  # how a case's name ends; the last: as `qtool warm` tries it
CASES: dict[str, tuple[MatrixEncoding, int]] = {
    **{f"{name}, 1 token": (encoding, 1) for name, encoding in FEW.items()},
    **{f"{name}, 2 tokens": (FEW[name], 2) for name in ("3 bits", "7 bits", "SpQR, 3 bits")},
    **{
        f"{name}, 8 tokens": (FEW[name], 8)
        for name in ("4 bits", "3 bits", "SpQR, 3 bits", "trellis, 3 bits", "Q4_K", "4 bits, ordered")
    },
    **{f"{name}, {n} tokens": (encoding, n) for n in (16, 32) for name, encoding in MANY.items()},
    **{f"{name}, 64 tokens": (FEW[name], 64) for name in ("4 bits", "2 bits")},
    **{
        f"{name}, 32 tokens, {WIDE}": (FEW[name], 32)
        for name in ("4 bits", "3 bits", "8 bits", "SpQR, 3 bits", "NF4, double quantization")
    },
    f"4 bits, 16 tokens, {FLOAT16}": (FEW["4 bits"], 16),
    **{
        f"{name}, 256 tokens, {TILE}": (FEW[name], 256)
        for name in ("4 bits", "3 bits", "8 bits", "SpQR, 3 bits", "NF4, double quantization", "Q6_K")
    },
    **{f"{name}, decode": (FEW[name], 0) for name in DECODED},
    **{f"{name}, rows": (FEW[name], ROWS) for name in DECODED},
    **{f"{name}, {n} token{'s' * (n > 1)}": (TERNARY[name], n) for name in TERNARY for n in (1, 8)},
    **{f"{name}, {what}": (TERNARY[name], n) for name in TERNARY for what, n in (("decode", 0), ("rows", ROWS))},
    "ternary, rANS, segments, 1 token": (TernaryRans(segment=1370, words=660_000), 1),
    "symmetric, odd, 1 token": (Uniform(bits=4, group_size=24, symmetric=True), ODD),
    "FP4, two levels, odd, 1 token": (Codebook(bits=4, group_size=30, levels="fp4", stat_bits=4, stat_rows=8), ODD),
}


def compile_case(name: str, capability: int) -> list[dict[str, Any]]:
    """Every kernel that one call launches."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what is kept has the lines of an earlier text
    import torch

    from benchmarks.aot import compiling_for
    from formats.kernels import triton_launch
    from formats.kernels.blocks import tile_for
    from formats.kernels.layout import layout_of

    torch.set_num_threads(1)
    encoding, n_tokens = CASES[name]
    shape = ODD_SHAPE if n_tokens == ODD else WIDE_SHAPE if name.endswith(WIDE) else SHAPE
    section = torch.empty(encoding.section_bytes(shape), dtype=torch.uint8)
    dtype = torch.float16 if capability < 80 or name.endswith(FLOAT16) else torch.bfloat16
    with compiling_for(capability) as compiled:
        if n_tokens == 0:
            triton_launch.decode(section, encoding, shape, dtype)
        elif n_tokens == ROWS:
            triton_launch.decode_rows(section, torch.zeros(8, dtype=torch.int64), encoding, shape)
        else:
            tokens = torch.empty((max(n_tokens, 1), shape[1]), dtype=dtype)
            is_tile = name.endswith(TILE) and triton_launch.has_tiles(dtype)
            blocks = tile_for(layout_of(encoding, shape)[0], n_tokens, shape[0]) if is_tile else None
            if blocks is None:
                triton_launch.multiply(tokens, section, encoding, shape)
            else:
                triton_launch.multiply_with(tokens, section, encoding, shape, blocks)
    return [{"case": name, "sm": capability} | asdict(each) for each in compiled]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sm", type=int, nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    options.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    args = options.parse_args()
    jobs = [(name, capability) for capability in args.sm for name in CASES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = [row for rows in pool.map(compile_case, *zip(*jobs, strict=True)) for row in rows]
    columns = list(rows[0])
    print_table(columns, [[row[column] for column in columns] for row in rows])
    if args.update:
        write_table(rows)
    limits = Limits()
    for row in rows:
        check_row(limits, row)
    limits.at_least("architectures that compile to code of their own", _different(rows), min(len(args.sm), 3))
    check_against_table(limits, rows, json.loads(TABLE.read_text()))
    limits.finish()


def write_table(rows: list[dict[str, Any]]) -> None:
    """These rows, and of architectures that they leave out those of the table, if the same compiler made both."""
    table = json.loads(TABLE.read_text())
    new = {row["sm"] for row in rows}
    old = [row for row in table["rows"] if row["sm"] not in new] if table["triton"] == _version() else []
    merged = sorted(old + rows, key=lambda row: int(row["sm"]))
    TABLE.write_text(json.dumps({"triton": _version(), "rows": merged}, indent=0) + "\n")


def check_row(limits: Limits, row: dict[str, Any]) -> None:
    """What must hold of any kernel."""
    name = f"sm_{row['sm']}, {row['case']}, {row['kernel']}"
    limits.at_most(f"{name}: spilled", row["spilled"], 0)
    limits.at_most(f"{name}: atomics", row["atomics"], 0)
    limits.at_most(f"{name}: bytes of shared memory", row["shared"], SHARED_BYTES[row["sm"]])
    if "trellis" in row["case"] or "odd" in row["case"]:
        return
    n_tokens = CASES[row["case"]][1]
    if row["kernel"] == "multiply_rows" and n_tokens <= 2:
        wide = row["code_loads"] if n_tokens == 1 else 1
        limits.at_least(f"{name}: loads of codes of 16 bytes", row["wide_code_loads"], max(wide, 1))
    if row["kernel"] in ("multiply_tiles", "multiply_groups"):
        limits.at_least(f"{name}: tensor-core instructions", row["tensor_cores"], 1)
        limits.at_least(
            f"{name}: loads of codes of 16 bytes", row["wide_code_loads"], int(_has_wide_plane(row["case"]))
        )
        limits.at_most(f"{name}: stores of less than 4 bytes", row["narrow_stores"], SOME_NARROW)


def _has_wide_plane(case: str) -> bool:
    """Whether a thread has 16 bytes of the widest plane: not of two bits with many tokens, where codes matter least,
    nor where each weight has the scale of another group, which takes the registers."""
    encoding, n_tokens = CASES[case]
    if getattr(encoding, "input_order", False):
        return False
    few = 16 if getattr(encoding, "stat_bits", 0) else 32
    return n_tokens <= few or getattr(encoding, "bits", 8) >= 4


def check_against_table(limits: Limits, rows: list[dict[str, Any]], table: dict[str, Any]) -> None:
    """No figure may be worse than the recorded one, if the same compiler made both."""
    if table["triton"] != _version():
        print(f"kernels.json was made by Triton {table['triton']}, this is {_version()}: not compared")
        return
    known = {(row["sm"], row["case"], row["kernel"]): row for row in table["rows"]}
    for row in rows:
        name = f"sm_{row['sm']}, {row['case']}, {row['kernel']}"
        old = known.get((row["sm"], row["case"], row["kernel"]))
        if old is None:
            limits.at_least(f"{name}: rows in kernels.json (--update adds it)", 0, 1)
            continue
        for figure in ("registers", "shared", "instructions", "narrow_stores"):
            limits.at_most(f"{name}: {figure}", row[figure], SOME_WORSE * old[figure])
        for figure in ("wide_loads", "wide_code_loads", "tensor_cores"):
            limits.at_least(f"{name}: {figure}", row[figure], old[figure] / SOME_WORSE)


def _different(rows: list[dict[str, Any]]) -> int:
    """How many architectures have figures that no other has: Triton keeps what it compiled."""
    figures: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        figures.setdefault(row["sm"], []).append({name: value for name, value in row.items() if name != "sm"})
    return len({json.dumps(each) for each in figures.values()})


def _version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    main()
