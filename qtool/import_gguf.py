"""A quantized GGUF file as layers with its own numbers, so that it becomes a `.qtm` without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from formats.errors import FormatError, error_context
from formats.ggml.blocks import FORMS, unpack
from formats.ggml.k_blocks import unpack_k
from formats.ggml.layers import layer_of
from formats.ggml.levels import LEVELS, unpack_levels
from formats.ggml.types import K_FORMS
from formats.layer import Layer, QuantizedLinear
from qtool.checkpoint import find_tensor
from qtool.checkpoint_gguf import GgufCheckpoint
from qtool.errors import CheckpointError

DENSE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
TERNARY = ("TQ1_0", "TQ2_0")
"""Of 256 weights, whose scale is the last thing in a block."""
Rows = npt.NDArray[Any]


class GgufSource:
    """A GGUF file to be imported. Bind `checkpoint` to a skeleton first; then `layer` knows its parameters.

    decoded: of each tensor asked for whose type no encoding holds, why it is decoded.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = _Checkpoint(path)
        self.decoded: dict[str, str] = {}

    def layer(self, name: str) -> Layer | None:
        """The parameter `name` as a layer with the numbers of the file, rows in the order of the model.

        None for what is not quantized, and for what no encoding holds.
        """
        stored = self.checkpoint.stored_tensor(name)
        if stored is None or stored.tensor_type.name in DENSE_TYPES:
            return None
        kind, shape = stored.tensor_type.name, tuple(int(size) for size in reversed(stored.shape))
        expected = tuple(find_tensor(self.checkpoint.model, name).shape)
        if shape not in (expected, expected[::-1]):  # a matrix may be stored turned
            raise CheckpointError(
                f"{self.checkpoint.name}: tensor {stored.name} is {list(shape)}, the config implies {list(expected)}"
            )
        order = self.checkpoint.row_order(stored.name, len(stored.data)) if stored.data.ndim == 2 else None
        with error_context(f"{self.checkpoint.name}: tensor {stored.name}"):
            layer = None if order is None else _layer(kind, stored.data[order])
        if layer is None:
            self.decoded[name] = f"{kind}: no encoding holds it; stored as float32"
        return layer


class _Checkpoint(GgufCheckpoint):
    """As it is read for compressing, but for types that are kept exactly."""

    model: PreTrainedModel

    def bind(self, model: PreTrainedModel) -> None:
        self.model = model
        super().bind(model)

    def stored_tensor(self, name: str) -> Any | None:
        """The one tensor of the file that makes the parameter `name`; None where there are none or several."""
        sources = self._sources.get(name, [])
        return self._stored[sources[0]] if len(sources) == 1 else None

    def row_order(self, stored: str, n_rows: int) -> npt.NDArray[np.int64] | None:
        """The row of the file that is each row of the parameter; None where it is more than a matter of rows."""
        numbers = np.arange(n_rows, dtype=np.int64)[:, None]
        try:
            processed = self._processor.process(
                weights=numbers, name=stored, tensor_key_mapping={}, parsed_parameters=self._parsed
            ).weights
        except ValueError:  # its columns are moved too
            return None
        # A matrix that is turned is stored the way a section is (SPEC 5.6).
        order = np.asarray(processed).reshape(-1)
        return order if sorted(order.tolist()) == list(range(n_rows)) else None

    def stored_dtype(self, name: str) -> str:
        """float32 for what had blocks: decoded values have more digits than 16 bits hold."""
        kinds = {self._stored[stored].tensor_type.name for stored in self._sources.get(name, [])}
        return super().stored_dtype(name) if kinds <= DENSE_TYPES.keys() else "F32"


def open_gguf(path: Path) -> GgufSource:
    """The GGUF file at `path`; CheckpointError where it is none that can be read."""
    return GgufSource(path)


def _layer(kind: str, rows: Rows) -> Layer | None:
    """The layer of rows [rows, bytes] u8; None for a type that no encoding holds."""
    if kind in FORMS:
        return layer_of(unpack(kind, rows))
    if kind in K_FORMS:
        return layer_of(unpack_k(kind, rows))
    if kind in LEVELS:
        blocks = unpack_levels(kind, rows)
        return None if blocks is None else layer_of(blocks)
    return _ternary(kind, rows) if kind in TERNARY else None


def _ternary(kind: str, rows: Rows) -> Layer | None:
    """-1, 0 and 1 times a scale for 256 weights: 2 bits of steps around a zero of 2. None for blocks with a 2."""
    from gguf import GGMLQuantizationType, dequantize

    values = dequantize(rows, GGMLQuantizationType[kind])
    n_blocks = values.shape[1] // 256
    raw = np.ascontiguousarray(rows.reshape(len(rows), n_blocks, -1)[..., -2:])
    scales = raw.view("<f2")[..., 0].astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError("a scale is NaN or infinite")
    signs = np.sign(values) * np.repeat(np.sign(scales.astype(np.float32)), 256, axis=1)
    layer = QuantizedLinear(codes=(signs + 2).astype(np.uint8), scales=scales, zeros=None, bits=2, group_size=256)
    return layer if np.array_equal(layer.dequantize(), values) else None
