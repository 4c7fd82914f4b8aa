"""Text -> token windows: what `--calibration` and `--text` name is read, tokenized once and cut."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.builtin import Split, builtin_documents
from calibration.errors import CalibrationError
from calibration.hub import KNOWN_DATASETS, hub_documents, looks_like_hub_name
from calibration.text_files import TEXT_SUFFIXES, local_documents
from calibration.windows import (
    Ids,
    TokenWindows,
    draw_windows,
    evaluation_windows,
    merge_windows,
    repeat_warnings,
    sample_sha256,
)

__all__ = [
    "Encode",
    "SampleSelf",
    "Split",
    "Text",
    "TokenWindows",
    "calibration_windows",
    "draw_windows",
    "evaluation_windows",
    "read_text",
    "sample_sha256",
    "tokenize",
]

Encode = Callable[[str], list[int]]
SampleSelf = Callable[[int, int, int], Ids]  # (n_samples, seq_len, seed) -> ids [n_samples, seq_len]

BUILTIN_NOTE = "calibrated on builtin text; text like the model's own work gives a better file (--calibration FILE)"

RESERVED = frozenset({"self", *KNOWN_DATASETS})  # never paths; nor is anything that starts with builtin

# Tokenizing costs seconds, so a sample of a folder of books or of a C4 shard
# (800 MB) is drawn from its start. All of WikiText-2's 11 million characters fit.
MIN_CHARACTERS = 16_000_000
CHARACTERS_PER_TOKEN = 8  # about twice what English takes, so that the cut never makes windows repeat
CHARACTERS_AT_A_TIME = 2_000_000  # a tokenizer keeps up to 150 bytes for each until it returns


@dataclass(frozen=True, slots=True)
class Text:
    """documents: in the source's order, empty ones included.
    sha256: of `joined()` in UTF-8.
    name: for reports and the file, without folders.
    notes: sentences for the user.
    """

    documents: list[str]
    sha256: str
    name: str
    notes: tuple[str, ...] = ()

    def joined(self) -> str:
        return _join(self.documents)


def read_text(source: str, *, split: Split, text_field: str = "text", max_characters: int | None = None) -> Text:
    """One source: `builtin`, `builtin:train`, `builtin:test`, a path, `wikitext2`, `c4`, `ptb` or `org/name`.

    split: for `builtin` without its own, and for the hub; a local file has one text.
    max_characters: stop there and say so in `notes`; None reads all.
    """
    name, documents = _open(source, split, text_field, max_characters)
    taken, is_cut = _take(documents, max_characters)
    notes = (f"{name}: only the first {max_characters} characters were used",) if is_cut else ()
    joined = _join(taken)
    if not joined.strip():
        raise CalibrationError(f"{source}: there is no text in it; give one that has some")
    return Text(taken, _sha256(joined, source), name, notes)


def tokenize(text: Text, encode: Encode) -> Ids:
    """[n_tokens] int64: the joined text in one piece, so that a window can cross into the next document."""
    return np.asarray(encode(text.joined()), dtype=np.int64)


def calibration_windows(
    sources: str,
    encode: Encode,
    *,
    n_samples: int,
    seq_len: int,
    seed: int,
    text_field: str = "text",
    sample_self: SampleSelf | None = None,
) -> TokenWindows:
    """`n_samples` windows, as evenly from the comma-joined `sources` as they divide; the first get the rest.
    Every source has its own generator, so what is drawn from one does not depend on the text of another."""
    names = _split_sources(sources)
    _check_numbers(names, n_samples, seed)
    parts = []
    for index, name in enumerate(names):
        n_part = n_samples // len(names) + (index < n_samples % len(names))
        if name == "self":
            parts.append(_self_windows(sample_self, n_part, seq_len, seed))
        else:
            rng = np.random.default_rng([seed, index])
            parts.append(_text_windows(name, encode, n_part, seq_len, rng, text_field))
    return merge_windows(parts)


def _open(source: str, split: Split, text_field: str, max_characters: int | None) -> tuple[str, Iterable[str]]:
    """The name for reports, and the documents. Reserved names come before paths, so that what `c4` means does
    not depend on the working directory; `./c4` is always a path."""
    if source == "builtin" or source.startswith("builtin:"):
        builtin_split = _builtin_split(source, split)
        return f"builtin:{builtin_split}", builtin_documents(builtin_split)
    if source not in RESERVED and os.path.exists(source):
        name = os.path.basename(os.path.abspath(source))
        return name, local_documents(Path(source), text_field, max_characters)
    if looks_like_hub_name(source):
        return f"{source} ({split})", hub_documents(source, split, text_field)
    raise _unknown_source(source)


def _builtin_split(source: str, split: Split) -> Split:
    match source.partition(":")[2]:
        case "":
            return split
        case "train":
            return "train"
        case "test":
            return "test"
        case other:
            raise CalibrationError(f"{source}: builtin has no part {other!r}; give builtin:train or builtin:test")


def _unknown_source(source: str) -> CalibrationError:
    if source == "self":
        return CalibrationError("self: is sampled from a model and is not a text; it works in --calibration only")
    if Path(source).suffix or os.sep in source:
        return CalibrationError(f"{source}: this path does not exist; give {', '.join(TEXT_SUFFIXES)} or a folder")
    known = ", ".join(["builtin", *KNOWN_DATASETS])
    return CalibrationError(f"{source}: not a source; give {known}, a path or a hub dataset as org/name")


def _pieces(text: str, limit: int = CHARACTERS_AT_A_TIME) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut before white space, where no token is torn.

    Each piece gets the special tokens that the tokenizer starts a text with: one in millions.
    """
    start = 0
    while len(text) - start > limit:
        at = max(text.rfind(" ", start + 1, start + limit), text.rfind("\n", start + 1, start + limit))
        stop = at if at > 0 else start + limit
        yield text[start:stop]
        start = stop
    yield text[start:]


def _take(documents: Iterable[str], max_characters: int | None) -> tuple[list[str], bool]:
    """Documents up to `max_characters`, the last one cut there, and whether any text was left out."""
    taken: list[str] = []
    n_characters = 0
    for document in documents:
        if max_characters is not None and n_characters + len(document) > max_characters:
            return [*taken, document[: max_characters - n_characters]], True
        n_characters += len(document)
        taken.append(document)
    return taken, False


def _join(documents: list[str]) -> str:
    """A blank line between documents: for WikiText-2 this gives the text of the GPTQ paper's numbers."""
    return "\n\n".join(documents)


def _sha256(joined: str, source: str) -> str:
    try:
        return hashlib.sha256(joined.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which no tokenizer takes
        code = ord(joined[error.start])
        raise CalibrationError(
            f"{source}: the text holds U+{code:04X}, half a surrogate pair; remove or repair it"
        ) from error


def _split_sources(sources: str) -> list[str]:
    names = [name.strip() for name in sources.split(",")]
    if not all(names):
        raise CalibrationError(f"--calibration {sources!r}: a source is empty; separate names by single commas")
    if names.count("self") > 1:  # the same seed would give the same windows twice
        raise CalibrationError(f"--calibration {sources}: self is named twice; name it once")
    return names


def _check_numbers(names: list[str], n_samples: int, seed: int) -> None:
    if n_samples < len(names):
        raise CalibrationError(
            f"--samples {n_samples}: must be at least {len(names)}, one for each source of {','.join(names)}"
        )
    if seed < 0:
        raise CalibrationError(f"--seed {seed}: must be 0 or more")


def _text_windows(
    source: str, encode: Encode, n_samples: int, seq_len: int, rng: np.random.Generator, text_field: str
) -> TokenWindows:
    enough = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * n_samples * seq_len)
    text = read_text(source, split="train", text_field=text_field, max_characters=enough)
    tokens = np.concatenate([np.asarray(encode(piece), np.int64) for piece in _pieces(text.joined())])
    ids = draw_windows(tokens, n_samples, seq_len, rng, source=source)
    return TokenWindows(
        ids=ids,
        source=text.name,
        sha256=sample_sha256(ids),
        n_tokens_available=len(tokens),
        warnings=repeat_warnings(len(tokens), n_samples, seq_len, source),
        notes=(*text.notes, BUILTIN_NOTE) if text.name.startswith("builtin:") else text.notes,
    )


def _self_windows(sample_self: SampleSelf | None, n_samples: int, seq_len: int, seed: int) -> TokenWindows:
    if sample_self is None:
        raise CalibrationError("self: there is no model to sample from here; give a text")
    ids = np.asarray(sample_self(n_samples, seq_len, seed), dtype=np.int64)
    if ids.shape != (n_samples, seq_len):
        raise CalibrationError(f"self: sampled ids have shape {ids.shape}, expected {(n_samples, seq_len)}")
    return TokenWindows(ids=ids, source="self", sha256=sample_sha256(ids), n_tokens_available=ids.size)
