"""From an open file to a model: tensors are put into the skeleton one after the other, each on its device."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.device import default_dtype
from formats.embedded import GENERATION_CONFIG, generation_config, model_config, refused
from formats.encoding import Dense, MatrixEncoding
from formats.errors import FormatError, KernelError, error_context
from formats.header import TensorEntry
from formats.kernels.layout import layout_of
from formats.modules import QuantLinear, owner_of, put_section, takes_sections
from formats.placement import Placement, Sizes, block_of
from formats.reader import QtmFile
from formats.skeleton import build_skeleton, parameter_names, set_tensor, split_name
from formats.streaming import BlockStreamer, StreamedBlock
from formats.tensors import decode_tensor, section_tensor
from formats.upload import Uploader

DENSE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def build_model(
    file: QtmFile, sizes: Sizes, placement: Placement, dtype: torch.dtype | None, *, in_host_memory: bool = False
) -> PreTrainedModel:
    """The model of a file whose placement is decided.

    in_host_memory: blocks that are streamed are read into (on a GPU's machine: pinned) memory now, else when used.
    """
    with refused(f"{file.label}: header: model", "3.4.1"):
        model = build_skeleton(model_config(file))
    builder = _Builder(file, model, sizes, placement, dtype or default_dtype(placement.outside), in_host_memory)
    for entry in file.tensors.values():
        builder.install(entry)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing and not any(device.type == "meta" for device in placement.devices):
        raise FormatError(f"{file.label}: tensor {missing[0]!r} is missing; the model's config implies it (SPEC 3.4.1)")
    builder.finish()
    if GENERATION_CONFIG in file.files:
        model.generation_config = generation_config(file)
    return model


class _Builder:
    """The model that a file's tensors go into."""

    def __init__(
        self,
        file: QtmFile,
        model: PreTrainedModel,
        sizes: Sizes,
        placement: Placement,
        dtype: torch.dtype,
        in_host_memory: bool,
    ) -> None:
        self._file, self._model, self._sizes, self._placement = file, model, sizes, placement
        self._dtype, self._in_host_memory = dtype, in_host_memory
        self._aliases = parameter_names(model)
        self._uploaders = {device: Uploader(device) for device in placement.devices if device.type != "cpu"}
        self._streamed = {index: StreamedBlock(self._block(index)) for index in sorted(placement.streamed)}
        self._decoded: list[str] = []

    def install(self, entry: TensorEntry) -> None:
        """Give a tensor to the model under all its names: a tied one is on the device once."""
        block = block_of(entry, self._sizes.block_list)
        device = self._placement.device_of(block)
        section: Tensor | None = None
        for name in self._aliases.get(entry.name, [entry.name]):
            with error_context(f"{self._file.label}: {entry.label}"):
                module = owner_of(self._model, name, entry.shape[::-1] if entry.transposed else entry.shape)
            encoding = entry.encoding
            if not isinstance(encoding, MatrixEncoding) or not self._stays_packed(module, name, entry, device):
                set_tensor(self._model, name, self._dense(entry, device))
                continue
            if block in self._placement.streamed:
                section = torch.empty(0, dtype=torch.uint8, device=device)
            elif section is None:
                section = self._put(entry, device)
            put_section(self._model, name, section, encoding, entry.shape, self._dtype)
            if block is not None and block in self._placement.streamed:
                self._stream(block, name, entry)
        if device.type != "cpu":
            self._file.drop_pages(entry.offset_bytes, entry.offset_bytes + entry.n_bytes)

    def finish(self) -> None:
        """What is true of the whole model: buffers, hooks, and what had to be decoded."""
        self._place_buffers()
        if self._streamed:
            check = (lambda: None) if self._in_host_memory else self._file.check_unchanged
            BlockStreamer(list(self._streamed.values()), self._placement.outside, check)
        if len(self._placement.devices) > 1:
            self._move_inputs()
        if self._decoded:
            warnings.warn(
                f"{self._file.label}: {len(self._decoded)} layers are decoded and take 16 bits a weight, as no GPU "
                f"kernel takes them; the first is {self._decoded[0]!r}",
                stacklevel=4,
            )

    def _stays_packed(self, module: nn.Module, name: str, entry: TensorEntry, device: torch.device) -> bool:
        if not takes_sections(module, name):
            return False
        if device.type != "cpu":
            try:
                layout_of(cast(MatrixEncoding, entry.encoding), entry.shape)
            except KernelError:
                self._decoded.append(name)
                return False
        return True

    def _put(self, entry: TensorEntry, device: torch.device) -> Tensor:
        """The section on its device; on the CPU it stays in the mapped file."""
        section, first = section_tensor(self._file, entry), entry.offset_bytes
        if device.type == "cpu":
            return section
        return self._uploaders[device].put(
            section, lambda start, stop: self._file.drop_pages(first + start, first + stop)
        )

    def _dense(self, entry: TensorEntry, device: torch.device) -> Tensor:
        """The values of a tensor on its device, in the dtype of the activations."""
        if device.type == "cpu" or not isinstance(entry.encoding, Dense):
            return decode_tensor(self._file, entry).to(device, self._dtype)
        raw = self._put(entry, device)  # no float32 copy on the host
        values = raw.view(DENSE_DTYPES[entry.encoding.dtype]).view(entry.shape).to(self._dtype)
        return values.T.contiguous() if entry.transposed else values

    def _stream(self, block: int, name: str, entry: TensorEntry) -> None:
        section = section_tensor(self._file, entry)
        if self._in_host_memory:
            pinned = self._placement.outside.type == "cuda"
            section = torch.empty_like(section, pin_memory=pinned).copy_(section)
        module = cast(QuantLinear, self._model.get_submodule(split_name(name)[0]))
        self._streamed[block].sections.append((module, section))

    def _block(self, index: int) -> nn.Module:
        with error_context(f"{self._file.label}: header: model"):
            try:
                return self._model.get_submodule(f"{self._sizes.block_list}.{index}")
            except AttributeError as error:
                raise FormatError(f"blocks: the model's config has no {self._sizes.block_list}.{index}") from error

    def _place_buffers(self) -> None:
        """What no file stores, such as rotary frequencies, goes where its block or the outside is."""
        if not self._uploaders:
            return
        for index, device in enumerate(self._placement.blocks):
            _move_buffers(self._block(index), device)
        inside = {id(m) for index in range(len(self._placement.blocks)) for m in self._block(index).modules()}
        for module in self._model.modules():
            if id(module) not in inside:
                _move_buffers(module, self._placement.outside, recurse=False)

    def _move_inputs(self) -> None:
        """Each block, and each module outside of them that has parameters, is handed what it reads on its device."""
        inside = set[int]()
        for index, device in enumerate(self._placement.blocks):
            inside |= {id(module) for module in self._block(index).modules()}
            _reads_on(self._block(index), device)
        for module in self._model.modules():
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
                _reads_on(module, self._placement.outside)


def _move_buffers(module: nn.Module, device: torch.device, *, recurse: bool = True) -> None:
    for each in module.modules() if recurse else (module,):
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = buffer.to(device)


def _reads_on(module: nn.Module, device: torch.device) -> None:
    def moved(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _moved(args, device), _moved(kwargs, device)

    module.register_forward_pre_hook(moved, with_kwargs=True)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested arguments on a device; a cache keeps each block's where that is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(map(partial(_moved, device=device), value))
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value
