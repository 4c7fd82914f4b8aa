"""One of our own files as a checkpoint: tensors come back decoded, so that it is measured as models are."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from formats.encoding import Dense
from formats.errors import error_context
from formats.loader import GENERATION_CONFIG, decode_tensor, load_tokenizer
from formats.reader import QtmFile
from formats.skeleton import config_from_dict, set_tensor
from qtool.checkpoint import Checkpoint


class QtmCheckpoint(Checkpoint):
    format = "qtm"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.file = QtmFile.open(path)
        with error_context(self.name):
            self.config = config_from_dict(dict(self.file.header.model["config"]))

    def bind(self, model: PreTrainedModel) -> None:
        """Nothing to learn: tensors are stored under the model's own names."""

    def _read(self, model: PreTrainedModel, names: set[str]) -> None:
        for name in names & self.file.tensors.keys():
            set_tensor(model, name, decode_tensor(self.file, self.file.tensors[name]))
        self.file.drop_pages()

    def stored_dtype(self, name: str) -> str:
        encoding = self.file.tensors[name].encoding
        return encoding.dtype if isinstance(encoding, Dense) else "F16"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    def generation_config(self) -> GenerationConfig:
        if GENERATION_CONFIG not in self.file.files:
            return super().generation_config()
        return GenerationConfig.from_dict(json.loads(self.file.read_file(GENERATION_CONFIG)))

    def source_paths(self) -> list[Path]:
        return [self.path]
