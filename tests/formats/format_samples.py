"""Small layers and files for the tests of `formats`."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.encoding import Dense, encoding_of
from formats.layer import Layer, QuantizedLinear
from formats.section import pack
from formats.writer import Writer

DENSE = {"f2": Dense("F16"), "u2": Dense("BF16"), "u4": Dense("F32")}
MEMBERS: dict[str, Any] = {
    "model": {"model_type": "llama", "architecture": "LlamaForCausalLM", "config": {"vocab_size": 3}},
    "recipe": {"bits": 4},
    "provenance": {"tool": "qtool 0.1.0"},
    "quality": {"perplexity": 5.25},
}
NO_MEMBERS: dict[str, dict[str, object]] = {"model": {}, "recipe": {}, "provenance": {}, "quality": {}}


def make_layer(
    out_features: int = 3,
    in_features: int = 11,
    bits: int = 3,
    group_size: int = 4,
    symmetric: bool = False,
    scaled: bool = False,
) -> QuantizedLinear:
    """A layer that is a function of its arguments alone: no random generator whose stream could change."""
    n_groups = -(-in_features // group_size)
    codes = np.arange(out_features * in_features, dtype=np.int64).reshape(out_features, in_features)
    groups = np.arange(out_features * n_groups, dtype=np.int64).reshape(out_features, n_groups)
    return QuantizedLinear(
        codes=(7 * codes % (1 << bits)).astype(np.uint8),
        scales=((groups % 13 + 1) / 64).astype(np.float16),
        zeros=None if symmetric else (5 * groups % (1 << bits)).astype(np.uint8),
        bits=bits,
        group_size=group_size,
        input_scales=((np.arange(in_features) % 7 + 3) / 8).astype(np.float16) if scaled else None,
    )


def same_layer(a: Any, b: Any) -> bool:
    """Whether two layers, or parts of them, are the same bit for bit: the sign of a zero scale counts."""
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same_layer(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return bool(a == b)


def write_tiny(path: str | os.PathLike[str]) -> bytes:
    """The smallest file that has everything: a 3-bit layer with a short last group, a vector, a file."""
    layer = make_layer()
    with Writer(path) as writer:
        writer.add_tensor("w", (3, 11), encoding_of(layer), pack(layer), relative_error=0.25)
        writer.add_tensor("norm", (3,), Dense("F16"), np.array([1, 2, 3], np.float16))
        writer.add_file("t.json", b"{}")
        writer.finish(model={}, recipe={}, provenance={}, quality={})
    return Path(path).read_bytes()


def write_items(path: str | os.PathLike[str], items: Iterable[Layer | npt.NDArray[Any] | bytes]) -> None:
    """A file of layers, dense arrays (<u2: BF16, <u4: the bits of F32) and embedded files, named by their numbers."""
    with Writer(path) as writer:
        for i, item in enumerate(items):
            if isinstance(item, bytes):
                writer.add_file(f"{i}", item)
            elif isinstance(item, Layer):
                writer.add_tensor(f"{i}", item.shape, encoding_of(item), pack(item))
            else:
                writer.add_tensor(f"{i}", item.shape, DENSE[item.dtype.str[1:]], item.tobytes())
        writer.finish(**MEMBERS)


def add_layer(writer: Writer, name: str, layer: Layer, **options: object) -> None:
    writer.add_tensor(name, layer.shape, encoding_of(layer), pack(layer), **options)


def f16(bits: list[int]) -> npt.NDArray[np.float16]:
    return np.array(bits, np.uint16).view(np.float16)
