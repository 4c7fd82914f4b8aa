"""The builtin corpus: large enough, the same each time, and split so that no text is on both sides."""

import ast
import sys
import textwrap
from pathlib import Path

import pytest

from calibration import builtin
from calibration.builtin import builtin_documents
from calibration.errors import CalibrationError


def n_characters(documents: list[str]) -> int:
    return sum(len(document) for document in documents)


def test_there_is_enough_text_at_four_characters_a_token():
    assert n_characters(builtin_documents("train")) > 4 * 300_000
    assert n_characters(builtin_documents("test")) > 4 * 50_000


def test_topics_come_first_and_in_order():
    first, second = builtin_documents("train")[:2]
    assert 'The "assert" statement' in first
    assert "Assignment statements" in second


def test_every_fifth_document_is_test(monkeypatch):
    monkeypatch.setattr(builtin, "_all_documents", lambda: tuple("abcdefghijk"))
    assert builtin_documents("train") == list("abcdfghik")
    assert builtin_documents("test") == ["e", "j"]


def test_every_document_is_in_one_part():
    documents = builtin._all_documents()
    assert sorted([*builtin_documents("train"), *builtin_documents("test")]) == sorted(documents)


def test_a_passage_stays_where_it_comes_first():
    groups = [["same", "a", "a"], ["b"], ["c", "same"], ["same"]]
    assert builtin._without_duplicates(groups) == [["same", "a"], ["b"], ["c"]]


def test_no_passage_of_the_real_corpus_is_in_it_twice():
    groups = builtin._without_duplicates([*builtin._topics(), *builtin._module_docstrings()])
    passages = [passage for group in groups for passage in group]
    assert len(set(passages)) == len(passages) > 5000
    assert tuple("\n\n".join(group) for group in groups) == builtin._all_documents()


def test_docstrings_come_in_source_order_and_cleaned():
    source = '''
        """Module
            indented."""
        class A:
            """Class."""
            def f(self):
                """Method."""
                def g(): "Inner."
        try:
            def h(): r"""Raw \\d."""
        except ImportError:
            async def h(): """Other."""
        not_a_docstring = """no"""
        '''
    tree = ast.parse(textwrap.dedent(source).strip())
    assert list(builtin._docstrings(tree)) == [
        "Module\nindented.", "Class.", "Method.", "Inner.", r"Raw \d.", "Other.",
    ]  # fmt: skip


def test_modules_are_found_recursively_in_sorted_order(tmp_path: Path):
    names = ["b.py", "a.py", "pkg/__init__.py", "pkg/z.py", "pkg/sub/__init__.py", "pkg/sub/m.py", "data.txt"]
    skipped = [
        "test/__init__.py",
        "_bundled/__init__.py",
        "site-packages/__init__.py",
        "folder/no_package.py",
    ]
    for name in [*names, *skipped]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in builtin._modules(tmp_path)]
    assert found == ["a.py", "b.py", "pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/m.py", "pkg/z.py"]


def test_invalid_escapes_in_a_source_do_not_warn(tmp_path: Path, monkeypatch):
    (tmp_path / "old.py").write_text('"""Matches \\d."""\n')
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(builtin._module_docstrings()) == [["Matches \\d."]]


def test_modules_with_few_docstrings_are_left_out(tmp_path: Path, monkeypatch):
    (tmp_path / "code.py").write_text('"""Rare."""\n' + "x = 1\n" * 400)
    (tmp_path / "prose.py").write_text('"""Often."""\n' + "x = 1\n" * 300)
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(builtin._module_docstrings()) == [["Often."]]


def test_python_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match=r"^builtin: .* without pydoc_data\.topics; give a text file"):
        list(builtin._topics())


def test_python_without_sources(monkeypatch):
    monkeypatch.setattr(builtin, "_topics", lambda: iter([]))
    monkeypatch.setattr(builtin, "_module_docstrings", lambda: iter([[]]))
    with pytest.raises(CalibrationError, match=r"^builtin: this Python has no sources to read; give a text file"):
        builtin._all_documents.__wrapped__()
