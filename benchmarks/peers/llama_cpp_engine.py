"""Perplexity as llama.cpp computes it, from its own tokens and its own logits. Run in an environment of its own.

The protocol is that of its llama-perplexity: the text tokenized once, windows side by side, the first token of each
replaced by BOS where the model has one added, and only tokens behind the first half of a window scored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    model, text, seq_len, max_windows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    engine = Llama(str(model), n_ctx=seq_len, n_batch=seq_len, logits_all=True, verbose=False)
    adds_bos = engine.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    tokens = engine.tokenize(text.read_bytes(), add_bos=adds_bos, special=False)
    windows = min(len(tokens) // seq_len, max_windows)
    total, scored = 0.0, 0
    for i in range(windows):
        window = tokens[i * seq_len : (i + 1) * seq_len]
        if adds_bos:
            window[0] = engine.token_bos()
        engine.reset()
        engine.eval(window)
        first = seq_len // 2
        logits = np.asarray(engine.scores[first : seq_len - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        wanted = logits[np.arange(len(logits)), window[first + 1 :]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - wanted).sum())
        scored += len(logits)
    ids = np.array(tokens[: windows * seq_len], "<i4")
    digest = hashlib.sha256(np.array(ids.shape, "<i4").tobytes() + ids.tobytes()).hexdigest()  # as ours is
    print(json.dumps({"perplexity": float(np.exp(total / scored)), "tokens": scored, "tokens_sha256": digest}))


if __name__ == "__main__":
    main()
