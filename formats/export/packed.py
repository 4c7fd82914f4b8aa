"""A Hugging Face folder whose weights stay packed: `from_pretrained` loads it once qtool is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from formats.embedded import config_dict, model_config
from formats.encoding import Dense, MatrixEncoding
from formats.errors import FormatError, error_context
from formats.export.card import Loading
from formats.export.folder import Tensors, names_by_block, write_folder
from formats.export.report import ExportReport
from formats.header import TensorEntry
from formats.modules import check_tensors, owner_of, section_name, takes_sections
from formats.plugin import METHOD
from formats.reader import QtmFile
from formats.skeleton import build_skeleton, parameter_names
from formats.tensors import DTYPES, decode_tensor, section_tensor

LOADING = Loading(format="transformers", packages=("qtool",), imports="qtool")


def export_packed(file: QtmFile, folder: Path, *, overwrite: bool = False) -> ExportReport:
    """Write the folder: sections as tensors of bytes, the rest as it is stored."""
    model = build_skeleton(model_config(file), file.tensors)
    check_tensors(model, file)
    packed = {name: entry for name, entry in file.tensors.items() if _is_packed(file, model, entry)}
    for first, *others in parameter_names(model).values():
        for name in others:
            if name in file.tensors and (name in packed) != (first in packed):
                raise FormatError(
                    f"{file.label}: of {first!r} and {name!r}, which the config ties, just one is packed, and "
                    "transformers would take it for both; export it --to dense"
                )
    weights: dict[str, Any] = {
        name: entry.encoding.fields() | {"shape": list(entry.shape)} for name, entry in packed.items()
    }
    config = config_dict(file) | {"quantization_config": {"quant_method": METHOD, "weights": weights}}
    files = write_folder(file, folder, _blocks(file, model, packed), config, overwrite=overwrite, loading=LOADING)
    return ExportReport(files=files, losses=[])


def _is_packed(file: QtmFile, model: PreTrainedModel, entry: TensorEntry) -> bool:
    with error_context(f"{file.label}: {entry.label}"):
        module = owner_of(model, entry.name, entry.shape[::-1] if entry.transposed else entry.shape)
    return isinstance(entry.encoding, MatrixEncoding) and takes_sections(module, entry.name)


def _blocks(file: QtmFile, model: PreTrainedModel, packed: dict[str, TensorEntry]) -> Iterator[Tensors]:
    """The tensors of each block."""
    for names in names_by_block(file):
        tensors = {
            name: decode_tensor(file, file.tensors[name]).to(_stored_dtype(file.tensors[name])).contiguous()
            for name in names
            if name not in packed
        }
        for name in names:
            if name in packed:
                tensors[section_name(model, name)] = section_tensor(file, packed[name]).clone()
        yield tensors
        file.drop_pages()


def _stored_dtype(entry: TensorEntry) -> torch.dtype:
    return DTYPES[entry.encoding.dtype] if isinstance(entry.encoding, Dense) else torch.float32
