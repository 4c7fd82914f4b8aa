"""Whether a device can run a file: what is missing is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from formats.errors import KernelError
from formats.placement import DeviceMap, Placement, Sizes, by_name, on_one, spread, streamed

FOR_ACTIVATIONS = 0.1
"""Of a GPU's free memory, where blocks are placed by what there is room for."""
WITH_BFLOAT16 = 8, 0
LEAST_CAPABILITY = 7, 5
"""Of a GPU: Turing. What the kernels are compiled for and read from begins there."""


def ready_device(name: str) -> torch.device:
    """The device of this name; KernelError tells what is missing, and the fix."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise KernelError(f"device {name!r}: torch knows no such device; use cpu or cuda") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise KernelError(f"device {name!r}: there are no kernels for it; use cpu or cuda")
    n_gpus = torch.cuda.device_count()
    if n_gpus == 0:
        raise KernelError(f"device {name!r}: torch finds no GPU here; use cpu, or a torch that is built for CUDA")
    if (device.index or 0) >= n_gpus:
        raise KernelError(f"device {name!r}: the last GPU here is cuda:{n_gpus - 1}")
    if importlib.util.find_spec("triton") is None:
        raise KernelError(f"device {name!r}: triton is missing; pip install 'qtool[cuda]'")
    _check_gpu(device)
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """Of activations: what a device computes fast, bfloat16 rather than float16, which some models overflow."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= WITH_BFLOAT16 else torch.float16


def choose_placement(sizes: Sizes, device: str, device_map: DeviceMap | str | None, offload: str | None) -> Placement:
    """Where the blocks go, as `load` was asked; KernelError where that cannot be."""
    if offload not in (None, "host", "disk"):
        raise KernelError(f"offload={offload!r}: must be host or disk")
    if device_map is None:
        where = ready_device(device)
        if offload is None:
            _check_room(where, sizes)
            return on_one(where, sizes)
        if where.type == "cpu":
            raise KernelError(f"offload={offload!r}: is for a GPU; on the CPU the file stays mapped, leave it out")
        placement = streamed(where, _usable(where), sizes)
        if offload == "host":
            _check_host(sum(sizes.packed[index] for index in placement.streamed))
        return placement
    if device != "cpu" or offload is not None:
        given = f"device={device!r}" if device != "cpu" else f"offload={offload!r}"
        raise KernelError(f"{given}: device_map says where everything goes; give one of the two")
    if isinstance(device_map, str):
        if device_map != "auto":
            raise KernelError(f"device_map={device_map!r}: must be 'auto', or a device for each block")
        gpus = [ready_device(f"cuda:{index}") for index in range(max(torch.cuda.device_count(), 1))]
        return spread(gpus, [_usable(gpu) for gpu in gpus], sizes)
    named = by_name(device_map, sizes)
    for found in named.devices:
        ready_device(str(found))
    return named


def _usable(gpu: torch.device) -> int:
    """Free bytes less what activations and a cache of keys and values may take."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return int(free * (1 - FOR_ACTIVATIONS))


def _check_room(device: torch.device, sizes: Sizes) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free >= sizes.total:
        return
    need, have = (f"{value / 1e9:.1f} GB" for value in (sizes.total, free))
    way_out = "use cpu, or fewer bits"
    if sizes.least <= _usable(device):
        way_out = f"--offload {'host' if available_bytes() > sizes.total else 'disk'} would do"
    name = torch.cuda.get_device_name(device)
    raise KernelError(f"device '{device}': the model takes {need}, {name} has {have} free; {way_out}")


def _check_host(n_bytes: int) -> None:
    if n_bytes > (available := available_bytes()):
        need, have = (f"{value / 1e9:.1f} GB" for value in (n_bytes, available))
        raise KernelError(f"offload='host': the blocks take {need} of memory, {have} are free; use --offload disk")


def available_bytes() -> int:
    """Memory of the host that is free or can be freed at once."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_gpu(device: torch.device) -> None:
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < LEAST_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        raise KernelError(f"device '{device}': {name} has compute capability {have}, must be {need} or more; use cpu")
