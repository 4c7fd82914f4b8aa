"""AutoRound: signed gradient descent on the rounding of every weight and the clipping of every group, block by block.

What is measured is the checkpoint it writes in its own format, decoded from the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from benchmarks.peers.gptq_layout import read_checkpoint
from benchmarks.peers.job import Job


def main() -> None:
    job = Job.from_command_line()
    bits, group_size = job.options["bits"], job.options["group_size"]
    windows = torch.from_numpy(job.token_windows()[: job.options["windows"], : job.options["seq_len"]])
    sample = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows]
    rounding = AutoRound(
        job.model,
        AutoTokenizer.from_pretrained(job.model),
        bits=bits,
        group_size=group_size,
        iters=job.options["iterations"],
        dataset=sample,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=job.options["batch_size"],
        device_map="cpu",
        enable_torch_compile=False,
        seed=job.seed,
    )
    _, folder = rounding.quantize_and_save(job.output, format="auto_round")
    weights, stored_bytes = read_checkpoint(Path(folder), bits, group_size)
    job.finish(weights, stored_bytes)


if __name__ == "__main__":
    main()
