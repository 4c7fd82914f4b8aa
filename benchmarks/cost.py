"""What `qtool compress` costs: time against the arithmetic it cannot avoid, and peak memory.

The unavoidable arithmetic is timed in plain torch in the same run: two forward passes of the blocks over the
calibration set and one product x xᵀ for every distinct input of a linear. So is what the run does only so that it can
go on after a kill: hidden states, sections and journal made durable block by block, and the weights' hashes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import deque
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.tools import CALIBRATION, Limits, parser, print_table, qtool
from formats.header import TensorEntry
from formats.reader import QtmFile
from formats.writer import Writer
from qtool.checkpoint import open_checkpoint
from qtool.journal import Journal
from qtool.provenance import source_files
from qtool.states import HiddenStates, windows_per_batch

WINDOWS, SEQ_LEN = 32, 1024
DEPTHS = (8, 64)


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    options = ["--bits", 4, "--group-size", 64, "--calibration", args.calibration, *CALIBRATION, "--force"]
    made = qtool("compress", args.model, "-o", args.work / "cost.qtm", *options)
    journal = journal_seconds(args.model, args.work / "cost.qtm")
    floor = unavoidable_seconds(args.model)
    limits = Limits()
    share, peak_gb = made["seconds"] / floor, made["peak_rss_bytes"] / 1e9
    journal_percent = 100 * journal / made["seconds"]
    rows = [
        ("unavoidable arithmetic", f"{floor:.0f} s", "", ""),
        (
            "qtool compress, start to finish",
            f"{made['seconds']:.0f} s",
            f"{share:.2f}",
            limits.at_most("time", share, 1.3),
        ),
        (
            "journal, share of the run",
            f"{journal:.1f} s",
            f"{journal_percent:.1f} %",
            f"{limits.at_most('journal, % of the run', journal_percent, 3)} %",
        ),
        ("peak memory, reference model", f"{peak_gb:.2f} GB", "", f"{limits.at_most('memory', peak_gb, 1.2)} GB"),
    ]
    peaks = [peak_of_depth(args.work / f"depth-{n}", args.model, n, args.calibration) for n in DEPTHS]
    growth = peaks[1] / peaks[0]
    rows += [
        (f"peak memory, {DEPTHS[0]} equal blocks", f"{peaks[0] / 1e9:.3f} GB", "", ""),
        (
            f"peak memory, {DEPTHS[1]} equal blocks",
            f"{peaks[1] / 1e9:.3f} GB",
            f"{growth:.3f}",
            limits.at_most("growth", growth, 1.1),
        ),
    ]
    print_table(("what", "measured", "ratio", "limit"), rows)
    limits.finish()


def journal_seconds(model: Path, made: Path) -> float:
    """Seconds of what the run that made `made` of `model` did for its journal, done again without the work between."""
    checkpoint, output = open_checkpoint(str(model)), made.with_name("journal.qtm")
    batch = torch.randn(1, SEQ_LEN, checkpoint.config.hidden_size)
    start = time.perf_counter()
    source_files(checkpoint)
    with QtmFile.open(made, check=False) as file, Journal(output) as journal:
        steps = steps_of(file)
        journal.begin({"model": str(model)}, len(steps), restart=True)
        journal.start()
        states = HiddenStates(
            journal.folder, torch.zeros(WINDOWS, SEQ_LEN, dtype=torch.int64), windows_per_batch(SEQ_LEN)
        )
        with Writer(output, overwrite=True, part=journal.sections) as writer:
            for index, entries in enumerate(steps):
                for _ in range(2 if index else 0):
                    deque(states.read(index - 1), maxlen=0)
                if index + 1 < len(steps):
                    states.write(index, repeat(batch, WINDOWS))
                for entry in entries:
                    writer.add_tensor(entry.name, entry.shape, entry.encoding, file.section(entry))
                writer.sync()
                journal.commit(entries, {"relative_errors": {entry.name: entry.relative_error for entry in entries}})
    return time.perf_counter() - start


def steps_of(file: QtmFile) -> list[list[TensorEntry]]:
    """The tensors that each step of the run wrote: what lies outside the blocks, then block after block."""
    block = re.compile(re.escape(file.header.model["blocks"]) + r"\.\d+\.")
    found = groupby(file.tensors.values(), lambda entry: (match := block.match(entry.name)) and match[0])
    return [list(entries) for _, entries in found]


@torch.inference_mode()
def unavoidable_seconds(folder: Path) -> float:
    """Seconds of two forward passes of the blocks over 32 x 1024 tokens, and of the Hessian products."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, SEQ_LEN))
    base = model.get_decoder()
    base(input_ids=ids, use_cache=False)  # warm up
    start = time.perf_counter()
    for _ in range(2 * WINDOWS):
        base(input_ids=ids, use_cache=False)
    return time.perf_counter() - start + hessian_seconds(model)


def hessian_seconds(model: PreTrainedModel) -> float:
    """Seconds of accumulating x xᵀ over all windows for each block's four distinct inputs, in float32."""
    block: Any = model.get_decoder().layers[0]
    widths = [
        m.in_features for m in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj)
    ]
    inputs = [torch.randn(SEQ_LEN, width) for width in widths]
    sums = [torch.zeros(width, width) for width in widths]
    start = time.perf_counter()
    for _ in range(WINDOWS):
        for x, total in zip(inputs, sums, strict=True):
            total.addmm_(x.T, x)
    return (time.perf_counter() - start) * model.config.num_hidden_layers


def peak_of_depth(folder: Path, tokenizer_of: Path, depth: int, calibration: Path) -> float:
    """Peak resident bytes of compressing a generated Llama of `depth` equal blocks."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=704, num_hidden_layers=depth,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    options = ["--samples", 8, "--seq-len", 512, "--calibration", calibration, "--force"]
    made = qtool("compress", folder, "-o", folder.with_suffix(".qtm"), *options)
    shutil.rmtree(folder)
    return float(made["peak_rss_bytes"])


if __name__ == "__main__":
    main()
