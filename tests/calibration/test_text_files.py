"""Local text: what a file or a folder gives, and the sentence each broken one gets."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.corpus import read_text
from calibration.errors import CalibrationError


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def write_parquet(path: Path, **columns: list[object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def error_of(source: str) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_text(source, split="train")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_txt_is_one_document_verbatim(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n\ntwo \xc3\xa9\n")
    text = read_text(str(path), split="train")
    assert text.documents == ["one\n\n\ntwo é\n"]
    assert text.name == "a.txt"
    assert text.sha256 == hashlib.sha256("one\n\n\ntwo é\n".encode()).hexdigest()


def test_jsonl_takes_the_field_and_skips_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "1"}\n\n{"text": "", "body": "2"}\n{"text": "two", "body": "3"}\n')
    assert read_text(str(path), split="train").documents == ["one", "", "two"]
    assert read_text(str(path), split="train", text_field="body").joined() == "1\n\n2\n\n3"


@pytest.mark.parametrize("string_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_takes_the_field(tmp_path, string_type):
    column = pa.array(["one", "two", "one"]).cast(string_type)
    path = write_parquet(tmp_path / "a.parquet", body=column, other=[1, 2, 3])
    assert read_text(path, split="test", text_field="body").documents == ["one", "two", "one"]


def test_folder_is_read_in_sorted_order_without_other_and_hidden_files(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.JSONL", {"text": "second"})
    write_parquet(folder / "sub" / "c.parquet", text=["third"])
    (folder / "a.txt").write_text("first")
    for ignored in [".a.txt", "README.md", "sub/.b.txt"]:
        (folder / ignored).write_bytes(b"\xff")
    text = read_text(f"{folder}/", split="train")
    assert text.documents == ["first", "second", "third"]
    assert text.name == "mine"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_max_characters_cuts_and_says_so(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text("abcdefg")
    else:
        write_jsonl(path, {"text": "abc"}, {"text": "defg"})
    cut = read_text(str(path), split="train", max_characters=5)
    assert "".join(cut.documents) == "abcde"
    assert cut.notes == (f"a{suffix}: only the first 5 characters were used",)
    assert read_text(str(path), split="train", max_characters=7).notes == ()


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    assert error_of(f"{tmp_path}/a.csv").endswith("a.csv: suffix '.csv' is not supported; give .txt, .jsonl, .parquet")


def test_folder_without_usable_file(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    assert error_of(str(tmp_path)) == f"{tmp_path}: the folder has no .txt, .jsonl, .parquet file in it"


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert error_of(f"{tmp_path}/a.txt").endswith("a.txt: there is no text in it; give one that has some")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
    assert error_of(f"{tmp_path}/{name}").endswith(f"{name}: not UTF-8 (byte 0xe9); convert it to UTF-8")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(f"{tmp_path}/a.txt").endswith("a.txt: cannot be read (Permission denied)")


def test_invalid_json_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": \n')
    assert f"{path}, line 3: not valid JSON (Expecting value" in error_of(str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["x"], "line 1: is a JSON list, not an object with a field 'text'"),
        ({"b": 1, "c": 2}, "line 1: no field 'text'; its fields are 'b', 'c': choose one with --text-field"),
        ({}, "line 1: no field 'text'; its fields are none: choose one with --text-field"),
        ({"text": None}, "line 1: field 'text' is null, not text; choose another with --text-field"),
        ({"text": 5}, "line 1: field 'text' is int, not text; choose another with --text-field"),
    ],
)
def test_jsonl_row_without_text(tmp_path, row, message):
    assert error_of(write_jsonl(tmp_path / "a.jsonl", row)).endswith(message)


def test_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x\\ud83d"}')
    assert error_of(str(path)).endswith("the text holds U+D83D, half a surrogate pair; remove or repair it")


def test_parquet_without_the_field(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    assert error_of(path).endswith("no field 'text'; its fields are 'body', 'n': choose one with --text-field")


def test_parquet_with_a_field_that_is_not_text_names_the_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["x", None])
    assert "a.parquet, row 2: field 'text' is null, not text" in error_of(path)


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table here PAR1")
    assert "a.parquet: not a readable parquet file (" in error_of(f"{tmp_path}/a.parquet")
