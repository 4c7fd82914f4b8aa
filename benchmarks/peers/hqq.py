"""HQQ: no calibration; zero points are fitted to the weights under a sparse error (half-quadratic splitting)."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn

from benchmarks.peers.job import Job, Matrix


def main() -> None:
    job = Job.from_command_line()
    config = BaseQuantizeConfig(nbits=job.options["bits"], group_size=job.options["group_size"], axis=1)
    weights: dict[str, Matrix] = {}
    stored_bytes = 0
    for name, weight in job.linears().items():
        layer = _quantized(torch.from_numpy(weight), config)
        weights[name] = layer.dequantize().float().numpy()
        stored_bytes += sum(t.nbytes for t in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
    job.finish(weights, stored_bytes)


def _quantized(weight: Tensor, config: dict[str, object]) -> HQQLinear:
    """`weight` [out, in] as HQQ's own layer: packed codes, float16 scales and zero points."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.half(), requires_grad=False)
    return HQQLinear(linear, quant_config=config, compute_dtype=torch.float16, device="cpu")


if __name__ == "__main__":
    main()
