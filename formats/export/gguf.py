"""A GGUF file: weights in the block types of ggml, exactly where the numbers allow it, and told where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.block_lists import BlockLists
from formats.embedded import GENERATION_CONFIG, generation_config, model_config, tokenizer_of
from formats.encoding import Dense
from formats.errors import FormatError, error_context
from formats.export.gguf_model import GgufModel
from formats.export.gguf_tokenizer import tokenizer_values
from formats.export.report import ExportReport, Loss
from formats.ggml.exact import SMALLEST_FIRST, NotWhole, exact
from formats.ggml.file import TensorInfo, Value, check_free, write_gguf
from formats.ggml.fit import fit
from formats.ggml.types import SUPER_BLOCK, TYPES, fallback
from formats.header import TensorEntry
from formats.modules import check_tensors
from formats.reader import QtmFile
from formats.skeleton import build_skeleton
from formats.tensors import decode_tensor

Importance = Mapping[str, npt.NDArray[np.floating[Any]]]
"""By the name of a linear's weight, [in]: the mean square of each of its inputs."""
Array = npt.NDArray[Any]
REQUESTED = tuple(name for name, kind in TYPES.items() if kind.weights > 1 and name != "IQ4_NL")
"""Types that can be asked for."""
QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A tensor of the GGUF file. reason: why it is not that of the `.qtm`; None: it is, in numbers."""

    entry: TensorEntry
    info: TensorInfo
    in_block: bool
    reason: str | None = None


def export_gguf(
    file: QtmFile,
    target: Path,
    *,
    gguf_type: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    importance: Importance | None = None,
) -> ExportReport:
    """Write `target`; FormatError, with nothing written, where that would lose something and `lossy` is not set.

    gguf_type: of the linears in blocks, in any case; None: for each the smallest that holds it exactly.
    importance: what the error of a re-fitted weight is weighted by; None: all inputs alike.
    """
    check_free(target, overwrite=overwrite)
    export = _Export(file, gguf_type, importance or {})
    values = export.model.values() | export.tokenizer()
    plan = [export.plan(entry, lossy=lossy) for entry in file.tensors.values()]
    if not lossy:
        export.refuse_loss(plan)
    values = _general(export.model.architecture.name, target, plan) | values
    extra = export.model.extra_tensors()
    infos = [TensorInfo(name, array.shape, TYPES["F32"]) for name, array in extra.items()]
    losses: list[Loss] = []

    def data() -> Iterator[memoryview]:
        yield from (array.data for array in extra.values())
        for planned in plan:
            rows, loss = export.encode(planned)
            losses.extend([] if loss is None else [loss])
            yield rows.data
            file.drop_pages()

    write_gguf(target, values, [*infos, *(planned.info for planned in plan)], data(), overwrite=overwrite)
    return ExportReport(files=[target.name], losses=losses)


def inexact(file: QtmFile, gguf_type: str | None = None) -> list[str]:
    """Names of the tensors that an export would have to fit anew."""
    export = _Export(file, gguf_type, {})
    plan = (export.plan(entry, lossy=True) for entry in file.tensors.values())
    return [planned.entry.name for planned in plan if planned.reason is not None]


class _Export:
    """A file on its way."""

    def __init__(self, file: QtmFile, gguf_type: str | None, importance: Importance) -> None:
        self.file, self.importance = file, importance
        self.requested = None if gguf_type is None else gguf_type.upper()
        if self.requested not in (None, *REQUESTED):
            raise FormatError(f"gguf_type={gguf_type!r}: must be one of {', '.join(REQUESTED).lower()}")
        config = model_config(file)
        check_tensors(build_skeleton(config, file.tensors), file)
        self._lists = BlockLists.of(file.header.model, file.tensors)
        with error_context(file.label):
            self.model = GgufModel(config, next(iter(self._lists.names), ""))
        self._n_rows = int(config.vocab_size)

    def tokenizer(self) -> dict[str, Value]:
        generation = generation_config(self.file) if GENERATION_CONFIG in self.file.files else None
        with error_context(self.file.label):
            return tokenizer_values(tokenizer_of(self.file), self._n_rows, generation)

    def plan(self, entry: TensorEntry, *, lossy: bool) -> Planned:
        """What becomes of a tensor."""
        with error_context(f"{self.file.label}: {entry.label}"):
            make = partial(self._planned, entry)
            if isinstance(entry.encoding, Dense):
                return make("F32" if len(entry.shape) < 2 else entry.encoding.dtype)
            is_inside = self._lists.number(entry.name) is not None
            wanted = self.requested if is_inside else None
            kinds = [fallback(wanted, entry.shape[1]) or "F16"] if wanted else SMALLEST_FIRST
            try:
                return make(exact(self.file.layer(entry.name), kinds).kind)
            except NotWhole as why:
                reason = str(why)
            if is_inside:
                return make(*_fitted(wanted or _nearest_kind(entry), entry.shape[1], reason))
            values = decode_tensor(self.file, entry).numpy()
            if (values.astype(np.float16) == values).all():
                return make("F16")
            return make("F16", f"{reason}; now F16") if lossy else make("F32")

    def encode(self, planned: Planned) -> tuple[Array, Loss | None]:
        """The bytes of a tensor, and what they lose."""
        entry, kind = planned.entry, planned.info.kind.name
        if kind not in ("F32", "F16", "BF16"):
            layer = self.file.layer(entry.name)
            if planned.reason is None:
                return self._in_order(entry, exact(layer, [kind]).pack()), None
            weight = layer.dequantize()
            blocks = fit(weight, kind, self.importance.get(entry.name))
            return self._in_order(entry, blocks.pack()), _loss(planned, weight, blocks.values())
        values = decode_tensor(self.file, entry).numpy()
        stored = _stored(values + np.float32(self.model.added(entry.name)), kind)
        loss = None if planned.reason is None else _loss(planned, values, stored.astype(np.float32))
        return self._in_order(entry, stored), loss

    def refuse_loss(self, plan: Sequence[Planned]) -> None:
        """FormatError that says what would be lost, if anything would."""
        losses = [loss for planned in plan if planned.reason and (loss := self.encode(planned)[1])]
        if losses:
            worst = max(losses, key=lambda loss: loss.error)
            raise FormatError(
                f"{self.file.label}: {len(losses)} tensors do not fit GGUF exactly; the worst, {worst.name} "
                f"({worst.reason}), would lose {worst.error:.2%} of its energy; --lossy fits them anew"
            )

    def _planned(self, entry: TensorEntry, kind: str, reason: str | None = None) -> Planned:
        info = TensorInfo(self.model.tensor_name(entry.name), entry.shape, TYPES[kind])
        is_inside = self._lists.number(entry.name) is not None
        return Planned(entry=entry, info=info, in_block=is_inside, reason=reason)

    def _in_order(self, entry: TensorEntry, rows: Array) -> Array:
        order = self.model.row_order(entry.name, len(rows))
        return np.ascontiguousarray(rows if order is None else rows[order])


def _nearest_kind(entry: TensorEntry) -> str:
    """The least type whose codes have as many bits at least."""
    bits = entry.encoding.describe(entry.shape).bits
    return next((kind for kind, of_kind in (("Q4_K", 4), ("Q5_K", 5), ("Q6_K", 6)) if bits <= of_kind), "Q8_0")


def _fitted(wanted: str, n_inputs: int, reason: str) -> tuple[str, str]:
    """The type that rows of this length can have, and why they have it."""
    kind = fallback(wanted, n_inputs) or "F16"
    told = f"{reason}; now {kind}"
    if kind != wanted and kind != "F16":
        told += f", as rows of {n_inputs} are no whole super-blocks of {SUPER_BLOCK}"
    return kind, told


def _stored(values: Array, kind: str) -> Array:
    """f32 as F32, F16 or, if they are such numbers, BF16."""
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype("<f2" if kind == "F16" else "<f4")


def _loss(planned: Planned, weight: Array, stored: Array) -> Loss:
    return Loss.of(planned.entry.name, planned.reason or "", weight, stored)


def _general(architecture: str, target: Path, plan: Sequence[Planned]) -> dict[str, Value]:
    kinds = Counter(p.info.kind for p in plan if p.in_block and len(p.info.shape) > 1)
    most = kinds.most_common(1)[0][0] if kinds else TYPES["F32"]
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": target.stem,
        "general.file_type": np.uint32(most.file_type),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
    }
