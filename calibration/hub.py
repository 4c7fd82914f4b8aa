"""Datasets by name, through `datasets`: the three that papers use, or any `org/name`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from calibration.errors import CalibrationError
from calibration.text_files import TEXT_SUFFIXES, first_line, missing_field, text_of

_ROWS_PER_BATCH = 1000
_ADVICE = "give a local .txt, .jsonl or .parquet file, or builtin"
_ORG_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """Where a dataset keeps its text. `files`: one file for each split, where the whole would be too much."""

    path: str
    config: str | None = None
    files: dict[str, str] | None = None
    text_field: str = "text"


KNOWN_DATASETS = {
    "wikitext2": HubDataset(path="Salesforce/wikitext", config="wikitext-2-raw-v1"),
    # One shard of 1024, as in GPTQ: 356,317 pages. C4 has no test split; validation is its held-out text.
    "c4": HubDataset(
        path="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # The repository itself is a loading script, which `datasets` 4 and later refuse; the hub's own conversion
    # to parquet has the same rows.
    "ptb": HubDataset(
        path="parquet",
        files={"train": f"{_PTB}/train/0000.parquet", "test": f"{_PTB}/test/0000.parquet"},
        text_field="sentence",
    ),
}


def looks_like_hub_name(source: str) -> bool:
    """True for a known name and for `org/name`, unless the name ends like a text file."""
    if source in KNOWN_DATASETS:
        return True
    return bool(_ORG_NAME.fullmatch(source)) and not source.lower().endswith(TEXT_SUFFIXES)


def hub_documents(source: str, split: str, text_field: str) -> Iterator[str]:
    """The rows of one split, empty ones too: WikiText's blank lines are rows, and joining needs them."""
    known = KNOWN_DATASETS.get(source)
    wanted = known or HubDataset(path=source, text_field=text_field)
    rows = _load(source, wanted, split)
    if wanted.text_field not in rows.column_names:
        raise missing_field(source, wanted.text_field, rows.column_names)
    where = f"{source}, split {split}"
    for batch in rows.select_columns([wanted.text_field]).iter(batch_size=_ROWS_PER_BATCH):
        for value in batch[wanted.text_field]:
            yield text_of(value, where, wanted.text_field)


def _load(source: str, wanted: HubDataset, split: str) -> Any:
    import datasets

    # With one file of many, the row counts that the dataset card promises cannot hold: no_checks.
    selection: dict[str, Any] = {}
    if wanted.files is not None:
        selection = {"data_files": {split: wanted.files[split]}, "verification_mode": "no_checks"}
    try:
        return datasets.load_dataset(wanted.path, wanted.config, split=split, **selection)
    except Exception as error:  # `datasets` lets errors of five libraries through; every one ends here, none is lost
        raise CalibrationError(f"{source}: {_reason(error)}; {_ADVICE}") from error


def _reason(error: Exception) -> str:
    """What failed, in the user's words, with the first line of the library's own."""
    detail = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, FileNotFoundError):
        return f"no local file and no dataset on the hub has this name ({detail})"
    if isinstance(error, OSError) or "Timeout" in type(error).__name__ or "Connect" in type(error).__name__:
        return f"the Hugging Face hub could not be reached ({detail})"
    return f"the dataset on the hub could not be read ({detail})"
