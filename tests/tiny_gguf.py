"""A GGUF file of a tiny Llama, written as llama.cpp's converter writes one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig

BLOCK_TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
Array = npt.NDArray[np.float32]


def write_gguf(folder: Path, path: Path, matrices: str = "F32") -> Path:
    """The Llama in `folder` as a GGUF file whose matrices are stored as F32, F16 or, where rows allow it, Q8_0."""
    config = AutoConfig.from_pretrained(folder)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, values in load_file(folder / "model.safetensors").items():
        stored = _gguf_name(name)
        kind = stored.split(".")[-2]
        _add_tensor(writer, stored, _rotary_order(values, heads[kind]) if kind in heads else values, matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{BLOCK_TENSORS[rest.removesuffix('.weight')]}.weight"


def _rotary_order(values: Array, n_heads: int) -> Array:
    """The two halves of each head interleaved: llama.cpp rotates neighbours."""
    halves = values.reshape(n_heads, 2, -1, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_tensor(writer: GGUFWriter, name: str, values: Array, matrices: str) -> None:
    kind = GGMLQuantizationType[_stored_type(values, matrices)]
    writer.add_tensor(name, quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)


def _stored_type(values: Array, matrices: str) -> str:
    """Vectors stay F32, and rows that a block of 32 does not divide cannot be Q8_0."""
    if values.ndim < 2:
        return "F32"
    return "F16" if matrices == "Q8_0" and values.shape[1] % 32 else matrices


def _add_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    """One token a byte, in the order of `tiny.save_tokenizer`, and its special tokens; GGUF wants a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<s>", "</s>", "<pad>", "th"]
    assert len(tokens) == vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    writer.add_add_bos_token(False)
