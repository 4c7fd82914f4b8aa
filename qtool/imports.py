"""A model that somebody else quantized as a `.qtm` file: its own codes, scales and zeros, so that no value changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from formats.encoding import Dense, Encoding, encoding_of
from formats.layer import Layer
from formats.section import pack
from formats.skeleton import is_transposed_linear, split_name
from formats.writer import Writer
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.errors import CheckpointError
from qtool.model import BlockwiseModel
from qtool.pack import DTYPES
from qtool.provenance import embedded_files, model_member, source_files, versions
from qtool.publish import check_target
from qtool.results import Imported
from qtool.seq2seq import blockwise_model


class QuantizedSource(Protocol):
    """A quantized model. `checkpoint` reads all of it decoded."""

    decoded: dict[str, str]
    """Why a quantized tensor is decoded, by the name of each that `layer` was asked for and could not give."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    def layer(self, name: str) -> Layer | None:
        """The layer [out, in] of the parameter `name` of the model's skeleton; None where it is dense.

        The checkpoint has been bound to the skeleton.
        """


def open_quantized(source: str, *, assume_v1_zeros: bool = False) -> QuantizedSource:
    """What is behind a path: a folder by its `quant_method`, or a .gguf file."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from qtool.import_gguf import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{source}: no such folder or .gguf file; import reads no other")
    from qtool.checkpoint_engine import EngineSource

    return EngineSource(path, assume_v1_zeros=assume_v1_zeros)


def import_model(source: str, output: Path, *, overwrite: bool = False, assume_v1_zeros: bool = False) -> Imported:
    """Write `output` and return what it holds; nothing appears under that name unless all of it could be read."""
    check_target(output, "--output", overwrite=overwrite)
    opened = open_quantized(source, assume_v1_zeros=assume_v1_zeros)
    checkpoint = opened.checkpoint
    tokenizer = checkpoint.tokenizer()
    model = blockwise_model(checkpoint)
    if unused := checkpoint.unused():
        raise CheckpointError(f"{checkpoint.name}: tensor {unused[0]}: import does not know what it does")
    sources, files = source_files(checkpoint), embedded_files(checkpoint, tokenizer)
    n_packed = 0
    with Writer(output, overwrite) as writer:
        for names in _by_block(model):
            for name, found in _read(opened, model, names):
                n_packed += isinstance(found, Layer)
                _add(writer, model, name, found)
        if not n_packed:
            raise CheckpointError(f"{checkpoint.name}: none of its linears is quantized; qtool compress is for it")
        for name, data in files.items():
            writer.add_file(name, data)
        writer.finish(
            model=model_member(model),
            recipe={"imported": checkpoint.format},
            provenance={**versions(), "source_format": checkpoint.format, "source_files": sources},
            quality={},
        )
    return Imported(file=output, bytes=output.stat().st_size, packed=n_packed, decoded=opened.decoded)


def _by_block(model: BlockwiseModel) -> Iterator[list[str]]:
    """The names of tensors: what is in no block, then block by block."""
    yield model.outside_names()
    for index in range(len(model.blocks)):
        yield model.tensor_names(f"{model.block_name(index)}.")


def _read(source: QuantizedSource, model: BlockwiseModel, names: list[str]) -> Iterator[tuple[str, Layer | Tensor]]:
    """Each tensor as a layer or, where it is none, its values as they are stored, in the order of the names."""
    layers = {name: layer for name in names if (layer := source.layer(name)) is not None}
    with model.materialised([name for name in names if name not in layers]):
        for name in names:
            if name in layers:
                yield name, layers.pop(name)
            else:
                yield name, _stored(model, name)


def _stored(model: BlockwiseModel, name: str) -> Tensor:
    """The values in the type they are stored in, as long as that holds them: a decoded tensor can have more digits."""
    values = find_tensor(model.skeleton, name).detach()
    stored = values.to(DTYPES[model.checkpoint.stored_dtype(name)])
    return stored if torch.equal(stored.float(), values) else values


def _add(writer: Writer, model: BlockwiseModel, name: str, found: Layer | Tensor) -> None:
    if isinstance(found, Layer):
        transposed = is_transposed_linear(model.skeleton.get_submodule(split_name(name)[0]))
        writer.add_tensor(name, found.shape, encoding_of(found), pack(found), transposed=transposed)
        return
    encoding: Encoding = Dense({dtype: key for key, dtype in DTYPES.items()}[found.dtype])
    data = found.contiguous().reshape(-1).view(torch.uint8).numpy()
    writer.add_tensor(name, tuple(found.shape), encoding, data)
