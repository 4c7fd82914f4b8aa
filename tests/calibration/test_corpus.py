"""Sources by name, and what a mix of them draws: the seed decides, every mistake gets its sentence."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibration import corpus
from calibration.builtin import builtin_documents
from calibration.corpus import BUILTIN_NOTE, calibration_windows, read_text, sample_sha256, tokenize
from calibration.errors import CalibrationError


def encode(text: str) -> list[int]:
    """One token for each character."""
    return [ord(character) for character in text]


def error_of(source: str) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_text(source, split="train")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_local_folder_goes_before_a_hub_name_but_not_before_a_reserved_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ["org/name", "builtin", "self"]:
        Path(folder).mkdir(parents=True)
        Path(folder, "a.txt").write_text("local")
    assert read_text("org/name", split="train").joined() == "local"
    assert read_text("./builtin", split="train").joined() == "local"
    assert read_text("builtin", split="train").documents == builtin_documents("train")
    assert error_of("self").startswith("self: is sampled from a model")


@pytest.mark.parametrize("source", ["nowhere.txt", "data/nowhere.txt", "/nowhere/at/all", "a b/c", "x.csv"])
def test_path_that_does_not_exist(source):
    assert error_of(source) == f"{source}: this path does not exist; give .txt, .jsonl, .parquet or a folder"


def test_unknown_name():
    assert error_of("wikitext") == (
        "wikitext: not a source; give builtin, wikitext2, c4, ptb, a path or a hub dataset as org/name"
    )


def test_self_is_not_a_text():
    assert error_of("self") == "self: is sampled from a model and is not a text; it works in --calibration only"


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("builtin", "train", "builtin:train"),
        ("builtin", "test", "builtin:test"),
        ("builtin:test", "train", "builtin:test"),
        ("builtin:train", "test", "builtin:train"),
    ],
)
def test_builtin_split(source, split, name):
    text = read_text(source, split=split)
    assert text.name == name
    assert text.documents == builtin_documents(name.removeprefix("builtin:"))


def test_builtin_with_another_part():
    assert error_of("builtin:dev") == "builtin:dev: builtin has no part 'dev'; give builtin:train or builtin:test"


def test_tokenize_takes_the_joined_text_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    text = read_text(str(path), split="train")
    seen = []
    tokens = tokenize(text, lambda joined: seen.append(joined) or encode(joined))
    assert seen == ["a\n\nb"]
    assert (tokens.dtype, tokens.tolist()) == (np.int64, [97, 10, 10, 98])


@pytest.fixture
def two_texts(tmp_path) -> tuple[str, str]:
    (tmp_path / "a.txt").write_text("a" * 30)
    (tmp_path / "b.txt").write_text("bc" * 30)
    return f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"


def windows(sources: str, n_samples: int = 5, seed: int = 0, **options: object) -> corpus.TokenWindows:
    return calibration_windows(sources, encode, n_samples=n_samples, seq_len=4, seed=seed, **options)


def test_mix_splits_evenly_and_the_first_get_the_rest(two_texts):
    sample = windows(f"{two_texts[0]}, {two_texts[1]}")
    assert ["".join(map(chr, row)) for row in sample.ids][:3] == ["aaaa"] * 3
    assert all(set(row) == {ord("b"), ord("c")} for row in sample.ids[3:].tolist())
    assert (sample.source, sample.n_tokens_available) == ("a.txt,b.txt", 90)
    assert (sample.sha256, sample.warnings, sample.notes) == (sample_sha256(sample.ids), (), ())


def test_the_seed_decides_and_nothing_else():
    first = windows("builtin", n_samples=9, seed=3)
    assert first.sha256 == windows("builtin:train", n_samples=9, seed=3).sha256
    assert first.sha256 != windows("builtin", n_samples=9, seed=4).sha256


def test_a_source_draws_the_same_whatever_stands_before_it(two_texts, tmp_path):
    (tmp_path / "long.txt").write_text("long" * 500)
    mixed = windows(f"{two_texts[0]},{two_texts[1]}", n_samples=8)
    other = windows(f"{tmp_path}/long.txt,{two_texts[1]}", n_samples=8)
    assert np.array_equal(mixed.ids[4:], other.ids[4:])


def test_builtin_is_noted(two_texts):
    assert windows("builtin").notes == (BUILTIN_NOTE,)
    assert windows(f"{two_texts[0]},builtin").notes == (BUILTIN_NOTE,)


def test_a_sample_of_more_than_twice_the_text_warns(two_texts):
    assert windows(two_texts[0], n_samples=15).warnings == ()
    (warning,) = windows(two_texts[0], n_samples=16).warnings
    assert "16 windows of 4 are 64 tokens, more than twice the 30 in the text" in warning


def test_long_texts_are_drawn_from_their_start(two_texts, monkeypatch):
    monkeypatch.setattr(corpus, "MIN_CHARACTERS", 10)
    monkeypatch.setattr(corpus, "CHARACTERS_PER_TOKEN", 1)
    sample = windows(two_texts[1], n_samples=3)
    assert sample.n_tokens_available == 12  # 3 windows of 4 want more than the 10
    assert sample.notes == ("b.txt: only the first 12 characters were used",)


def test_self_asks_the_model(two_texts):
    asked = []

    def sample_self(*numbers: int) -> np.ndarray:
        asked.append(numbers)
        return np.full(numbers[:2], 7)

    sample = windows(f"{two_texts[0]},self", n_samples=3, seed=9, sample_self=sample_self)
    assert asked == [(1, 4, 9)]
    assert sample.ids[2].tolist() == [7, 7, 7, 7]
    assert (sample.source, sample.n_tokens_available) == ("a.txt,self", 34)


def wrong_shape(*numbers: int) -> np.ndarray:
    return np.zeros((5, 3))


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ("a,,b", {}, "--calibration 'a,,b': a source is empty; separate names by single commas"),
        ("", {}, "--calibration '': a source is empty; separate names by single commas"),
        ("self,self", {}, "--calibration self,self: self is named twice; name it once"),
        ("a,b,c", {"n_samples": 2}, "--samples 2: must be at least 3, one for each source of a,b,c"),
        ("builtin", {"n_samples": 0}, "--samples 0: must be at least 1, one for each source of builtin"),
        ("builtin", {"seed": -1}, "--seed -1: must be 0 or more"),
        ("self", {}, "self: there is no model to sample from here; give a text"),
        ("self", {"sample_self": wrong_shape}, "self: sampled ids have shape (5, 3), expected (5, 4)"),
    ],
)
def test_mixes_that_cannot_be(sources, options, message):
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        windows(sources, **options)


def test_import_brings_neither_torch_nor_datasets():
    code = "import calibration.corpus, sys; print({'torch', 'datasets', 'pyarrow'} & {*sys.modules})"
    root = Path(corpus.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
