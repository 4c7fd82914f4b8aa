"""A GGUF file as a checkpoint: tensors are dequantized one at a time, straight from the mapped file.

The names, the rotary permutations and the config come from transformers' own GGUF tables, so every
architecture that transformers reads is read here.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from formats.errors import error_context
from formats.skeleton import config_from_dict, set_tensor
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointError


class GgufCheckpoint(Checkpoint):
    format = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError(f"{path}: reading GGUF needs the extra: pip install 'qtool[gguf]'") from error
        self.path = path
        self.name = str(path)
        try:
            self._reader = GGUFReader(path)
            parsed = load_gguf_checkpoint(str(path), return_tensors=False)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or not a GGUF file that can be read ({error}); download it again"
            ) from error
        self._parsed = parsed
        with error_context(self.name):
            self.config = config_from_dict(parsed["config"])
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = bytes(self._reader.fields["general.architecture"].parts[-1]).decode()
        processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor: TensorProcessor = processor(config=parsed["config"])
        self._sources: dict[str, list[str]] = {}

    def bind(self, model: PreTrainedModel) -> None:
        sources = defaultdict(list)
        for stored, target in get_gguf_hf_weights_map(model, self._processor).items():
            if stored in self._stored:
                sources[target].append(stored)
        self._sources = dict(sources)

    def unused(self) -> list[str]:
        read = {stored for sources in self._sources.values() for stored in sources}
        return sorted(self._stored.keys() - read - {"rope_freqs.weight"})  # a table that transformers derives itself

    def _read(self, model: PreTrainedModel, names: set[str]) -> None:
        for name in names:
            for stored in self._sources.get(name, []):
                set_tensor(model, name, torch.from_numpy(self._dequantize(stored)))
        cast(Any, self._reader.data)._mmap.madvise(mmap.MADV_DONTNEED)  # or every page ever read would stay resident

    def _dequantize(self, stored: str) -> np.ndarray[Any, Any]:
        from gguf import dequantize

        tensor = self._stored[stored]
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = self._processor.process(
            weights=weights, name=stored, tensor_key_mapping={}, parsed_parameters=self._parsed
        )
        return np.array(result.weights, dtype=np.float32, order="C")

    def stored_dtype(self, name: str) -> str:
        types = {self._stored[stored].tensor_type.name for stored in self._sources.get(name, [])}
        if not types:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the file")
        return types.pop() if types <= {"F32", "BF16"} else "F16"  # the block types scale by an fp16 themselves

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(f"{self.path}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error

    def source_paths(self) -> list[Path]:
        return [self.path]
