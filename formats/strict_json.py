"""JSON without its loose ends (SPEC 3.2), and the type checks of header fields."""

import json
import math
from typing import Any

from formats.errors import FormatError

MAX_DEPTH = 64  # deep enough for any model config, far from the recursion limit of any JSON library


def load_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; FormatError for whatever two JSON libraries could read differently."""
    try:
        tree = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except FormatError:
        raise
    except RecursionError as error:
        raise FormatError(f"JSON is nested deeper than {MAX_DEPTH} levels (SPEC 3.2)") from error
    except ValueError as error:
        raise FormatError(f"header is not UTF-8 JSON: {error} (SPEC 3.1)") from error
    _check_tree(tree, 1)
    return as_object("header", tree)


def as_object(label: str, value: Any) -> dict[str, Any]:
    """`value` as a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(f"{label} is {brief(value)}: must be an object (SPEC 3.3)")
    return value


def as_list(label: str, value: Any) -> list[Any]:
    """`value` as a JSON list."""
    if not isinstance(value, list):
        raise FormatError(f"{label} is {brief(value)}: must be a list (SPEC 3.3)")
    return value


def as_text(label: str, value: Any) -> str:
    """`value` as a string."""
    if not isinstance(value, str):
        raise FormatError(f"{label} is {brief(value)}: must be a string (SPEC 3.3)")
    return value


def as_integer(label: str, value: Any) -> int:
    """`value` as an integer of 0 to 2**63 - 1; `true` and 4.0 are not integers."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise FormatError(f"{label} is {brief(value)}: must be an integer, not negative (SPEC 3.3)")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"key {brief(twice)} stands twice in one object (SPEC 3.2)")
    return tree


def _finite(text: str) -> float:
    """Also refuses 1e999, which `float` turns into infinity without a word."""
    value = float(text)
    if not math.isfinite(value):
        raise FormatError(f"number {text[:80]} is not finite (SPEC 3.2)")
    return value


def _check_tree(value: Any, depth: int) -> None:
    if isinstance(value, str):
        # "\ud800" parses, but can be neither printed nor written again.
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise FormatError(f"string {brief(value)} has a lone surrogate (SPEC 3.2)")
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise FormatError(f"JSON is nested deeper than {MAX_DEPTH} levels (SPEC 3.2)")
        children = [*value, *value.values()] if isinstance(value, dict) else value
        for child in children:
            if isinstance(child, str | dict | list):
                _check_tree(child, depth + 1)


def brief(value: Any) -> str:
    """`repr`, cut short: a hostile value does not become a message of megabytes."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
