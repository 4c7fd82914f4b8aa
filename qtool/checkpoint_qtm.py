"""One of our own files as a checkpoint: tensors come back decoded, so that it is measured as models are."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from formats.embedded import GENERATION_CONFIG, generation_config, model_config, tokenizer_of
from formats.encoding import Dense
from formats.reader import QtmFile
from formats.skeleton import second_names, set_tensor
from formats.tensors import decode_tensor
from qtool.checkpoint import Checkpoint


class QtmCheckpoint(Checkpoint):
    format = "qtm"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.file = QtmFile.open(path)
        self.config = model_config(self.file)
        self.own_names = self.file.tensors

    def bind(self, model: PreTrainedModel) -> None:
        """Nothing to learn: tensors are stored under the model's own names."""

    def untied(self, model: PreTrainedModel) -> list[str]:
        return [name for name in second_names(model) if name in self.file.tensors]

    def _read(self, model: PreTrainedModel, names: set[str]) -> None:
        for name in names & self.file.tensors.keys():
            set_tensor(model, name, decode_tensor(self.file, self.file.tensors[name]))
        self.file.drop_pages()

    def stored_dtype(self, name: str) -> str:
        encoding = self.file.tensors[name].encoding
        return encoding.dtype if isinstance(encoding, Dense) else "F16"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.file)

    def generation_config(self) -> GenerationConfig:
        if GENERATION_CONFIG not in self.file.files:
            return super().generation_config()
        return generation_config(self.file)

    def source_paths(self) -> list[Path]:
        return [self.path]
