"""Whether a device can run a file: what is missing is said before anything is loaded."""

from __future__ import annotations

import importlib.util

import torch

from formats.errors import KernelError

WITH_BFLOAT16 = 8, 0
LEAST_CAPABILITY = 7, 5
"""Of a GPU: Turing. What the kernels are compiled for and read from begins there."""


def ready_device(name: str, n_bytes: int) -> torch.device:
    """The device of this name, which has `n_bytes` free; KernelError tells what is missing, and the fix."""
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
    _check_gpu(device, n_bytes)
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """Of activations: what a device computes fast, bfloat16 rather than float16, which some models overflow."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= WITH_BFLOAT16 else torch.float16


def _check_gpu(device: torch.device, n_bytes: int) -> None:
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < LEAST_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        raise KernelError(f"device '{device}': {name} has compute capability {have}, must be {need} or more; use cpu")
    free, _ = torch.cuda.mem_get_info(device)
    if free < n_bytes:
        need, have = (f"{value / 1e9:.1f} GB" for value in (n_bytes, free))
        raise KernelError(f"device '{device}': the model takes {need}, {name} has {have} free; use cpu, or fewer bits")
