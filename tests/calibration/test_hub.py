"""The hub, with `datasets.load_dataset` replaced: what is asked of it, and what its failures become."""

from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from calibration.corpus import read_text
from calibration.errors import CalibrationError
from calibration.hub import looks_like_hub_name

ADVICE = "give a local .txt, .jsonl or .parquet file, or builtin"


class FakeHub:
    """Answers with one small table or one error, and remembers the call."""

    def __init__(self, answer: dict[str, list[Any]] | Exception) -> None:
        self.answer = answer

    def load_dataset(self, path: str, config: str | None, **options: Any) -> datasets.Dataset:
        self.call = (path, config, options)
        if isinstance(self.answer, Exception):
            raise self.answer
        return datasets.Dataset.from_dict(self.answer)


@pytest.fixture
def hub(monkeypatch):
    def install(answer: dict[str, list[Any]] | Exception) -> FakeHub:
        fake = FakeHub(answer)
        monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
        return fake

    return install


def test_wikitext2_rows_are_joined_by_blank_lines_empty_ones_too(hub):
    fake = hub({"text": ["", " = Title = \n", "", " Text . \n"]})
    text = read_text("wikitext2", split="test")
    assert text.joined() == "\n\n = Title = \n\n\n\n\n Text . \n"
    assert text.name == "wikitext2 (test)"
    assert fake.call == ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})


@pytest.mark.parametrize(
    ("split", "file"),
    [("train", "en/c4-train.00000-of-01024.json.gz"), ("test", "en/c4-validation.00000-of-00008.json.gz")],
)
def test_c4_is_one_shard(hub, split, file):
    fake = hub({"text": ["x"], "url": ["u"]})
    assert read_text("c4", split=split, text_field="other").documents == ["x"]
    options = {"split": split, "data_files": {split: file}, "verification_mode": "no_checks"}
    assert fake.call == ("allenai/c4", None, options)


def test_ptb_has_its_own_field_and_comes_as_parquet(hub):
    fake = hub({"sentence": ["no it was n't black monday"]})
    assert read_text("ptb", split="test").documents == ["no it was n't black monday"]
    path, config, options = fake.call
    assert (path, config) == ("parquet", None)
    assert options["data_files"]["test"].startswith("hf://datasets/ptb-text-only/ptb_text_only@")
    assert options["data_files"]["test"].endswith("/penn_treebank/test/0000.parquet")


def test_any_dataset_takes_the_field_asked_for(hub):
    fake = hub({"body": ["a", "b"]})
    assert read_text("org/name", split="train", text_field="body").joined() == "a\n\nb"
    assert fake.call == ("org/name", None, {"split": "train"})


def test_max_characters_stops_early(hub):
    hub({"text": ["abc"] * 5000})
    text = read_text("org/name", split="train", max_characters=7)
    assert text.documents == ["abc", "abc", "a"]
    assert text.notes == ("org/name (train): only the first 7 characters were used",)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"b": ["x"], "n": [1]}, "no field 'text'; its fields are 'b', 'n': choose one with --text-field"),
        ({"text": [1]}, "split train: field 'text' is int, not text; choose another with --text-field"),
        ({"text": [""]}, "there is no text in it; give one that has some"),
        (ConnectionError("Couldn't reach it\nmore"),
         "the Hugging Face hub could not be reached (ConnectionError: Couldn't reach it); " + ADVICE),
        (DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
         "no local file and no dataset on the hub has this name "
         "(DatasetNotFoundError: Dataset 'org/name' doesn't exist on the Hub); " + ADVICE),
        (ValueError('Unknown split "train".'),
         "the dataset on the hub could not be read (ValueError: Unknown split \"train\".); " + ADVICE),
        (RuntimeError(), "the dataset on the hub could not be read (RuntimeError: RuntimeError); " + ADVICE),
    ],
)  # fmt: skip
def test_failures_are_one_line_that_says_what_to_do(hub, answer, message):
    hub(answer)
    with pytest.raises(CalibrationError) as caught:
        read_text("org/name", split="train")
    assert str(caught.value).startswith("org/name")
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "is_name"),
    [
        ("c4", True), ("org/name", True), ("org/name.txt", False), ("org/a.JSONL", False),
        ("name", False), ("a/b/c", False), ("./a", False), ("../a", False), ("/name", False), ("org/", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_hub_name(source, is_name):
    assert looks_like_hub_name(source) is is_name
