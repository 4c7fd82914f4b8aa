"""Local text: a .txt, .jsonl or .parquet file, or a folder of them -> documents, read lazily."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from calibration.errors import CalibrationError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SUPPORTED = ", ".join(TEXT_SUFFIXES)


def local_documents(path: Path, text_field: str, max_characters: int | None) -> Iterator[str]:
    """Documents in the order of the sorted paths. Of a .txt file, which is one document, at most
    `max_characters` + 1 are read: enough to see that it is longer."""
    for file in _files_of(path):
        try:
            yield from _documents_of(file, text_field, max_characters)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise CalibrationError(f"{file}: not UTF-8 (byte 0x{byte:02x}); convert it to UTF-8") from error
        except OSError as error:
            raise CalibrationError(f"{file}: cannot be read ({error.strerror or first_line(error)})") from error


def text_of(value: object, where: str, text_field: str) -> str:
    """`value` if it is text. A null or a number is an error, not an empty document: wrong field."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise CalibrationError(f"{where}: field {text_field!r} is {kind}, not text; choose another with --text-field")
    return value


def missing_field(where: str, text_field: str, present: list[str]) -> CalibrationError:
    names = ", ".join(repr(name) for name in present) or "none"
    return CalibrationError(f"{where}: no field {text_field!r}; its fields are {names}: choose one with --text-field")


def first_line(error: Exception) -> str:
    """A library's message can be a page; ours is one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise CalibrationError(f"{path}: suffix {path.suffix!r} is not supported; give {_SUPPORTED}")
        return [path]
    files = [file for file in sorted(path.rglob("*")) if _is_text_file(file, path)]
    if not files:
        raise CalibrationError(f"{path}: the folder has no {_SUPPORTED} file in it")
    return files


def _is_text_file(file: Path, folder: Path) -> bool:
    """Hidden files are left out: editors' and desktops' copies carry the right suffix and the wrong bytes."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in TEXT_SUFFIXES and not hidden and file.is_file()


def _documents_of(file: Path, text_field: str, max_characters: int | None) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".txt":
        yield _read_txt(file, max_characters)
    elif suffix == ".jsonl":
        yield from _read_jsonl(file, text_field)
    else:
        yield from _read_parquet(file, text_field)


def _read_txt(file: Path, max_characters: int | None) -> str:
    # Line ends become \n and a byte order mark is dropped: a file that went through Windows gives the same tokens.
    with file.open(encoding="utf-8-sig") as handle:
        return handle.read(-1 if max_characters is None else max_characters + 1)


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _text_of_line(line.decode("utf-8-sig"), f"{file}, line {number}", text_field)


def _text_of_line(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON ({error}); one object per line is expected") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: is a JSON {type(row).__name__}, not an object with a field {text_field!r}")
    if text_field not in row:
        raise missing_field(where, text_field, list(row))
    return text_of(row[text_field], where, text_field)


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise missing_field(str(file), text_field, fields)
            batches = table.iter_batches(columns=[text_field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for row, value in enumerate(values, start=1):
                yield text_of(value, f"{file}, row {row}", text_field)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{file}: not a readable parquet file ({first_line(error)})") from error
