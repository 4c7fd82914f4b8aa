"""Check a file against the model it was made from: every layer's error again, from scratch (`verify --against`)."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.hessian import LayerStats
from calibration.hub import KNOWN_DATASETS
from formats.embedded import tokenizer_of
from formats.encoding import Dense, Uniform
from formats.errors import FormatError
from formats.header import TensorEntry
from formats.reader import QtmFile
from formats.skeleton import set_tensor, split_name
from formats.tensors import decode_tensor
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.energy import output_energy, relative_error
from qtool.errors import CheckpointError, ConfigError
from qtool.mixture import visit_block
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32, release_free_memory
from qtool.pack import rounded_section
from qtool.plan import TensorPlan
from qtool.recipe import CalibrationSpec, QuantSpec, Recipe
from qtool.sample import draw_sample
from qtool.seq2seq import blockwise_model
from qtool.states import HiddenStates, windows_per_batch

TOLERANCE = 0.02
"""How far an error may be from the recorded one, as a share of it: another machine rounds its sums in another order."""
NEGLIGIBLE = 1e-9  # of two errors below this, neither is more than rounding


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer: its relative error (SPEC 5.5) as recorded, and as it comes out now."""

    name: str
    recorded: float
    recomputed: float

    @property
    def ok(self) -> bool:
        return math.isclose(self.recorded, self.recomputed, rel_tol=TOLERANCE, abs_tol=NEGLIGIBLE)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def verify_against(file: QtmFile, checkpoint: Checkpoint, calibration: str | None, text_field: str) -> list[LayerCheck]:
    """Every layer's error against `checkpoint`, in the order of the run. CheckpointError names the first tensor that is
    not what the file says of it.

    calibration: the text the file was calibrated on, where its header's name for it is not enough to find it.
    """
    model = blockwise_model(checkpoint)
    unknown = set(model.tensor_names()) ^ set(file.tensors)
    if unknown:
        raise CheckpointError(f"{checkpoint.name}: tensor {min(unknown)} is not in both model and file; not one model")
    with exact_float32(), tempfile.TemporaryDirectory() as folder:
        states = _states(file, model, calibration, text_field, Path(folder))
        return _Verification(file, model, states).run()


def _states(
    file: QtmFile, model: BlockwiseModel, calibration: str | None, text_field: str, folder: Path
) -> HiddenStates | None:
    """Room for the hidden states of the very windows that the file was calibrated on; None if on none."""
    if file.header.recipe.get("calibration") is None:
        return None
    recorded = _calibration_of(file)
    source = calibration or _source_of(recorded.source, file.label)
    spec = replace(recorded, source=source, text_field=text_field)
    recipe = replace(Recipe(), calibration=spec)
    # The file's own tokenizer made the sample, or one that gives the same tokens; it needs no code.
    windows = draw_sample(model, recipe, tokenizer_of(file), keep_own=folder / "self.npy")
    if windows.sha256 != file.header.provenance.get("calibration_sha256"):
        raise ConfigError(
            f"{source}: is not the text that {file.label} was calibrated on ({recorded.source}); "
            "give that one by --calibration"
        )
    ids = torch.from_numpy(windows.ids)
    return HiddenStates(folder, ids, windows_per_batch(ids.shape[1]))


def _calibration_of(file: QtmFile) -> CalibrationSpec:
    """What the header says of the calibration; without any, the usual."""
    recorded = file.header.recipe.get("calibration")
    if recorded is None:
        return CalibrationSpec()
    try:
        return CalibrationSpec(**{**recorded, "source": str(recorded["source"])})
    except (TypeError, KeyError) as error:
        raise FormatError(f"{file.label}: header: recipe.calibration is not as qtool writes it (SPEC 3.4)") from error


def _source_of(recorded: str, label: str) -> str:
    """What --calibration was, from the names in a header, which may be a stranger's: no path and no download."""
    names = [re.sub(r" \((train|test)\)$", "", name.strip()) for name in recorded.split(",")]
    for name in names:
        if name != "self" and name not in KNOWN_DATASETS and name.partition(":")[0] != "builtin":
            raise ConfigError(f"{label}: was calibrated on {recorded}; give that text by --calibration")
    return ",".join(names)


class _Verification:
    """One pass over the model in which nothing is solved: each block gets the file's weights after it was measured."""

    def __init__(self, file: QtmFile, model: BlockwiseModel, states: HiddenStates | None) -> None:
        self.file, self.model, self.states = file, model, states
        self.min_expert_tokens = _calibration_of(file).min_expert_tokens
        self.checks: list[LayerCheck] = []

    def run(self) -> list[LayerCheck]:
        self._outside()
        count = len(self.model.blocks)
        for index in tqdm(range(count), unit="block", desc="verify", disable=None):
            with self.model.block(index, experts=False):
                self._block(index)
            self.file.drop_pages()
            release_free_memory()
        return self.checks

    def _outside(self) -> None:
        for name in self.model.outside_names():
            with self.model.materialised([name]):
                self._check(name, None)
        if self.states is not None:
            looked_up = self.model.outside_names(head=False)
            decoded = {name: decode_tensor(self.file, self.file.tensors[name]) for name in looked_up}
            with self.model.materialised(looked_up, instead=decoded):
                self.states.write(0, map(self.model.embed, self.states.batches))

    def _block(self, index: int) -> None:
        visit_block(self.model, index, self.states, self.min_expert_tokens, self._tensors)

    def _tensors(self, names: list[str], stats: Mapping[str, LayerStats]) -> None:
        """Check tensors that are in memory; the file's are left there."""
        for name in names:
            checked = self._check(name, stats.get(split_name(name)[0]))
            if not self.file.header.recipe.get("independent"):
                set_tensor(self.model.skeleton, name, checked)

    def _check(self, name: str, stats: LayerStats | None) -> Tensor:
        """Compare the model's tensor with the file's, which is returned."""
        entry, weight = self.file.tensors[name], find_tensor(self.model.skeleton, name)
        decoded = decode_tensor(self.file, entry)
        if decoded.shape != weight.shape:
            raise self._mismatch(entry, f"has shape {list(decoded.shape)}, the model's has {list(weight.shape)}")
        if isinstance(entry.encoding, Dense):
            if not torch.equal(weight, decoded):
                raise self._mismatch(entry, "is stored as it was, and differs")
        elif entry.relative_error is None:  # an embedding, rounded to nearest: the same bits on any machine
            self._check_rounded(entry, weight)
        else:
            across = (weight.T, decoded.T) if entry.transposed else (weight, decoded)
            check = LayerCheck(name, entry.relative_error, _relative_error(*across, stats))
            if not check.ok:
                found = f"its relative error is {check.recomputed:.3e}, recorded is {check.recorded:.3e}"
                raise self._mismatch(entry, found)
            self.checks.append(check)
        return decoded

    def _check_rounded(self, entry: TensorEntry, weight: Tensor) -> None:
        encoding = entry.encoding
        if not isinstance(encoding, Uniform):
            stored = f"is stored as {encoding.name} without a relative error"
            raise CheckpointError(f"{self._against(entry)}: {stored}; there is nothing to compare it by")
        spec = QuantSpec(
            method="rtn", bits=encoding.bits, group_size=encoding.group_size, symmetric=encoding.symmetric
        )  # fmt: skip
        plan = TensorPlan(name=entry.name, shape=entry.shape, encoding=encoding, spec=spec)
        if not encoding.symmetric or rounded_section(weight.clone(), plan) != self.file.section(entry):
            raise self._mismatch(entry, "is not the model's rounded to nearest")

    def _mismatch(self, entry: TensorEntry, what: str) -> CheckpointError:
        return CheckpointError(f"{self._against(entry)}: {what}; not made from this model")

    def _against(self, entry: TensorEntry) -> str:
        return f"{self.file.label}: {entry.label} against {self.model.checkpoint.name}"


def _relative_error(weight: Tensor, decoded: Tensor, stats: LayerStats | None) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) of weights [out, in] (SPEC 5.5), H the identity without statistics."""

    hessian = None if stats is None else stats.hessian
    return relative_error(output_energy(weight - decoded, hessian), output_energy(weight, hessian))
