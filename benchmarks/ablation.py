"""What each part of the solver is worth: the same file with one thing changed at a time, and what the papers claim.

    python -m benchmarks.ablation --model build/reference-0

Calibrated on 8 windows of 1024 tokens, measured on 4. The directions that the papers give (SpQR against GPTQ at equal
bytes, NF4 with double quantization against GPTQ with groups of 128, small blocks against one more bit) are checked, and
that `--bits 4` takes at most twice the time of plain GPTQ; the script fails when one does not hold.
"""

from __future__ import annotations

from benchmarks.frontier import Bench, Measured
from benchmarks.tools import Limits, parser, print_table

SAMPLES = ["--samples", 8, "--seq-len", 1024]
SCORED = ["--seq-len", 1024, "--max-windows", 4]
INT = ["--bits", 3, "--group-size", 64]
TRELLIS = ["--format", "trellis", "--bits", 3]
PLAIN = ["--no-scale-search", "--no-input-scales", "--no-act-order"]
SOLVER = {
    "int, 3 bits, group 64": INT,
    "without range search": [*INT, "--no-scale-search"],
    "without input scales": [*INT, "--no-input-scales"],
    "without act-order": [*INT, "--no-act-order"],
    "without all three: plain GPTQ": [*INT, *PLAIN],
    "round to nearest": [*INT, "--method", "rtn"],
    "every block on its own (--independent)": [*INT, "--independent"],
    "fitted levels": ["--format", "fitted", *INT],
    "group 16, statistics in 3 bits": ["--bits", 3, "--group-size", 16, "--stat-bits", 3],
    "0.3% outliers": [*INT, "--outliers", "0.3%"],
    "trellis, 3 bits": TRELLIS,
    "trellis, 64 states": [*TRELLIS, "--effort", "fast"],
    "trellis, 512 states": [*TRELLIS, "--effort", "best"],
    "trellis, 0.3% outliers": [*TRELLIS, "--outliers", "0.3%"],
}
CLAIMS = {
    "GPTQ, 4 bits, group 128": ["--bits", 4],
    "plain GPTQ, 4 bits, group 128": ["--bits", 4, *PLAIN],
    "NF4, double quantization": ["--format", "nf4", "--double-quant", "--no-input-scales"],
    "SpQR, 3 bits, 0.5% outliers": ["--method", "spqr", "--bits", 3, "--outliers", "0.5%"],
    "GPTQ, 3 bits, group 22": ["--bits", 3, "--group-size", 22],
    "int 4, rounded, blocks of 1024": ["--method", "rtn", "--bits", 4, "--group-size", 1024],
    "int 4, rounded, blocks of 64": ["--method", "rtn", "--bits", 4, "--group-size", 64],
    "int 5, rounded, blocks of 1024": ["--method", "rtn", "--bits", 5, "--group-size", 1024],
}


def main() -> None:
    args = parser(__doc__).parse_args()
    bench = Bench(args.model, args.calibration, args.data, args.work / "ablation", 0, SCORED)
    solver = [bench.measure("qtool", name, [*options, *SAMPLES]) for name, options in SOLVER.items()]
    claims = {name: bench.measure("qtool", name, [*options, *SAMPLES]) for name, options in CLAIMS.items()}
    print_table(("what", "bits per weight", "ratio", "seconds"), [_row(row) for row in (*solver, *claims.values())])
    limits = Limits()
    default, plain = claims["GPTQ, 4 bits, group 128"], claims["plain GPTQ, 4 bits, group 128"]
    limits.at_most("seconds of --bits 4 against plain GPTQ's", default.seconds / plain.seconds, 2.0)
    spqr, gptq = claims["SpQR, 3 bits, 0.5% outliers"], claims["GPTQ, 3 bits, group 22"]
    limits.at_most("bits of SpQR against GPTQ's", spqr.bits, gptq.bits)
    limits.at_most("SpQR against GPTQ at equal bytes", spqr.ratio, gptq.ratio)
    nf4, grid = claims["NF4, double quantization"].ratio, default.ratio
    limits.at_most("NF4 and GPTQ 128 apart", abs(nf4 - grid) / grid, 0.1)
    small, more = claims["int 4, rounded, blocks of 64"].ratio, claims["int 5, rounded, blocks of 1024"].ratio
    whole = claims["int 4, rounded, blocks of 1024"].ratio
    limits.at_most("share of a bit's gain that small blocks miss", 1 - (whole - small) / (whole - more), 0.5)
    limits.finish()


def _row(row: Measured) -> tuple[str, str, str, str]:
    return row.setting, f"{row.bits:.3f}", f"{row.ratio:.3f}", f"{row.seconds:.0f}"


if __name__ == "__main__":
    main()
