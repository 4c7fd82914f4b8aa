"""What a `.qtm` file holds for transformers besides weights: config, tokenizer, how to generate (SPEC 3.4, 6.3).

All of it may be hostile. None of its own code is run, no file outside of it is read, and what transformers raises
about it comes out as FormatError.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from formats.errors import FormatError, error_context
from formats.reader import QtmFile
from formats.skeleton import config_from_dict, one_line, without_references
from formats.strict_json import as_object, brief

GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
# What a config makes transformers repeat: blocks, experts, and the names of classes that a language model has not.
_COUNT = re.compile(
    r"((num|n|encoder|decoder)_)+((hidden|encoder|decoder)_)?layers?|num_labels|(num|n)_((local|routed)_)?experts"
)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a `.qtm` file, chat template included."""
    with QtmFile.open(path) as file:
        return tokenizer_of(file)


def tokenizer_of(file: QtmFile) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, for a file that is open."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file_name in file.files:
            (folder / file_name).write_bytes(file.read_file(file_name))
        # A config.json tells transformers which tokenizer class the model goes with.
        configs = {name: read_json(file, name) for name in _TOKENIZER_CONFIGS if name in file.files}
        for file_name, config in (configs | {"config.json": config_dict(file)}).items():
            _check_tokenizer_class(f"{file.label}: {file_name}", config.get("tokenizer_class"))
            (folder / file_name).write_text(json.dumps(without_references(config)))
        with refused(f"{file.label}: its tokenizer cannot be loaded", "6.3"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return cast(PreTrainedTokenizerBase, tokenizer)


def model_config(file: QtmFile) -> Any:
    """The transformers config of the model in a file."""
    values = config_dict(file)
    with refused(f"{file.label}: header: model", "3.4.1"):
        return config_from_dict(values)


def generation_config(file: QtmFile) -> GenerationConfig:
    """How the model in a file generates unless it is told otherwise."""
    values = read_json(file, GENERATION_CONFIG)
    with refused(f"{file.label}: file {GENERATION_CONFIG!r}", "6.3"):
        return GenerationConfig.from_dict(values)


def config_dict(file: QtmFile) -> dict[str, Any]:
    """The model's `config.json`."""
    with error_context(f"{file.label}: header: model"):
        config = as_object("config", file.header.model.get("config"))
        for name, count in _counts(config):
            # Every block and expert has a tensor; without this, a few bytes could ask for 10**9 blocks.
            if count > len(file.tensors):
                raise FormatError(f"{name}={count}, but the file has {len(file.tensors)} tensors (SPEC 3.4.1)")
        return config


def read_json(file: QtmFile, name: str) -> dict[str, Any]:
    """The object in an embedded JSON file."""
    data = file.read_file(name)
    with error_context(f"{file.label}: file {name!r}"):
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not JSON: {one_line(error)} (SPEC 6.3)") from error
        return as_object("its content", values)


def _counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers in a config that say how often something is built."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and _COUNT.fullmatch(name):
            yield name, value


def _check_tokenizer_class(label: str, name: Any) -> None:
    """transformers takes any class of its own by this name, one that runs embedded code among them."""
    if not isinstance(name, str | None):
        raise FormatError(f"{label}: tokenizer_class is {brief(name)}: must be a string (SPEC 6.3)")
    kind = getattr(transformers, re.sub("(Fast)+$", "", name or ""), None)
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)):
        raise FormatError(f"{label}: tokenizer_class {brief(name)} is no tokenizer (SPEC 6.3)")


@contextmanager
def refused(label: str, paragraph: str) -> Iterator[None]:
    """Whatever goes wrong inside as FormatError: transformers raises what its own code happens to stumble on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise FormatError(f"{label}: {one_line(error)} (SPEC {paragraph})") from error
