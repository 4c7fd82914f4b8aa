"""A folder whose linears are stored as an engine has them: what all such formats share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from formats.block_lists import BlockLists
from formats.embedded import config_dict, model_config
from formats.encoding import Dense, MatrixEncoding
from formats.errors import FormatError, error_context
from formats.export.card import Loading
from formats.export.dense import DTYPES
from formats.export.folder import Tensors, check_target, names_by_block, write_folder
from formats.export.published import publish, published_rows
from formats.export.regrid import Carrier, Form, common_group_size
from formats.export.report import ExportReport, Loss
from formats.header import TensorEntry
from formats.layer import QuantizedLinear
from formats.layouts.affine import take_rows
from formats.modules import check_tensors, owner_of
from formats.reader import QtmFile
from formats.skeleton import build_skeleton, is_linear, split_name
from formats.tensors import decode_tensor


@dataclass(frozen=True, slots=True)
class _Linear:
    """Some rows of a stored weight [out, in] as a linear of its own."""

    module: str  # its published name
    entry: TensorEntry
    rows: npt.NDArray[np.int64] | None  # None: all

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.entry.encoding, MatrixEncoding)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of a quantized one"""
        return self.entry.shape[0] if self.rows is None else len(self.rows), self.entry.shape[1]


class Engine(ABC):
    """How a format stores linears, and says so."""

    carrier: Carrier
    loading: Loading

    @abstractmethod
    def check(self, shape: tuple[int, int], form: Form) -> None:
        """FormatError for a linear [out, in] that the format cannot have."""

    @abstractmethod
    def tensors(self, layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a linear by what stands behind its name."""

    @abstractmethod
    def config(self, forms: Mapping[str, Form], dense: list[str]) -> dict[str, Any]:
        """`quantization_config`.  forms: of each quantized linear; dense: names of the others"""

    def files(self, config: dict[str, Any]) -> dict[str, str]:
        """Text files that the format has besides, by name.  config: what `config` gave"""
        return {}


def export_engine(
    file: QtmFile, folder: Path, engine: Engine, *, dtype: str | None, lossy: bool, overwrite: bool
) -> ExportReport:
    """Write the folder. FormatError before anything is written if something would be lost and `lossy` is not given.

    dtype: of tensors that are not quantized; None: the least that holds their decoded values exactly
    """
    check_target(folder, overwrite)
    export = _Export(file, engine, dtype)
    if not lossy:
        export.refuse_losses()
    losses: list[Loss] = []
    config = config_dict(file) | {"dtype": export.dtype, "quantization_config": export.quantization}
    texts = engine.files(export.quantization)
    given = () if dtype is None else ("--dtype", dtype)
    loading = replace(engine.loading, options=(*engine.loading.options, *given))
    files = write_folder(
        file,
        folder,
        export.blocks(losses),
        config,
        overwrite=overwrite,
        loading=loading,
        losses=losses,
        texts=texts,
    )
    return ExportReport(files=files, losses=losses)


class _Export:
    """What goes where, decided from the header alone."""

    def __init__(self, file: QtmFile, engine: Engine, dtype: str | None) -> None:
        self._file, self._engine = file, engine
        self._lists = BlockLists.of(file.header.model, file.tensors)
        self._model: PreTrainedModel = build_skeleton(model_config(file), file.tensors)
        check_tensors(self._model, file)
        self._blocks = [(names, self._linears_of(names)) for names in names_by_block(file)]
        linears = [linear for _, found in self._blocks for linear in found]
        self._linears = {linear.entry.name for linear in linears if linear.is_quantized}
        if not self._linears:
            raise FormatError(f"{file.label}: no linear of its blocks is quantized; export --to dense")
        stored = [
            (entry.encoding, entry.shape)
            for linear in linears
            if isinstance((entry := linear.entry).encoding, MatrixEncoding)
        ]
        self._carrier = replace(engine.carrier, regrouped=common_group_size(stored))
        self.dtype = dtype or self._exact_dtype()
        forms = _in_common([(linear, self._form(linear)) for linear in linears if linear.is_quantized])
        self.quantization = engine.config(forms, self._dense_linears(linears))

    def blocks(self, losses: list[Loss]) -> Iterator[Tensors]:
        """The tensors of each block; what is lost is added to `losses` on the way."""
        for names, linears in self._blocks:
            tensors = self._others(names, linears, losses)
            layers: dict[str, QuantizedLinear] = {}
            for linear in linears:
                if linear.is_quantized:
                    if linear.entry.name not in layers:
                        layers = {linear.entry.name: self._carried(linear.entry, losses)}
                    layer = layers[linear.entry.name]
                    layer = layer if linear.rows is None else take_rows(layer, linear.rows)
                    arrays = self._engine.tensors(layer)
                    tensors |= {f"{linear.module}.{name}": torch.from_numpy(array) for name, array in arrays.items()}
                else:
                    tensors[f"{linear.module}.weight"] = self._dense_rows(linear, losses)
            yield tensors
            self._file.drop_pages()

    def refuse_losses(self) -> None:
        """FormatError that says what would be lost, and how much of the worst tensor."""
        losses: list[Loss] = []
        carrier = self._carrier
        for entry in self._file.tensors.values():
            encoding = entry.encoding
            if entry.name not in self._linears:
                if DTYPES[self.dtype] != torch.float32:
                    self._dense(entry, losses)
            elif isinstance(encoding, MatrixEncoding) and (
                carrier.obstacle(encoding) or carrier.depends_on_zeros(encoding)
            ):
                self._carried(entry, losses)
            self._file.drop_pages()
        if losses:
            reasons = Counter(loss.reason for loss in losses)
            what = ", ".join(f"{reason} ({count} tensors)" for reason, count in reasons.items())
            worst = max(losses, key=lambda loss: loss.error)
            raise FormatError(
                f"{self._file.label}: {carrier.name} cannot hold {what}; --lossy rounds them again, which adds "
                f"an error of up to {100 * worst.error:.3g}% ({worst.name})"
            )

    def _linears_of(self, names: list[str]) -> list[_Linear]:
        """The linears of blocks among stored tensors."""
        n_outputs = {name: self._file.tensors[name].shape[0] for name in names if self._is_linear_of_block(name)}
        with error_context(f"{self._file.label}: tensor"):
            published = published_rows(self._model, n_outputs)
        return [
            _Linear(split_name(name)[0], self._file.tensors[source.name], source.rows)
            for name, source in published.items()
        ]

    def _is_linear_of_block(self, name: str) -> bool:
        entry = self._file.tensors[name]
        if self._lists.number(name) is None or split_name(name)[1] != "weight":
            return False
        with error_context(f"{self._file.label}: {entry.label}"):
            return is_linear(owner_of(self._model, name, entry.shape[::-1] if entry.transposed else entry.shape))

    def _form(self, linear: _Linear) -> Form:
        encoding = linear.entry.encoding
        assert isinstance(encoding, MatrixEncoding)
        form = self._carrier.form(encoding, linear.entry.shape)
        with error_context(f"{self._file.label}: {linear.entry.label}"):
            self._engine.check(linear.shape, form)
        return form

    def _exact_dtype(self) -> str:
        """Of the tensors that are not quantized linears."""
        stored = {
            entry.encoding.dtype if isinstance(entry.encoding, Dense) else "F32"
            for entry in self._file.tensors.values()
            if entry.name not in self._linears
        }
        names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        return names[stored.pop()] if len(stored) == 1 else "float32"

    def _dense_linears(self, linears: list[_Linear]) -> list[str]:
        """Modules that an engine could take for linears that are quantized: routers and the head among them."""
        found = [linear.module for linear in linears if not linear.is_quantized]
        of_blocks = {linear.entry.name for linear in linears}
        others = {
            entry.name: torch.empty(1, 1)
            for entry in self._file.tensors.values()
            if entry.name not in of_blocks and len(entry.shape) == 2 and not self._is_embedding(entry)
        }
        found += [split_name(name)[0] for name in publish(self._model, others)]
        return found if "lm_head" in found else [*found, "lm_head"]

    def _is_embedding(self, entry: TensorEntry) -> bool:
        return isinstance(self._model.get_submodule(split_name(entry.name)[0]), torch.nn.Embedding)

    def _others(self, names: list[str], linears: list[_Linear], losses: list[Loss]) -> Tensors:
        """What is no linear of a block."""
        of_block = {linear.entry.name for linear in linears}
        tensors = {name: self._dense(self._file.tensors[name], losses) for name in names if name not in of_block}
        return {name: tensor.contiguous() for name, tensor in publish(self._model, tensors).items()}

    def _dense(self, entry: TensorEntry, losses: list[Loss]) -> Tensor:
        values = decode_tensor(self._file, entry)
        rounded = values.to(DTYPES[self.dtype])
        if not torch.equal(rounded.float(), values):
            reason = f"values beyond {self.dtype}"
            losses.append(Loss.of(entry.name, reason, values.numpy(), rounded.float().numpy()))
        return rounded

    def _dense_rows(self, linear: _Linear, losses: list[Loss]) -> Tensor:
        values = self._dense(linear.entry, losses)
        return values if linear.rows is None else values[torch.from_numpy(linear.rows)].contiguous()

    def _carried(self, entry: TensorEntry, losses: list[Loss]) -> QuantizedLinear:
        layer = self._file.layer(entry.name)
        carried, reason = self._carrier.carry(layer)
        if reason is not None:
            losses.append(Loss.of(entry.name, reason, layer.dequantize(), carried.dequantize()))
        return carried


def _in_common(forms: list[tuple[_Linear, Form]]) -> dict[str, Form]:
    """The form of each module; a row no longer than the groups of most others is one of their groups."""
    usual = Counter(form.group_size for _, form in forms).most_common(1)[0][0]
    return {
        linear.module: replace(form, group_size=usual) if form.group_size == -1 and linear.shape[1] <= usual else form
        for linear, form in forms
    }
