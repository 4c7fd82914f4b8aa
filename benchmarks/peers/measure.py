"""Every peer's figures on one model: bits per weight of the blocks' linears, and the ratio of perplexities.

    python -m benchmarks.peers.measure --model FOLDER [--cached]

A row is kept in the work folder as soon as it is measured, so a stopped run goes on where it was. A peer that does
not install, or fails, is a row too: it says why.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from benchmarks.folder import replace_tensors
from benchmarks.peers.environments import PeerError, interpreter, run_logged
from benchmarks.peers.inputs import importance_of, windows_of
from benchmarks.peers.job import Job, is_block_linear
from benchmarks.peers.settings import OUT_OF_REACH, PACKAGES, SETTINGS, Setting
from benchmarks.tools import MEASURE, parser, print_table, qtool

N_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """bits: per weight of the blocks' linears, with all that is stored for them. ratio: to the uncompressed model's
    perplexity. Both are None where the peer could not be measured; `note` then says why."""

    peer: str
    setting: str
    bits: float | None
    ratio: float | None
    note: str


def measure_peers(
    model: Path, calibration: Path, data: Path, work: Path, *, seed: int = 0, cached: bool = False
) -> list[Row]:
    """A row for every setting. `cached` runs no peer: what is not in `work` yet is given as not measured."""
    bench = _Bench(model.resolve(), calibration.resolve(), data.resolve(), work.resolve(), seed)
    rows = [bench.cached_row(setting) if cached else bench.row(setting) for setting in SETTINGS]
    return rows + [_not_measured(peer, "any", reason) for peer, reason in OUT_OF_REACH.items()]


class _Bench:
    def __init__(self, model: Path, calibration: Path, data: Path, work: Path, seed: int) -> None:
        self.model, self.calibration, self.data, self.work, self.seed = model, calibration, data, work, seed
        work.mkdir(parents=True, exist_ok=True)

    def row(self, setting: Setting) -> Row:
        kept = self._load(setting)
        if kept is not None and kept.ratio is not None:
            return kept
        try:
            row = self._measure(setting)
        except PeerError as error:
            row = _not_measured(setting.peer, setting.name, str(error))
        _keep(self._path(setting), json.dumps({"key": self._key(setting), "row": asdict(row)}, indent=1).encode())
        print(f"{row.peer}, {row.setting}: {_cells(row)}", file=sys.stderr, flush=True)
        return row

    def cached_row(self, setting: Setting) -> Row:
        return self._load(setting) or _not_measured(setting.peer, setting.name, "not in the cache")

    def _path(self, setting: Setting) -> Path:
        name = re.sub(r"\W+", "-", f"{setting.peer} {setting.name} seed{self.seed}")
        return self.work / f"{name}.json"

    def _load(self, setting: Setting) -> Row | None:
        """The kept row, unless it belongs to another model, text, package or option."""
        try:
            kept = json.loads(self._path(setting).read_text())
        except FileNotFoundError:
            return None
        return Row(**kept["row"]) if kept["key"] == self._key(setting) else None

    def _key(self, setting: Setting) -> str:
        told = [self._inputs_digest, setting.options, PACKAGES[setting.module], N_WINDOWS, self.seed, MEASURE]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @cached_property
    def _inputs_digest(self) -> str:
        digest = hashlib.sha256()
        for path in (self.model / "model.safetensors", self.calibration, self.data):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _measure(self, setting: Setting) -> Row:
        python = interpreter(setting.module, self.work / "environments")
        output = self._path(setting).with_suffix(".running")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        windows, importance = self._inputs
        job = Job(model=str(self.model), windows=str(windows), importance=str(importance), output=str(output),
                  seed=self.seed, options=setting.options)  # fmt: skip
        job.write(output / "job.json")
        command = [python, "-m", f"benchmarks.peers.{setting.module}", output / "job.json"]
        run_logged(setting.module, command, output / "peer.log")
        result = json.loads((output / "result.json").read_text())
        ratio = self._decoded_perplexity(output) / self._base
        shutil.rmtree(output)
        note = "; ".join(part for part in (setting.note, result["note"]) if part)
        return Row(peer=setting.peer, setting=setting.name, bits=result["bits"], ratio=ratio, note=note)

    def _decoded_perplexity(self, output: Path) -> float:
        """Of the model with the weights that a peer left in `output`."""
        weights = load_file(output / "weights.safetensors")
        missing = self._linears - weights.keys()
        if missing:  # they would stay uncompressed, and count in no one's bits
            raise PeerError(f"leaves out {len(missing)} of {len(self._linears)} linears, such as {min(missing)}")
        replace_tensors(self.model, output / "decoded", weights)
        try:
            return self._perplexity(output / "decoded")
        except subprocess.CalledProcessError as error:
            raise PeerError("what its weights decode to cannot be evaluated") from error

    @cached_property
    def _linears(self) -> set[str]:
        stored = load_file(self.model / "model.safetensors")
        return {name for name, tensor in stored.items() if is_block_linear(name, tensor.dim())}

    @cached_property
    def _inputs(self) -> tuple[Path, Path]:
        """The windows and the importance matrix; their names tell the texts and models they belong to apart."""
        stem = f"{self._inputs_digest[:12]}-seed{self.seed}"
        windows, importance = self.work / f"windows-{stem}.npy", self.work / f"importance-{stem}.safetensors"
        if not windows.exists():
            _keep(windows, windows_of(self.model, self.calibration, n_windows=N_WINDOWS, seed=self.seed))
        if not importance.exists():
            _keep(importance, importance_of(self.model, np.load(windows)))
        return windows, importance

    @cached_property
    def _base(self) -> float:
        """The uncompressed model's perplexity."""
        path = self.work / f"base-{self._inputs_digest[:12]}.txt"
        if not path.exists():
            _keep(path, repr(self._perplexity(self.model)).encode())
        return float(path.read_text())

    def _perplexity(self, model: Path) -> float:
        return float(qtool("eval", "perplexity", model, "--data", self.data, *MEASURE)["perplexity"])


def _keep(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all: what exists is taken for finished."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def _not_measured(peer: str, setting: str, reason: str) -> Row:
    return Row(peer=peer, setting=setting, bits=None, ratio=None, note=f"not measured: {reason}")


def _cells(row: Row) -> str:
    return row.note if row.bits is None or row.ratio is None else f"{row.bits:.3f} bits, ratio {row.ratio:.4f}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cached", action="store_true", help="run no peer; print what the work folder has")
    options.set_defaults(work=Path("build/frontier"))
    args = options.parse_args()
    rows = measure_peers(args.model, args.calibration, args.data, args.work, seed=args.seed, cached=args.cached)
    cells = [(row.peer, row.setting, _number(row.bits, 3), _number(row.ratio, 4), row.note) for row in rows]
    print_table(("peer", "setting", "bits per weight", "ratio", "note"), cells)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
