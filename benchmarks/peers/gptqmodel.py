"""GPTQModel: GPTQ with its activation order, on the CPU; what is measured is the checkpoint it writes."""

from __future__ import annotations

from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig

from benchmarks.peers.gptq_layout import read_checkpoint
from benchmarks.peers.job import Job


def main() -> None:
    job = Job.from_command_line()
    bits, group_size = job.options["bits"], job.options["group_size"]
    config = QuantizeConfig(
        bits=bits, group_size=group_size, desc_act=True, act_group_aware=False, offload_to_disk=False
    )
    model = GPTQModel.load(job.model, config, device="cpu")
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.token_windows()])
    folder = Path(job.output) / "checkpoint"
    model.save(str(folder))
    weights, stored_bytes = read_checkpoint(folder, bits, group_size)
    job.finish(weights, stored_bytes)


if __name__ == "__main__":
    main()
