"""STAGE 1, load: a source model as a config, a tokenizer and tensors that are read a block at a time.

Three sources share one interface: a Hugging Face folder (or hub id), a GGUF file, and one of our own
`.qtm` files, whose tensors come back decoded. None of them ever holds the whole model in memory.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Container, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from formats.encoding import DENSE_DTYPES
from formats.errors import error_context
from formats.experts import expert_with, fused_tensor
from formats.skeleton import config_from_dict, parameter_names, set_tensor, split_name
from qtool.errors import CheckpointError
from qtool.stored_experts import fused_names, key_of_expert, read_experts, split_parts

DERIVED = (r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")
MODEL_SUFFIXES = (".gguf", ".qtm", ".safetensors", ".bin", ".pt", ".pth", ".json", ".txt")
ROWS_COMPARED = 4096


class Checkpoint(ABC):
    """A source model. `bind` it to a skeleton once, then `load` parameters by name as often as needed."""

    name: str
    hub_id: str | None = None  # of a model of the hub that was asked for by it
    format: str
    config: Any
    own_names: Container[str] = ()
    """Of its tensors, where they are called as the model calls them."""

    @abstractmethod
    def bind(self, model: PreTrainedModel) -> None:
        """Learn which stored tensors make which parameter of `model`."""

    @abstractmethod
    def _read(self, model: PreTrainedModel, names: set[str]) -> None:
        """Assign the parameters `names` of `model` in float32; what is not stored stays on meta."""

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """F16, BF16 or F32: what the parameter `name` is stored as, or the nearest of these that holds it."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    @abstractmethod
    def source_paths(self) -> list[Path]:
        """Every file that weights are read from."""

    def unused(self) -> list[str]:
        """Stored tensors that make no parameter of the model, known after `bind`."""
        return []

    def untied(self, model: PreTrainedModel) -> list[str]:
        """Tensors that `model` ties to others, and that are stored apart and differ; known after `bind`."""
        return []

    def generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_model_config(self.config)

    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Assign the parameters `names` of `model` in float32, checked to be present and finite."""
        expected = {name: find_tensor(model, name).shape for name in names}
        self._read(model, set(expected))
        for name, shape in sorted(expected.items()):
            tensor = find_tensor(model, name).requires_grad_(False)  # transformers makes it one that is to be trained
            if tensor.shape != shape:
                raise CheckpointError(_wrong_shape(self.name, name, tensor.shape, shape))
            if tensor.is_meta and name in (model._keys_to_ignore_on_save or ()):
                kind = model.config.model_type
                raise CheckpointError(f"{self.name}: models of type {kind!r} are not supported: they compute {name}")
            if tensor.is_meta:
                raise CheckpointError(
                    f"{self.name}: tensor {name} is missing from the weights; download the model again"
                )
            if not all(map(torch.isfinite, tensor.aminmax())):  # no temporary as large as the tensor
                raise CheckpointError(f"{self.name}: weight {name} has NaN or infinite values; the model is broken")


def _wrong_shape(checkpoint: str, name: str, stored: Iterable[int], expected: Iterable[int]) -> str:
    return (
        f"{checkpoint}: tensor {name} has shape {list(stored)}, the model's config implies {list(expected)}; "
        "the two are not of one model"
    )


def find_tensor(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    owner, leaf = split_name(name)
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of every parameter that has several, the one it is stored under first."""
    return [names for names in parameter_names(model).values() if len(names) > 1]


def open_checkpoint(model: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint behind a path or a hub id; with `trust_remote_code` its tokenizer may run code of its own."""
    path = Path(model).expanduser()
    if path.is_dir():
        return HuggingFaceCheckpoint(path, trust_remote_code=trust_remote_code)
    if path.suffix == ".qtm" and path.is_file():
        from qtool.checkpoint_qtm import QtmCheckpoint

        return QtmCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        from qtool.checkpoint_gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.is_file():
        raise CheckpointError(f"{model}: neither a model folder nor a .gguf or .qtm file")
    if path.suffix in MODEL_SUFFIXES or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such file or folder; a model of the hub is named org/name")
    from qtool.hub import download

    checkpoint = HuggingFaceCheckpoint(download(model), name=model, trust_remote_code=trust_remote_code)
    checkpoint.hub_id = model
    return checkpoint


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with config.json, a tokenizer and one safetensors file or shards with an index."""

    format = "safetensors"

    def __init__(self, folder: Path, name: str | None = None, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.name = name or str(folder)
        with error_context(self.name):
            self.config = config_from_dict(self._config_values())
        self._shard_of = self._index()
        self._sources: dict[str, list[str]] = {}
        self._conversions: list[Any] = []
        self._converter_of: dict[str, tuple[WeightConverter, str]] = {}  # by stored name, with the pattern it matches
        self._unused: list[str] = []
        self._stored_as: dict[str, str] = {}  # a tied parameter -> the name under which alone it is stored

    def stored_dtype(self, name: str) -> str:
        part = fused_tensor(self._model, name)
        if part is not None:
            key = key_of_expert(self._sources.get(part.name, []), part)
        else:
            key = next(iter(self._sources.get(self._stored_as.get(name, name), [])), None)
        if key is None:
            raise CheckpointError(f"{self.name}: tensor {name} is missing from the weights; download the model again")
        with self._open(self._shard_of[key]) as shard:
            dtype = str(self._slice(shard, key).get_dtype())
        return dtype if dtype in DENSE_DTYPES else "F32"

    def _config_values(self) -> dict[str, Any]:
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.name}: not a model folder (no config.json in it); give the one that has it")
        values = self._json_object("config.json")
        if (quantization := values.pop("quantization_config", None)) is not None:
            self._take_quantization(quantization)
        return values

    def _json_object(self, file: str) -> dict[str, Any]:
        """The members of a JSON file of the folder."""
        path = self.folder / file
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a JSON object but a {type(values).__name__}; download it again")
        return values

    def _take_quantization(self, quantization: Any) -> None:
        """What config.json says of weights that are quantized; CheckpointError where they cannot be read."""
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise CheckpointError(f"{self.name}: already quantized ({method}); give the original model, or qtool import it")

    def _index(self) -> dict[str, str]:
        """Stored tensor name -> shard file name."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                shard_of = {
                    str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
                }
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download it again") from error
            for shard in sorted(set(shard_of.values())):
                if Path(shard).name != shard or not (self.folder / shard).is_file():
                    raise CheckpointError(f"{self.name}: shard {shard} named in {index.name} is missing; download it")
            return shard_of
        if not (self.folder / "model.safetensors").is_file():
            hint = (
                "; its *.bin files are pickles, convert them to safetensors" if any(self.folder.glob("*.bin")) else ""
            )
            raise CheckpointError(f"{self.name}: no model.safetensors and no index of shards in it{hint}")
        with self._open("model.safetensors") as shard_file:
            return dict.fromkeys(shard_file.keys(), "model.safetensors")

    def _open(self, shard: str) -> Any:
        try:
            return safe_open(self.folder / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / shard}: truncated or not a safetensors file ({error}); download it again"
            ) from error

    def _slice(self, shard: Any, key: str) -> Any:
        """What is stored as `key`: its shape, its dtype, and a tensor once it is indexed."""
        return shard.get_slice(key)

    def bind(self, model: PreTrainedModel) -> None:
        self._model = model
        self._conversions = get_model_conversion_mapping(model)
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        parameters, prefix = fused_names(model), model.base_model_prefix
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        sources = defaultdict(list)
        for key in self._shard_of:
            target, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if target not in parameters:  # some renamings are for older files than this one
                target, pattern = rename_source_key(key, [], [], prefix, parameters)
            sources[target].append(key)
            if pattern is not None:
                self._converter_of[key] = by_pattern[pattern], pattern
        self._sources = dict(sources)
        # What older versions stored and nobody reads (rotary tables, causal masks) is no loss.
        known = [*(model._keys_to_ignore_on_load_unexpected or ()), *DERIVED]
        unread = [key for target, keys in sources.items() if target not in parameters for key in keys]
        self._unused = sorted(key for key in unread if not any(re.search(pattern, key) for pattern in known))
        self._stored_as = {}
        for first, *others in tied_names(model):
            stored = [name for name in others if name in self._sources]
            if first not in self._sources and stored:
                self._stored_as[first] = stored[0]

    def unused(self) -> list[str]:
        return self._unused

    def untied(self, model: PreTrainedModel) -> list[str]:
        groups = [[n for n in names if n in self._sources] for names in tied_names(model)]
        pairs = [(names[0], other) for names in groups for other in names[1:]]
        return [b for a, b in pairs if self._differ(self._sources[a][0], self._sources[b][0])]

    def _differ(self, a: str, b: str) -> bool:
        with self._open(self._shard_of[a]) as one, self._open(self._shard_of[b]) as other:
            x, y = self._slice(one, a), self._slice(other, b)
            if x.get_shape() != y.get_shape():
                return True
            starts = range(0, x.get_shape()[0], ROWS_COMPARED)
            return any(not torch.equal(x[i : i + ROWS_COMPARED], y[i : i + ROWS_COMPARED]) for i in starts)

    def _read(self, model: PreTrainedModel, names: set[str]) -> None:
        experts, names = split_parts(model, names)
        plain = self._stored_as_they_are(model, names)
        sources = (self._sources.get(self._stored_as.get(name, name), []) for name in names - plain.keys())
        keys = [key for of_one in sources for key in of_one]
        of_experts = [*plain.values(), *(key for name in experts for key in self._sources.get(name, []))]
        # Shards are opened for one block and closed again, or every page ever read would stay resident.
        with ExitStack() as stack:
            needed = sorted({self._shard_of[key] for key in (*keys, *of_experts)})
            shards = {shard: stack.enter_context(self._open(shard)) for shard in needed}

            def slices(keys: Iterable[str]) -> dict[str, Any]:
                return {key: self._slice(shards[self._shard_of[key]], key) for key in keys}

            try:
                if keys:  # transformers goes through the whole model for them; of experts there are many such calls
                    self._convert(model, slices(keys))
                for name, key in plain.items():
                    set_tensor(model, name, slices([key])[key][...].float())
                for fused, wanted in experts.items():
                    stored = slices(self._sources.get(fused, []))
                    read_experts(model, fused, wanted, stored, self._converter_of.get)
            except (SafetensorError, OSError, RuntimeError, IndexError) as error:
                if "allocate memory" in str(error):
                    raise
                raise CheckpointError(f"{self.name}: cannot read the weights: {error}") from error
        for name in names & self._stored_as.keys():
            set_tensor(model, name, find_tensor(model, self._stored_as[name]))

    def _stored_as_they_are(self, model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
        """Tensors of experts that transformers lists, with the keys they have in the folder."""
        sources = {name: self._sources.get(name, []) for name in names if expert_with(model, name) is not None}
        return {name: keys[0] for name, keys in sources.items() if len(keys) == 1 and keys[0] not in self._converter_of}

    def _convert(self, model: PreTrainedModel, tensors: dict[str, Any]) -> None:
        """Assign what stored tensors make, as transformers does it."""
        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._conversions)
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config, disk_offload_index=None)
        for name, reason in sorted((info.conversion_errors or {}).items()):
            raise CheckpointError(f"{self.name}: tensor {name} cannot be converted: {' '.join(str(reason).split())}")
        for name, stored, expected in sorted(info.mismatched_keys):
            raise CheckpointError(_wrong_shape(self.name, name, stored, expected))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer_folder(self.folder, self.name, self.trust_remote_code)

    def generation_config(self) -> GenerationConfig:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return super().generation_config()

    def source_paths(self) -> list[Path]:
        return [self.folder / shard for shard in sorted(set(self._shard_of.values()))]


def load_tokenizer_folder(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `folder`; code of its own is run only for a user who said so."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")
    if not any((folder / file).is_file() for file in known):
        raise CheckpointError(
            f"{name}: no tokenizer in it (tokenizer.json, tokenizer.model or vocab.json); copy the model's own there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        if "custom code" in reason:
            reason = "it is code of its own; read that, and if you trust it, run it by compress --trust-remote-code"
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {reason}") from error
