"""Quality against bits: qtool's targets from 6 to 2.2 bits per weight, and every peer that installs, in one evaluation.

    python -m benchmarks.frontier --model build/reference-0 [--peers run|cached|none]

Writes frontier-seedN.svg and .json to the work folder. Every row is kept there as soon as it is measured, so a run
that was stopped goes on where it was. Fails when a point of qtool misses its limit, or a peer with at least as many
bits as a point does better than it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.measure import measure_peers
from benchmarks.tools import MEASURE, Limits, parser, print_table, qtool
from qtool.pictures.chart import Chart, Point, draw_chart
from qtool.pictures.page import standalone_svg

# Bits per weight of the blocks' linears, at most: the ratio of perplexities that it must reach, and that aimed at.
POINTS = {
    6.0: (1.015, 1.01),
    5.0: (1.06, 1.04),
    4.6: (1.10, 1.08),
    4.0: (1.20, 1.16),
    3.35: (1.6, 1.5),
    3.0: (2.1, 1.9),
    2.5: (3.5, 3.0),
    2.2: (5.0, 4.0),
}
END = 6.5  # bits: beyond it qtool has no point here, and any tool's file is as good as the model
ROUNDED = {bits: ["--method", "rtn", "--bits", bits, "--group-size", 64] for bits in (3, 4, 5, 6)}
SAMPLES = ["--samples", 16, "--seq-len", 1024]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One file: its bits per weight, the ratio of its perplexity to the model's, and the seconds it took."""

    series: str
    setting: str
    bits: float
    ratio: float
    seconds: float = 0.0


class Bench:
    """qtool on one model; what has been measured is kept in `work`."""

    def __init__(
        self, model: Path, calibration: Path, data: Path, work: Path, seed: int, protocol: Sequence[object] = MEASURE
    ) -> None:
        self.model, self.calibration, self.data, self.work, self.seed = model, calibration, data, work, seed
        self._protocol = protocol
        work.mkdir(parents=True, exist_ok=True)

    def measure(self, series: str, setting: str, options: list[object]) -> Measured:
        """Compress with `options` and evaluate, unless that was done before."""
        kept = self.work / f"{series}-{setting}-seed{self.seed}.json".replace(" ", "-").replace("/", "-")
        command = [*options, "--embeddings", 16, "--calibration", self.calibration]
        key = [str(part) for part in command]
        if kept.exists() and (found := json.loads(kept.read_text()))["command"] == key:
            return Measured(**found["measured"])
        output = kept.with_suffix(".qtm")  # each its own: one that was stopped is in no other's way
        made = qtool("compress", self.model, "-o", output, "--force", *command)
        ratio = self.perplexity(output) / self.base()
        output.unlink()
        measured = Measured(
            series=series, setting=setting, bits=made["bits_per_weight"], ratio=ratio, seconds=made["seconds"]
        )
        kept.write_text(json.dumps({"command": key, "measured": asdict(measured)}, indent=1))
        return measured

    def target(self, bits: float) -> Measured:
        """The file whose blocks take at most `bits`; all targets share one sweep."""
        options = ["--target-bits", bits, "--effort", "best", "--work-dir", self.work / f"sweep-seed{self.seed}"]
        return self.measure("qtool", f"{bits:g} bits", [*options, *SAMPLES])

    def perplexity(self, model: Path) -> float:
        return float(qtool("eval", "perplexity", model, "--data", self.data, *self._protocol)["perplexity"])

    def base(self) -> float:
        """The uncompressed model's perplexity."""
        kept = self.work / f"base-seed{self.seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(self.perplexity(self.model)))
        return float(json.loads(kept.read_text()))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peers", choices=("run", "cached", "none"), default="cached", help="measure the peers too")
    options.add_argument("--seed", type=int, default=0, help="of the reference model, to keep its rows apart")
    args = options.parse_args()
    bench = Bench(args.model, args.calibration, args.data, args.work / "frontier", args.seed)
    rows = [bench.target(bits) for bits in POINTS]
    rows += [bench.measure("round to nearest", f"{bits} bits, group 64", opts) for bits, opts in ROUNDED.items()]
    missing: list[tuple[str, str, str]] = []
    if args.peers != "none":
        peers = measure_peers(
            args.model, args.calibration, args.data, bench.work / "peers", seed=args.seed, cached=args.peers == "cached"
        )
        for row in peers:
            if row.bits is None or row.ratio is None:
                missing.append((row.peer, row.setting, row.note))
            else:
                rows.append(Measured(series=row.peer, setting=row.setting, bits=row.bits, ratio=row.ratio))
    _report(rows, missing, bench.work, args.seed)


def _report(rows: list[Measured], missing: list[tuple[str, str, str]], work: Path, seed: int) -> None:
    ordered = sorted(rows, key=lambda row: -row.bits)
    table = [(row.series, row.setting, f"{row.bits:.3f}", f"{row.ratio:.3f}") for row in ordered]
    print_table(("tool", "setting", "bits per weight", "ratio"), table)
    for peer, setting, note in missing:
        print(f"not measured: {peer}, {setting}: {note}")
    points = [Point(series=row.series, label=row.setting, x=row.bits, y=row.ratio) for row in rows if row.ratio < 8]
    chart = Chart(
        title="Perplexity, as a ratio to the uncompressed model's, against bits per weight",
        x_label="bits per weight of the blocks' linears, everything counted",
        y_label="ratio of perplexities",
        points=points,
        references=[("uncompressed", 1.0)],
    )
    (work / f"frontier-seed{seed}.svg").write_text(standalone_svg(draw_chart(chart)), encoding="utf-8")
    (work / f"frontier-seed{seed}.json").write_text(json.dumps([asdict(row) for row in ordered], indent=1))
    _limits(rows).finish()


def _limits(rows: list[Measured]) -> Limits:
    limits, own = Limits(), {row.setting: row for row in rows if row.series == "qtool"}
    for bits, (must, aim) in POINTS.items():
        point = own[f"{bits:g} bits"]
        limits.at_most(f"bits per weight of {point.setting}", point.bits, bits)
        limits.at_most(f"ratio at {point.setting}", point.ratio, must)
        if point.ratio > aim:
            print(f"ratio at {point.setting}: {point.ratio:.3f}, aimed at {aim:g}")
    for row in rows:
        below = [point for point in own.values() if point.bits <= row.bits <= END]
        if row.series != "qtool" and below:
            nearest = max(below, key=lambda point: point.bits)
            limits.at_most(
                f"ratio at {nearest.setting}, which {row.series} {row.setting} beats", nearest.ratio, row.ratio
            )
    return limits


if __name__ == "__main__":
    main()
