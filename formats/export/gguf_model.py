"""What a GGUF file says about a model besides weights and tokenizer: which tensor is which, and the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.ggml.file import Value
from formats.strict_json import brief

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_TWO_NORMS = {**_ATTENTION, **_MLP, "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    **_ATTENTION,
    **_MLP,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_SCALED_ROPE = ("linear", "yarn")
_ROPE_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One that llama.cpp has. interleaves: q and k rows of a head lie in pairs that are rotated together.

    norm_offset: what llama.cpp expects to be added to the weight of a norm already.
    window_period: of so many blocks the last sees the whole context and the others a window; 0: no windows.
    """

    name: str
    in_block: Mapping[str, str] = field(default_factory=lambda: _TWO_NORMS)
    interleaves: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    window_period: int = 0
    partial_rotary: bool = False


_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": Architecture(name="llama", interleaves=True),
    "mistral": Architecture(name="llama", interleaves=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "gemma": Architecture(name="gemma", **_GEMMA),
    "gemma2": Architecture(name="gemma2", in_block=_FOUR_NORMS, window_period=2, **_GEMMA),
    "gemma3_text": Architecture(name="gemma3", in_block=_FOUR_NORMS, window_period=6, **_GEMMA),
    "phi3": Architecture(
        name="phi3",
        in_block={**_TWO_NORMS, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        partial_rotary=True,
    ),
}
"""By transformers' `model_type`."""


class GgufModel:
    """A model of a supported architecture, from transformers' config and the name of its list of blocks."""

    def __init__(self, config: Any, block_list: str) -> None:
        kind = str(config.model_type)
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise FormatError(f"model_type={brief(kind)}: there is no export to GGUF for it, only for {known}")
        self.architecture, self._config, self._block_list = ARCHITECTURES[kind], config, block_list
        self._head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._check()

    def tensor_name(self, name: str) -> str:
        """What GGUF calls the parameter `name`."""
        owner, _, leaf = name.rpartition(".")
        block = re.fullmatch(rf"{re.escape(self._block_list)}\.(\d+)\.(.+)", owner)
        if leaf in ("weight", "bias"):
            if block and block[2] in self.architecture.in_block:
                return f"blk.{block[1]}.{self.architecture.in_block[block[2]]}.{leaf}"
            if not block and (outside := _OUTSIDE.get(owner.rpartition(".")[2])):
                return f"{outside}.{leaf}"
        raise FormatError(f"tensor {brief(name)}: {self.architecture.name} has none like it in GGUF")

    def row_order(self, name: str, n_rows: int) -> npt.NDArray[np.int64] | None:
        """Which row of the parameter `name` comes where; None where they stay as they are."""
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._n_kv_heads}
        n_heads = heads.get(name.split(".")[-2]) if self.architecture.interleaves else None
        if n_heads is None:
            return None
        return np.arange(n_rows).reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def added(self, name: str) -> float:
        """What is added to every value of the parameter `name`."""
        return self.architecture.norm_offset if name.endswith("norm.weight") else 0.0

    def values(self) -> dict[str, Value]:
        """The keys of the architecture."""
        config = self._config
        found: dict[str, Value] = {
            "context_length": _u32(self._context_length()),
            "embedding_length": _u32(config.hidden_size),
            "block_count": _u32(config.num_hidden_layers),
            "feed_forward_length": _u32(config.intermediate_size),
            "attention.head_count": _u32(config.num_attention_heads),
            "attention.head_count_kv": _u32(self._n_kv_heads),
            "attention.key_length": _u32(self._head_dim),
            "attention.value_length": _u32(self._head_dim),
            "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
            "vocab_size": _u32(config.vocab_size),
            "rope.dimension_count": _u32(int(self._head_dim * self._rope.get("partial_rotary_factor", 1.0))),
            "rope.freq_base": np.float32(self._rope["rope_theta"]),
        }
        found |= self._scaled_rope() | self._attention()
        return {f"{self.architecture.name}.{key}": value for key, value in found.items()}

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """What GGUF stores as a tensor and a checkpoint does not: how far Llama 3 slows each frequency."""
        if self._rope.get("rope_type") != "llama3":
            return {}
        factor, low, high = (float(self._rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        exponents = np.arange(0, self._head_dim, 2, dtype=np.float64) / self._head_dim
        lengths = 2 * np.pi * float(self._rope["rope_theta"]) ** exponents
        turns = float(self._rope["original_max_position_embeddings"]) / lengths  # in the context of the first training
        share = np.clip((turns - low) / (high - low), 0, 1)
        return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).astype(np.float32)}

    @property
    def _n_kv_heads(self) -> int:
        return int(getattr(self._config, "num_key_value_heads", None) or self._config.num_attention_heads)

    @property
    def _rope(self) -> dict[str, Any]:
        """Of the blocks that see the whole context."""
        every: dict[str, Any] = self._config.rope_parameters
        full: dict[str, Any] = every.get("full_attention", every)
        return full

    def _context_length(self) -> int:
        """Where llama.cpp has no window for an architecture, the context in which that makes no difference."""
        window = None if self.architecture.window_period else getattr(self._config, "sliding_window", None)
        return min(int(self._config.max_position_embeddings), int(window or 2**31))

    def _scaled_rope(self) -> dict[str, Value]:
        kind = str(self._rope.get("rope_type", "default"))
        if kind in ("default", "llama3"):
            return {}
        if kind not in _SCALED_ROPE:
            raise FormatError(f"rope_type={brief(kind)}: there is no export to GGUF for it")
        if other := [key for key, value in self._rope.items() if key not in _ROPE_KEYS and value is not None]:
            raise FormatError(f"rope_parameters: there is no export of {brief(other[0])} to GGUF")
        found: dict[str, Value] = {
            "rope.scaling.type": kind,
            "rope.scaling.factor": np.float32(self._rope["factor"]),
        }
        if kind == "yarn":
            length = self._rope.get("original_max_position_embeddings") or self._config.max_position_embeddings
            found["rope.scaling.original_context_length"] = _u32(length)
        return found

    def _attention(self) -> dict[str, Value]:
        """Caps of logits, and windows."""
        found: dict[str, Value] = {}
        for key, name in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
            if (cap := getattr(self._config, name, None)) is not None:
                found[f"{key}_logit_softcapping"] = np.float32(cap)
        if self.architecture.window_period:
            found["attention.sliding_window"] = _u32(self._config.sliding_window)
        return found

    def _check(self) -> None:
        """Refuse what llama.cpp would compute otherwise than the config says."""
        config = self._config
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        head_scale = getattr(config, "query_pre_attn_scalar", None) or self._head_dim
        wanted = {
            "hidden_act": (activation, self.architecture.activation),
            "query_pre_attn_scalar": (head_scale, self._head_dim),
        }
        if not self.architecture.partial_rotary:
            wanted["partial_rotary_factor"] = (self._rope.get("partial_rotary_factor", 1.0), 1.0)
        if period := self.architecture.window_period:
            kinds = [i % period != period - 1 for i in range(config.num_hidden_layers)]
            expected = ["sliding_attention" if windowed else "full_attention" for windowed in kinds]
            wanted["layer_types"] = (list(config.layer_types), expected)
        for name, (found, right) in wanted.items():
            if found != right:
                raise FormatError(
                    f"{name}={brief(found)}: llama.cpp computes {self.architecture.name} with {brief(right)} only"
                )


def _u32(value: Any) -> np.uint32:
    return np.uint32(int(value))
