"""What decides a run's result, and what its file says about where it came from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import qtool
from calibration.windows import TokenWindows
from formats.embedded import GENERATION_CONFIG
from formats.experts import expert_of
from formats.header import SECTION_ALIGNMENT, FileEntry, Header, TensorEntry, serialise_header
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointError
from qtool.model import BlockwiseModel
from qtool.plan import TensorPlan
from qtool.recipe import Recipe
from qtool.runlog import MAX_NAMED, told

PROBE = "Hello, world! 1234567890 \n\n\tdef f(x): return x**2  # naïve café, Привет, 你好, 🙂"
LONGEST_FLOAT = -1.2345678901234567e-100
LEFT_OUT_OF_CONFIG = ("_name_or_path", "_model_name_or_path", "auto_map")  # paths, and code that is never run


def embedded_files(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name -> content: the tokenizer as transformers saves it, chat template included, and how to generate."""
    return {
        **tokenizer_files(tokenizer),
        GENERATION_CONFIG: checkpoint.generation_config().to_json_string().encode(),
    }


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name -> content of the tokenizer alone, without code of its own (SPEC 1.3)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no other class for a full disk
            raise CheckpointError(f"the tokenizer cannot be saved in {folder}: {error}; make room there") from error
        if type(tokenizer).__module__.startswith("transformers_modules"):
            _remove_code(folder, tokenizer)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _remove_code(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave what a class of transformers' own can read, if that gives the same tokens."""
    for path in folder.glob("*.py"):
        path.unlink()
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({key: v for key, v in values.items() if key != "auto_map"}), encoding="utf-8")
    with suppress(Exception):  # whatever its files are, without its code they may be nothing
        plain = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if plain(PROBE).input_ids == tokenizer(PROBE).input_ids:
            return
    raise CheckpointError(
        f"{tokenizer.name_or_path}: its tokenizer works by its own code alone, which a file never holds; "
        "give the model a tokenizer.json that needs none"
    )


def source_files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of every file that weights are read from; reads them all."""
    files = []
    for path in checkpoint.source_paths():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return files


def run_identity(
    model: BlockwiseModel, recipe: Recipe, sources: list[dict[str, Any]], files: Mapping[str, bytes], **settings: Any
) -> dict[str, Any]:
    """Everything but the calibration text that decides the bytes of the result, as JSON holds it."""
    identity = {
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "weights": {source["name"]: source["sha256"] for source in sources},
        "config": _sha256(json.dumps(_config(model), sort_keys=True).encode()),
        "files": {name: _sha256(data) for name, data in files.items()},
        **settings,
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]


def header_members(
    model: BlockwiseModel,
    recipe: Recipe,
    windows: TokenWindows | None,
    sources: list[dict[str, Any]],
    quality: Mapping[str, Any],
) -> dict[str, Mapping[str, Any]]:
    """The free objects of the file's header. No time stamps and no paths: the same run gives the same bytes."""
    values = recipe.to_dict()
    if windows is None:
        values["calibration"] = None
    else:  # as it was drawn: windows end at the model's context
        samples, seq_len = windows.ids.shape
        values["calibration"] |= {"source": windows.source, "samples": samples, "seq_len": seq_len}
    return {
        "model": model_member(model),
        "recipe": values,
        "provenance": {
            **versions(),
            **({} if model.checkpoint.hub_id is None else {"base_model": model.checkpoint.hub_id}),
            "source_format": model.checkpoint.format,
            "source_files": sources,
            "calibration_sha256": windows.sha256 if windows else None,
        },
        "quality": quality,
    }


def header_bytes(
    model: BlockwiseModel,
    plan: Iterable[TensorPlan],
    recipe: Recipe,
    windows: TokenWindows | None,
    sources: list[dict[str, Any]],
    files: Iterable[str],
) -> int:
    """A bound for the preamble, the header and the padding around embedded files, before anything is written."""
    plan, sha256, far = list(plan), "0" * 64, 10**14
    tensors = tuple(
        TensorEntry(t.name, t.shape, t.encoding, far, far, sha256, LONGEST_FLOAT, t.transposed) for t in plan
    )
    entries = tuple(FileEntry(name, far, far, sha256) for name in files)
    members = header_members(model, recipe, windows, sources, _longest_quality(plan))
    header = serialise_header(Header(tensors=tensors, files=entries, **members))
    return len(header) + SECTION_ALIGNMENT * (len(entries) + 2)


def _longest_quality(plan: Iterable[TensorPlan]) -> dict[str, Any]:
    """What a run has to report in the worst case: layers that were damped harder and left out tokens, all of them, or
    the longest names of as many as are told one by one."""
    plan = list(plan)
    all_names = [tensor.name for tensor in plan if tensor.spec is not None and tensor.in_block]
    names = {*sorted(all_names, key=len)[-MAX_NAMED:], *told(dict.fromkeys(all_names, 0), sum)}
    mixtures = Counter(expert[0] for expert in {expert_of(tensor.name) for tensor in plan} if expert is not None)
    return {
        "mean_relative_error": LONGEST_FLOAT,
        "harder_damped": dict.fromkeys(names, LONGEST_FLOAT),
        "dropped_tokens": dict.fromkeys(names, 10**14),
        "uncalibrated": [],  # they are in neither of the others
        "rounded": [],  # as these are
        "experts": {name: {"tokens": [10**14] * n, "pooled": [*range(n)]} for name, n in mixtures.items()},
    }


def machine() -> dict[str, Any]:
    """What sums are rounded by besides the versions: another one gives a file as good, but not the same bytes."""
    return {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def versions() -> dict[str, str]:
    return {"qtool": qtool.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def model_member(model: BlockwiseModel) -> dict[str, Any]:
    """What a file says of its model."""
    return {
        "model_type": model.checkpoint.config.model_type,
        "architecture": type(model.skeleton).__name__,
        "blocks": model.lists.to_header(),
        "config": _config(model),
    }


def _config(model: BlockwiseModel) -> dict[str, Any]:
    config = json.loads(model.checkpoint.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in LEFT_OUT_OF_CONFIG}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
