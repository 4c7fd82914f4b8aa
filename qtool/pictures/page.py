"""One HTML file that needs nothing else: its style is in it, and a browser may run and load nothing for it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence

from qtool.pictures.markup import Markup, element
from qtool.pictures.style import page_style, svg_style


def html_page(title: str, body: Iterable[str]) -> str:
    """A whole page; the policy in it forbids a browser everything but the style of this very page."""
    style = page_style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    page = element("html", head, element("body", element("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def standalone_svg(svg: Markup) -> str:
    """An `<svg>` as a file of its own, with the style it takes its colours from and paper behind it."""
    start = svg.index(">") + 1
    paper = element("rect", class_="paper", width="100%", height="100%")
    style = element("style", Markup(svg_style()))
    return f"{svg[:start]}{style}{paper}{svg[start:]}\n"


def figure(svg: Markup) -> Markup:
    """A picture that scrolls by itself where the window is narrow, with the keyboard too."""
    return element("figure", svg, tabindex="0")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table; the columns in `numeric` are set to the right."""
    kind = ["n" if index in numeric else None for index in range(len(head))]
    top = element("tr", *(element("th", text, class_=k, scope="col") for text, k in zip(head, kind, strict=True)))
    body = (element("tr", *(element("td", text, class_=k) for text, k in zip(row, kind, strict=True))) for row in rows)
    inner = element("table", element("thead", top), element("tbody", *body))
    return element("div", inner, class_="wide", tabindex="0")


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and what they are, one under the other."""
    lines = (element("tr", element("th", name, scope="row"), element("td", text)) for name, text in rows)
    return element("table", element("tbody", *lines))


def swatch(kind: int) -> Markup:
    """The colour of a part, 0 to N_PARTS - 1, to stand before its name."""
    square = element("rect", class_=f"part{kind}", width=12, height=12)
    return element("svg", square, class_="swatch", width=12, height=12, aria_hidden="true")
