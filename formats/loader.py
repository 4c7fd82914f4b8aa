"""A `.qtm` file as a running transformers model whose weights stay packed in the mapped file."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from formats.build import build_model
from formats.device import choose_placement
from formats.placement import DeviceMap, Sizes
from formats.reader import QtmFile, verify_file


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    device_map: DeviceMap | str | None = None,
    offload: str | None = None,
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> PreTrainedModel:
    """The language model in a `.qtm` file, weights packed as in the file and decoded on each call.

    On the CPU the file stays mapped while the model lives; a GPU gets the sections as they lie. device_map: instead of
    a device, "auto" for all GPUs, filled evenly, or a device for each block by name, and for "" all else. offload:
    "host" or "disk" keeps there the blocks that a GPU has no room for, each copied when its turn comes. dtype: of the
    activations and of what is not packed; without it float32 on the CPU, bfloat16 on a GPU that has it and float16 on
    others. With `check`, every bit is verified first. Raises FormatError when the file is damaged, or lacks a tensor
    that its config implies, and KernelError when the devices cannot run it.
    """
    file = QtmFile.open(path, check=check)
    sizes = Sizes.of(file)
    placement = choose_placement(sizes, device, device_map, offload)
    if check:
        verify_file(file)
    return build_model(file, sizes, placement, dtype, in_host_memory=offload == "host")
