"""From an open file to a model: tensors are put into the skeleton one after the other, each on its device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
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
from formats.kernels.layout import is_ternary, layout_of
from formats.modules import QuantLinear, owner_of, put_section, takes_sections
from formats.placement import Placement, Sizes
from formats.reader import QtmFile
from formats.skeleton import build_skeleton, parameter_names, second_names, set_tensor, split_name, untie
from formats.streaming import BlockStreamer, StreamedBlock
from formats.tensors import DTYPES, decode_tensor, section_tensor
from formats.upload import HostMemory, Uploader


@torch.inference_mode(False)  # tensors made in it can be used nowhere else
def build_model(
    file: QtmFile, sizes: Sizes, placement: Placement, dtype: torch.dtype | None, *, in_host_memory: bool = False
) -> PreTrainedModel:
    """The model of a file whose placement is decided.

    in_host_memory: blocks that are streamed are read into (on a GPU's machine: pinned) memory now, else when used.
    """
    with refused(f"{file.label}: header: model", "3.4.1"):
        model = build_skeleton(model_config(file), file.tensors)
        untie(model, file.tensors.keys() & second_names(model))
    builder = _Builder(file, model, sizes, placement, dtype or default_dtype(placement.outside), in_host_memory)
    for entry in file.tensors.values():
        builder.install(entry)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing and not any(device.type == "meta" for device in placement.devices):
        raise FormatError(f"{file.label}: tensor {missing[0]!r} is missing; the model's config implies it (SPEC 3.4.1)")
    builder.finish()
    model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    model.tie_weights = _are_tied  # type: ignore[method-assign]
    if GENERATION_CONFIG in file.files:
        model.generation_config = generation_config(file)
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """transformers would write sections without saying what they are, and read weights of its own making back."""
    raise FormatError("a model that qtool.load made is not saved: its file is; for a folder, qtool export FILE")


def _are_tied(*args: Any, **kwargs: Any) -> None:
    """Tied weights share their section already; transformers would look for the parameters that they no longer are."""


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
        self._host = HostMemory(pinned=placement.outside.type == "cuda")
        self._decoded: list[str] = []

    def install(self, entry: TensorEntry) -> None:
        """Give a tensor to the model under all its names: a tied one is once on each device that reads it."""
        sections: dict[torch.device, Tensor] = {}
        values: dict[torch.device, Tensor] = {}
        for name in self._aliases.get(entry.name, [entry.name]):
            block = self._sizes.lists.number(name)
            device = self._placement.device_of(block)
            with error_context(f"{self._file.label}: {entry.label}"):
                module = owner_of(self._model, name, entry.shape[::-1] if entry.transposed else entry.shape)
            if not self._stays_packed(module, name, entry, device):
                if device not in values:
                    values[device] = self._dense(entry, device)
                set_tensor(self._model, name, values[device])
                continue
            is_streamed = block is not None and block in self._placement.streamed
            if is_streamed:
                section = torch.empty(0, dtype=torch.uint8, device=device)
            elif device not in sections:
                section = sections[device] = self._put(entry, device)
            else:
                section = sections[device]
            encoding = cast(MatrixEncoding, entry.encoding)
            put_section(self._model, name, section, encoding, entry.shape, self._dtype)
            if is_streamed:
                self._stream(cast(int, block), name, entry)
        if self._uploaders:
            self._file.drop_pages(entry.offset_bytes, entry.offset_bytes + entry.n_bytes)

    def finish(self) -> None:
        """What is true of the whole model: buffers, hooks, and what had to be decoded."""
        if self._uploaders:
            self._place_buffers()
        if self._streamed:
            check = (lambda: None) if self._in_host_memory else self._file.check_unchanged
            BlockStreamer(list(self._streamed.values()), self._placement.outside, check)
        if len(self._placement.devices) > 1:
            self._move_inputs()
        if self._decoded:
            warnings.warn(
                f"{self._file.label}: {len(set(self._decoded))} layers are decoded to {self._dtype}, as no GPU kernel "
                f"takes them; the first is {self._decoded[0]!r}",
                stacklevel=4,
            )

    def _stays_packed(self, module: nn.Module, name: str, entry: TensorEntry, device: torch.device) -> bool:
        if not isinstance(entry.encoding, MatrixEncoding) or not takes_sections(module, name):
            return False
        if device.type != "cpu" and not is_ternary(entry.encoding):
            try:
                layout_of(entry.encoding, entry.shape)
            except KernelError:
                self._decoded.append(entry.name)
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
        values = raw.view(DTYPES[entry.encoding.dtype]).view(entry.shape).to(self._dtype)
        return values.T.contiguous() if entry.transposed else values

    def _stream(self, block: int, name: str, entry: TensorEntry) -> None:
        section = section_tensor(self._file, entry)
        if self._in_host_memory:
            section = self._host.take(len(section)).copy_(section)
        module = cast(QuantLinear, self._model.get_submodule(split_name(name)[0]))
        self._streamed[block].sections.append((module, section))

    def _block(self, index: int) -> nn.Module:
        name = self._sizes.lists.name(index)
        with error_context(f"{self._file.label}: header: model"):
            try:
                return self._model.get_submodule(name)
            except AttributeError as error:
                raise FormatError(f"blocks: the model's config has no {name}") from error

    def _place_buffers(self) -> None:
        """What no file stores, such as rotary frequencies, goes where its block or the outside is."""
        for index, device in enumerate(self._placement.blocks):
            _move_buffers(self._block(index).modules(), device)
        _move_buffers(self._outside(), self._placement.outside)

    def _move_inputs(self) -> None:
        """Each block, and each module outside of them that has parameters, is handed what it reads on its device."""
        for index, device in enumerate(self._placement.blocks):
            _reads_on(self._block(index), device)
        for module in self._outside():
            if any(True for _ in module.parameters(recurse=False)):
                _reads_on(module, self._placement.outside)

    def _outside(self) -> list[nn.Module]:
        """The modules that are in no block."""
        inside = {id(m) for index in range(len(self._placement.blocks)) for m in self._block(index).modules()}
        return [module for module in self._model.modules() if id(module) not in inside]


def _move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _reads_on(module: nn.Module, device: torch.device) -> None:
    def moved(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _moved(args, device), _moved(kwargs, device)

    module.register_forward_pre_hook(moved, with_kwargs=True)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested arguments on a device; a cache keeps each block's where that is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type != "cpu")  # the CPU does not wait for what is on its way
    if isinstance(value, tuple | list):
        return type(value)(map(partial(_moved, device=device), value))
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value
