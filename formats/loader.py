"""A `.qtm` file as a running transformers model whose weights stay packed in the mapped file."""

from __future__ import annotations

import os
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.device import default_dtype, ready_device
from formats.embedded import GENERATION_CONFIG, generation_config, model_config, refused
from formats.encoding import Arrays, MatrixEncoding
from formats.errors import FormatError, error_context
from formats.header import TensorEntry
from formats.kernels.cpu import as_tensors
from formats.kernels.layout import layout_of
from formats.modules import owner_of, put_section, takes_sections
from formats.reader import QtmFile, verify_file
from formats.section import part_arrays
from formats.skeleton import build_skeleton, parameter_names, set_tensor


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> PreTrainedModel:
    """The causal language model in a `.qtm` file, weights packed as in the file and decoded on each call.

    On the CPU the file stays mapped while the model lives; a GPU gets the sections as they lie. dtype: of the
    activations and of what is not packed; without it float32 on the CPU, bfloat16 on a GPU that has it and float16 on
    others. With `check`, every bit is verified first. Raises FormatError when the file is damaged, or lacks a tensor
    that its config implies, and KernelError when the device cannot run it.
    """
    file = QtmFile.open(path, check=check)
    where = ready_device(device, sum(entry.n_bytes for entry in file.tensors.values()))
    if check:
        verify_file(file)
    config = model_config(file)
    with refused(f"{path}: header: model", "3.4.1"):
        model = build_skeleton(config)
    aliases = parameter_names(model)
    dtype = dtype or default_dtype(where)
    for entry in file.tensors.values():
        _install(model, aliases.get(entry.name, [entry.name]), entry, file, where, dtype)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing:
        raise FormatError(f"{path}: tensor {missing[0]!r} is missing; the model's config implies it (SPEC 3.4.1)")
    if GENERATION_CONFIG in file.files:
        model.generation_config = generation_config(file)
    return cast(PreTrainedModel, cast(nn.Module, model).to(where))


def decode_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """The values [shape] f32 of a stored tensor, in the model's own orientation; a copy."""
    values = entry.encoding.decode(_checked_arrays(file, entry), entry.shape)
    return values.T.contiguous() if entry.transposed else values


def section_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """A section as a tensor [bytes] u8 over the mapped file: nothing is copied."""
    _checked_arrays(file, entry)
    return as_tensors({"section": np.frombuffer(file.section(entry), np.uint8)})["section"]


def _checked_arrays(file: QtmFile, entry: TensorEntry) -> Arrays:
    arrays = part_arrays(file.section(entry), entry.shape, entry.encoding)
    with error_context(f"{file.label}: {entry.label}"):
        entry.encoding.check_values(arrays, entry.shape)
    return arrays


def _install(
    model: PreTrainedModel,
    names: list[str],
    entry: TensorEntry,
    file: QtmFile,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a tensor to the model under all its names: a tied one is on the device once."""
    section: Tensor | None = None
    for name in names:
        with error_context(f"{file.label}: {entry.label}"):
            module = owner_of(model, name, entry.shape[::-1] if entry.transposed else entry.shape)
        encoding = entry.encoding
        if not isinstance(encoding, MatrixEncoding) or not takes_sections(module, name):
            set_tensor(model, name, decode_tensor(file, entry).to(device, dtype))
            continue
        if device.type != "cpu":
            layout_of(encoding, entry.shape)  # refuses what no kernel takes
        section = section_tensor(file, entry).to(device) if section is None else section
        put_section(model, name, section, encoding, entry.shape, dtype)
