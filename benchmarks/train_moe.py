"""Train a small mixture of experts on Python's own documentation: a model whose experts have learned something.

    python -m benchmarks.train_moe build/moe [--minutes 19]

Mixtral's layout: 2 blocks of 4 experts of 512 x 1024, two for each token, 16 million parameters: rows long enough that
what is stored for each of them weighs little. The text is what `--calibration builtin` is drawn from; what `eval
perplexity` measures on is held back. Stops when the time is up.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, logging

from calibration.builtin import builtin_documents

VOCAB, SEQ_LEN, BATCH = 2048, 256, 8
LEARNING_RATE, WARM_UP = 2e-3, 0.04
N_EXPERTS = 4


def config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        output_router_logits=True,  # balances the experts
        router_aux_loss_coef=0.02,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        sliding_window=None,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--minutes", type=float, default=19)
    args = options.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    documents = builtin_documents("train")
    tokenizer = train_tokenizer(documents)
    ids = torch.tensor([i for text in documents for i in (0, *tokenizer(text).input_ids)])
    model = MixtralForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens of text", flush=True)
    train(model, ids, 60 * args.minutes)
    model.config.output_router_logits = False
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of the very text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def batches(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Windows [BATCH, SEQ_LEN] from anywhere in the text, without end."""
    while True:
        starts = torch.randint(len(ids) - SEQ_LEN, (BATCH,))
        yield torch.stack([ids[start : start + SEQ_LEN] for start in starts.tolist()])


def train(model: MixtralForCausalLM, ids: torch.Tensor, seconds: float) -> None:
    """AdamW under a cosine over the time that there is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started, mean = time.perf_counter(), 0.0
    for step, batch in enumerate(batches(ids)):
        done = (time.perf_counter() - started) / seconds
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}, {done:.0%}: loss {mean / (1 - 0.98 ** (step + 1)):.3f}", flush=True)


if __name__ == "__main__":
    main()
