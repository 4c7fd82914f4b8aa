"""A tokenizer as GGUF keys. llama.cpp splits text by rules of its own, which it knows by name: no name, no export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from formats.errors import FormatError
from formats.ggml.file import Value
from formats.strict_json import brief

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of token, as llama.cpp numbers them."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (rf"{_WORDS}|\p{{N}}|{_REST}", False): "qwen2",
    (rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}", True): "tekken",
    (rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}", False): "gpt-4o",
}
"""By the pattern that text is split at, and whether a piece that is a token is taken before any merge."""
_SPACE = "▁"
_NO_SCORE = -10000.0


def tokenizer_values(
    tokenizer: PreTrainedTokenizerBase, n_rows: int, generation: GenerationConfig | None
) -> dict[str, Value]:
    """The keys of a tokenizer for a model with `n_rows` embeddings; FormatError, naming it, for a kind without any."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(f"tokenizer {type(tokenizer).__name__}: has no tokenizer.json, so there is no export to GGUF")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise FormatError(f"tokenizer of type {brief(model['type'])}: there is no export to GGUF for it, only for BPE")
    tokens, types = _tokens(tokenizer, parts, n_rows)
    if _is_sentencepiece(parts):
        own = _sentencepiece(parts, tokens, types)
    else:
        merges = [_joined(pair) for pair in model["merges"]]
        own = {"model": "gpt2", "pre": _split_name(parts), "merges": merges}
    found = own | {"tokens": tokens, "token_type": np.array(types, np.int32)} | _special(tokenizer, generation)
    values = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return values | _chat_templates(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; rows of the embedding that no token has are named so that none is ever made."""
    tokens, types = [f"[PAD{i}]" for i in range(n_rows)], [UNUSED] * n_rows
    added = {int(item["id"]): item for item in parts["added_tokens"]}
    vocabulary = {int(i): text for text, i in tokenizer.get_vocab().items()}
    if vocabulary and max(vocabulary) >= n_rows:
        raise FormatError(f"tokenizer: its largest id is {max(vocabulary)}, the model has {n_rows} embeddings")
    unknown, bytewise = parts["model"].get("unk_token"), bool(parts["model"].get("byte_fallback"))
    for i, text in vocabulary.items():
        tokens[i], types[i] = text, NORMAL
        if text == unknown:
            types[i] = UNKNOWN
        elif i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
            tokens[i] = text if added[i]["special"] else text.replace(_SPACE, " ")
        elif bytewise and len(text) == 6 and text.startswith("<0x"):
            types[i] = BYTE
    return tokens, types


def _is_sentencepiece(parts: Mapping[str, Any]) -> bool:
    """Whether words begin with a visible space and unknown ones fall apart into bytes, as in SentencePiece."""
    return bool(parts["model"].get("byte_fallback"))


def _sentencepiece(parts: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Value]:
    """llama.cpp merges by the score of what comes out; the list of merges has the best first."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(parts["model"]["merges"]):
        rank.setdefault(_joined(pair).replace(" ", "", 1), i)
    scores = [0.0 if kind == BYTE else -float(rank[t]) if t in rank else _NO_SCORE
              for t, kind in zip(tokens, types, strict=True)]  # fmt: skip
    steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    known = {"Prepend", "Replace", "Metaspace", "Split"}
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise FormatError(f"tokenizer with {brief(other[0])}: llama.cpp has no such step for this kind of tokenizer")
    prefixed = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    return {
        "model": "llama",
        "pre": "default",
        "scores": np.array(scores, np.float32),
        "add_space_prefix": np.bool_(prefixed),
    }


def _split_name(parts: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which text is split before merges."""
    steps = _steps(parts["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    normal = [step["type"] for step in _steps(parts["normalizer"])]
    if normal in ([], ["NFC"]) and kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if steps[-1].get("use_regex", True):
            if kinds == ["ByteLevel"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
                return "smollm"
        elif kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            pattern = steps[0]["pattern"].get("Regex")
            if name := _SPLITS.get((pattern, bool(parts["model"].get("ignore_merges")))):
                return name
    raise FormatError(
        f"tokenizer: llama.cpp has no name for how it splits text: {brief(parts['normalizer'])}, "
        f"{brief(parts['pre_tokenizer'])}"
    )


def _special(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> dict[str, Value]:
    """Ids with a meaning, and what is put around a text."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{ours}_token_id", None) for ours, name in names.items()}
    stops = getattr(generation, "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if ids["eos"] is None and stops:
        ids["eos"] = stops[0]
    ids["eot"] = next((i for i in stops if i != ids["eos"]), None)
    found: dict[str, Value] = {f"{name}_token_id": np.uint32(i) for name, i in ids.items() if i is not None}
    plain, whole = (list(tokenizer("a", add_special_tokens=added).input_ids) for added in (False, True))
    found["add_bos_token"] = np.bool_(whole != plain and whole[:1] == [ids["bos"]])
    found["add_eos_token"] = np.bool_(whole != plain and whole[-1:] == [ids["eos"]])
    return found


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    template: Any = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {f"tokenizer.chat_template.{name}": str(text) for name, text in template.items() if name != "default"}
    names: list[str] = sorted(name for name in template if name != "default")
    default = {"tokenizer.chat_template": str(template["default"])} if "default" in template else {}
    return {**default, **named, "tokenizer.chat_templates": names}


def _steps(component: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or several."""
    if component is None:
        return []
    inner = component.get("normalizers") or component.get("pretokenizers")
    return [component] if inner is None else list(inner)


def _joined(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)
