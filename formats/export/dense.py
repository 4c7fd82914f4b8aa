"""An ordinary Hugging Face folder whose weights are the decoded ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from formats.embedded import config_dict, model_config
from formats.experts import fuse_experts
from formats.export.card import Loading
from formats.export.folder import Tensors, names_by_block, write_folder
from formats.export.report import ExportReport
from formats.modules import check_tensors
from formats.reader import QtmFile
from formats.skeleton import build_skeleton
from formats.tensors import decode_tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_dense(file: QtmFile, folder: Path, *, dtype: str = "float32", overwrite: bool = False) -> ExportReport:
    """Write the folder. float32 holds the decoded values exactly; who names another dtype wants them rounded."""
    model, config = build_skeleton(model_config(file), file.tensors), config_dict(file) | {"dtype": dtype}
    check_tensors(model, file)
    loading = Loading(format="dense", options=() if dtype == "float32" else ("--dtype", dtype))
    files = write_folder(
        file, folder, _decoded(file, model, DTYPES[dtype]), config, overwrite=overwrite, loading=loading
    )
    return ExportReport(files=files, losses=[])


def _decoded(file: QtmFile, model: PreTrainedModel, dtype: torch.dtype) -> Iterator[Tensors]:
    """The tensors of each block, under the names that checkpoints use."""
    for names in names_by_block(file):
        tensors = {name: decode_tensor(file, file.tensors[name]).to(dtype) for name in names}
        # transformers fuses some tensors on loading; on disk they have their published names.
        tensors = fuse_experts(model, tensors)
        tensors = revert_weight_conversion(model, tensors)
        yield {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.drop_pages()
