"""JSON without its loose ends (SPEC 3.2), and the type checks of header fields.

A header is hostile until proven otherwise. `JsonCursor` walks through it value by value, so that it never stands
as one tree: a tree takes up to 50 times the bytes it is written in.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from formats.errors import FormatError

MAX_DEPTH = 64  # deep enough for any model config, far from the recursion limit of any JSON library
MAX_ENTRY_CHARS = 2**14  # a name of 1024 bytes takes 6144, if every one is escaped
MAX_FREE_CHARS = 2**19
MAX_ENTRIES = 2**14  # of a file of any size: opening it takes less than a second
BYTES_OF_ENTRY = 2**16  # a file with more entries has so many bytes for each: what it costs is paid by its size

_CHUNK_BYTES = 2**18
_SPACE = re.compile(r"[ \t\n\r]*+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # a pair of them is a character, one alone is not
_SAFE_DIGITS = 308  # any number this long fits a float64

_Parse: TypeAlias = Callable[[str, int], tuple[Any, int]]


class JsonCursor:
    """A place in the bytes of one JSON object. Only a window of them is decoded at a time."""

    def __init__(self, data: bytes, max_entries: int = MAX_ENTRIES) -> None:
        self._data, self._max_entries = data, max_entries
        self._n_decoded = 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at = "", 0
        self._n_entries, self._n_free_chars = 0, MAX_FREE_CHARS
        # The C scanner makes a tuple of an object in half the time that a hook written in Python takes.
        self._parse_flat = json.JSONDecoder(object_pairs_hook=tuple).raw_decode
        self._parse = json.JSONDecoder(
            object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite, parse_int=_integer
        ).raw_decode

    def members(self) -> Iterator[str]:
        """The keys of the object that is the whole text; the caller reads a key's value before the next key."""
        seen: set[str] = set()
        for _ in self._items("{}"):
            name = as_text("a key", self._take(self._parse, MAX_ENTRY_CHARS)[0])
            if name in seen:
                raise FormatError(f"key {brief(name)} stands twice in one object (SPEC 3.2)")
            seen.add(name)
            self._skip(":")
            yield name
        if self._peek():
            raise FormatError(f"{self._peek()!r} behind the end of its JSON (SPEC 3.1)")

    def entries(self, label: str) -> Iterator[Any]:
        """The items of the list that begins here; an object inside an item is given as a tuple, which nothing takes."""
        if self._peek() != "[":
            raise FormatError(f"{label} must be a list (SPEC 3.3)")
        for _ in self._items("[]"):
            self._n_entries += 1
            if self._n_entries > self._max_entries:
                raise FormatError(f"more than {self._max_entries} sections (SPEC 4.1.1)")
            item, _ = self._take(self._parse_flat, MAX_ENTRY_CHARS)
            yield _unique_keys(item) if isinstance(item, tuple) else item

    def free_object(self, label: str) -> dict[str, Any]:
        """The object that begins here; it holds anything (SPEC 3.4)."""
        value, text = self._take(self._parse, self._n_free_chars)
        self._n_free_chars -= len(text)
        _check_depth(value, level=2)
        if _SURROGATE.search(text):
            _check_surrogates(value)
        return as_object(label, value)

    def _take(self, parse: _Parse, max_chars: int) -> tuple[Any, str]:
        """The value that begins here, of at most `max_chars` characters, and how it is written."""
        self._peek()
        self._fill(max_chars)
        try:
            value, end = parse(self._text, self._at)
        except FormatError:
            raise
        except RecursionError as error:
            raise FormatError(f"nested deeper than {MAX_DEPTH} levels (SPEC 3.2)") from error
        except ValueError as error:  # it may be the limit that cut the value off
            raise FormatError("not JSON, or longer than it may be (SPEC 3.1, 3.2.1)") from error
        text = self._text[self._at : end]
        if len(text) > max_chars:
            raise FormatError(f"{brief(text)} has {len(text)} characters: at most {max_chars} (SPEC 3.2.1)")
        self._at = end
        return value, text

    def _items(self, brackets: str) -> Iterator[None]:
        """Stand at each item of a list or object in turn; the caller reads it."""
        self._skip(brackets[0])
        more = self._peek() != brackets[1]
        while more:
            yield
            more = self._peek() == ","
            if more:
                self._at += 1
        self._skip(brackets[1])

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while (char := self._text[self._at : self._at + 1]) in " \t\n\r":  # "" is in it too
            if not char and self._n_decoded == len(self._data):
                break
            self._fill(1)
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches anything
        return char

    def _skip(self, char: str) -> None:
        if self._peek() != char:
            raise FormatError(f"{self._peek()!r} where {char!r} must stand (SPEC 3.1, 3.3)")
        self._at += 1

    def _fill(self, n_chars: int) -> None:
        """Decode on until `n_chars` characters lie ahead, or all there are."""
        while len(self._text) - self._at < n_chars and self._n_decoded < len(self._data):
            chunk = self._data[self._n_decoded : self._n_decoded + _CHUNK_BYTES]
            self._n_decoded += len(chunk)
            try:
                decoded = self._decode(chunk, self._n_decoded == len(self._data))
            except UnicodeDecodeError as error:
                raise FormatError(f"not UTF-8: {error.reason} (SPEC 3.1)") from error
            self._text, self._at = self._text[self._at :] + decoded, 0


def max_entries(n_bytes: int) -> int:
    """The sections that a file with `n_bytes` in front of its header may have (SPEC 4.1.1)."""
    return max(MAX_ENTRIES, n_bytes // BYTES_OF_ENTRY)


def as_object(label: str, value: Any) -> dict[str, Any]:
    """`value` as a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(f"{label} is {brief(value)}: must be an object (SPEC 3.3)")
    return value


def as_text(label: str, value: Any) -> str:
    """`value` as a string."""
    if not isinstance(value, str):
        raise FormatError(f"{label} is {brief(value)}: must be a string (SPEC 3.3)")
    return value


def as_list(label: str, value: Any) -> list[Any]:
    """`value` as a JSON list."""
    if not isinstance(value, list):
        raise FormatError(f"{label} is {brief(value)}: must be a list (SPEC 3.3)")
    return value


def as_integer(label: str, value: Any) -> int:
    """`value` as an integer of 0 to 2**63 - 1; `true` and 4.0 are not integers."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise FormatError(f"{label} is {brief(value)}: must be an integer from 0 to 2**63 - 1 (SPEC 3.3)")
    return value


def brief(value: Any) -> str:
    """`repr`, cut short: a hostile value does not become a message of megabytes."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"key {brief(twice)} stands twice in one object (SPEC 3.2)")
    return tree


def _finite(text: str) -> float:
    """Also refuses 1e999, which `float` turns into infinity without a word."""
    value = float(text)
    if not math.isfinite(value):
        raise FormatError(f"number {text[:80]} is not finite (SPEC 3.2)")
    return value


def _integer(text: str) -> int:
    """Refuses what no float64 could hold, before `int` spends quadratic time on it."""
    if len(text) > _SAFE_DIGITS:
        _finite(text)
    return int(text)


def _check_depth(value: Any, level: int) -> None:
    """Level by level: a recursion would take ten times as long."""
    nodes = [value] if isinstance(value, dict | list) else []
    while nodes:
        if level > MAX_DEPTH:
            raise FormatError(f"nested deeper than {MAX_DEPTH} levels (SPEC 3.2)")
        children = (child for node in nodes for child in (node.values() if type(node) is dict else node))
        nodes = [child for child in children if type(child) is list or type(child) is dict]
        level += 1


def _check_surrogates(value: Any) -> None:
    """A lone one parses, but can be neither printed nor written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError("a string has a lone surrogate (SPEC 3.2)") from error
