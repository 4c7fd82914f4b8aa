"""Bits against perplexity of a small mixture of experts, GPTQ beside rounding, down to less than one bit a weight.

    python -m benchmarks.experts [--model build/moe]

The model is made by `benchmarks.train_moe`. Experts alone are compressed; the rest has 8 bits in every row. Calibrated
on one part of Python's documentation, which the model has learned, measured on another, which it has not seen.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.tools import Limits, parser, print_table, qtool

CALIBRATION = ["--samples", 64, "--seq-len", 512]
MEASURE = ["--seq-len", 512, "--max-windows", 64]
REST = ["--bits", 8, "--group-size", -1, "--embeddings", 8]


def widths(bits: int) -> list[object]:
    return ["--layer", f"[.]experts[.]={bits}"]


ROWS: dict[str, tuple[list[object], list[object]]] = {
    **{f"{bits} bits, a grid for each row": (widths(bits), widths(bits)) for bits in (4, 3, 2)},
    "ternary, least, 0 and largest": (["--expert-format", "ternary"], ["--expert-format", "ternary"]),
    "2 bits, every block on its own": ([*widths(2), "--independent"], []),
    "ternary, every block on its own": (["--expert-format", "ternary", "--independent"], []),
    "ternary, searched": (["--expert-format", "ternary", "--ternary-grid", "mse"], []),
}
"""Name -> options with GPTQ, options rounded (none: there is no Hessian to search by)."""


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(model=Path("build/moe"), work=Path("build/experts"))
    args = options.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = qtool("eval", "perplexity", args.model, *MEASURE)["perplexity"]
    rows: list[tuple[object, ...]] = [("uncompressed", "", "", "32", f"{base:.2f}", "1.000")]
    ratios: dict[tuple[str, str], float] = {}
    bits: dict[tuple[str, str], float] = {}
    for name, (solved, rounded) in ROWS.items():
        for method, own in (("gptq", solved), ("rtn", rounded)):
            if own:
                made = measure(args.model, args.work / "out.qtm", ["--method", method, *REST, *own])
                ratios[name, method], bits[name, method] = made["perplexity"] / base, made["bits"]
                zeros = "" if made["zeros"] is None else f"{made['zeros']:.1%}"
                cells = (f"{made['bits']:.3f}", f"{made['perplexity']:.2f}", f"{made['perplexity'] / base:.3f}")
                rows.append((name, method, zeros, *cells))
    print_table(("experts", "method", "zeros", "bits per weight of experts", "perplexity", "ratio"), rows)
    limits, ternary = Limits(), "ternary, least, 0 and largest"
    limits.at_most("ternary experts: bits", bits[ternary, "gptq"], 0.9999)
    limits.at_most(
        "ternary: GPTQ's loss to rounding's", (ratios[ternary, "gptq"] - 1) / (ratios[ternary, "rtn"] - 1), 0.5
    )
    limits.finish()


def measure(model: Path, output: Path, options: list[object]) -> dict[str, float | None]:
    """Perplexity, bits per weight of the experts with all that is stored for them, and the share of zeros."""
    qtool("compress", model, "-o", output, "--force", *CALIBRATION, *options)
    found = qtool("inspect", output, "--experts")
    experts, shapes = found["experts"], {row["name"]: row["shape"] for row in found["tensors"]}
    weights = sum(shape[0] * shape[1] for name, shape in shapes.items() if ".experts." in name)
    zeros = [row["zeros"] for row in experts if row["zeros"] is not None]
    return {
        "perplexity": qtool("eval", "perplexity", output, *MEASURE)["perplexity"],
        "bits": 8 * sum(row["bytes"] for row in experts) / weights,
        "zeros": sum(zeros) / len(zeros) if zeros else None,
    }


if __name__ == "__main__":
    main()
