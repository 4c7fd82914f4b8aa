"""HTML and SVG made of values. What is text is escaped where it goes in: names come from files that may be hostile."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

Value: TypeAlias = str | float | None

# Written `<tag/>` when empty; to a browser any other HTML element would stay open.
_SELF_CLOSING = frozenset({"circle", "line", "meta", "path", "rect"})


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """`<tag ...>children</tag>`, well-formed as HTML and as XML.

    A child that is no Markup is text. Attribute names are written stroke_width, class_; one that is None is left out.
    """
    written = "".join(f' {_attribute(name)}="{_value(v)}"' for name, v in attributes.items() if v is not None)
    if tag in _SELF_CLOSING and not children:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """The children one after the other; text among them is escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _text(child) for child in children))


def number(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    # Control characters are not allowed in XML at all, and marks of direction could turn a name around.
    return escape("".join(char if char.isprintable() else "\ufffd" for char in text))


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return _text(value) if isinstance(value, str) else number(value)
