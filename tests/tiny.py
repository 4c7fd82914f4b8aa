"""Tiny random models of every supported family, with a byte-level tokenizer: no downloads, no text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TOKENS = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": True},
    "mistral": {**SIZES, "sliding_window": 16},
    "qwen2": SIZES,  # biases on q, k and v
    "qwen3": {**SIZES, "head_dim": 8},  # q and k norms
    "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 16},  # scaled, tied embedding; soft caps; two masks
    "phi3": SIZES,  # fused qkv and gate_up
    "opt": {
        **TOKENS,
        "hidden_size": 32,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,  # linears outside the blocks
    },
    "gpt2": {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},  # Conv1D
    "gptj": {
        **TOKENS,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "rotary_dim": 4,
    },  # blocks give tuples
    "gpt_neox": {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"},
}
PACKED_KINDS = [  # a family and what it is compressed with: each way to store a matrix
    ("llama", ("--bits", "3", "--outliers", "1%")),
    ("gpt2", ("--format", "nf4", "--double-quant", "--group-size", "64")),
    ("gemma2", ("--format", "fitted", "--bits", "3")),
    ("qwen2", ("--format", "trellis", "--bits", "2")),
    ("opt", ("--method", "int8", "--group-size", "-1", "--outlier-features", "4")),
]
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **SIZES,
    **ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "topk_group": 1,
}
EXPERTS: dict[str, dict[str, Any]] = {  # fused 3-D expert tensors
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen2_moe": {**SIZES, **ROUTED, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**SIZES, **ROUTED, "head_dim": 8},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "n_group": 1},
    "deepseek_v3": {**LATENT, "q_lora_rank": 16, "n_group": 2},
    "olmoe": {**SIZES, "num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},  # stored as 3-D tensors
    "gemma4_text": {
        **SIZES,
        **ROUTED,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_experts_per_tok": 2,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 16,
    },  # linears behind the mixture
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
}
TEXT_TO_TEXT = {
    **TOKENS,
    "decoder_start_token_id": 258,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {  # an encoder and a decoder
    "switch_transformers": {
        **TEXT_TO_TEXT,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 12,  # some tokens find no room
    },
    "t5": TEXT_TO_TEXT,
    "bart": {
        **TOKENS,
        "decoder_start_token_id": 257,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 128,
        "forced_eos_token_id": None,
    },
}
WIDE_ENOUGH = ("switch_transformers", "t5")  # as transformers initialises them


WIDE: dict[str, dict[str, Any]] = {  # shapes that are whole words and groups of 32 to other engines
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "qwen2": {"hidden_size": 64, "intermediate_size": 96},
    "mixtral": {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 2},
    "gpt2": {"n_embd": 64},
    "phi3": {"hidden_size": 64, "intermediate_size": 96},
}


def make_model(
    family: str,
    folder: Path,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, Any] | None = None,
    **save: Any,
) -> Path:
    """A random model of `family`, of other `sizes` than usual, saved to `folder` with its tokenizer.

    save: goes to save_pretrained.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **((FAMILIES | EXPERTS | SEQ2SEQ)[family] | (sizes or {})))
    model = _class_of(config).from_config(config)
    if family not in WIDE_ENOUGH:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)  # wide enough that its predictions depend on the text
    if family in SEQ2SEQ:  # or they write nothing but the same token
        model.generation_config.update(suppress_tokens=[256, 257, 258], no_repeat_ngram_size=1)
    model.to(dtype).save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a byte, and the special tokens of SIZES."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    fast.save_pretrained(folder)


def load_reference(folder: Path) -> PreTrainedModel:
    """The model as transformers itself loads it."""
    auto = _class_of(AutoConfig.from_pretrained(folder))
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _class_of(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def silence() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
