"""Pages and pictures taken apart."""

import base64
import hashlib
import re
import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "figure", "div"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
ALLOWED |= {"svg", "g", "rect", "path", "line", "text"}


def parse(text):
    """The tree of a page or picture, which is XML as well, after checking that it reaches for nothing outside."""
    tree = ET.fromstring(text)
    for node in tree.iter():
        assert node.tag.removeprefix(SVG) in ALLOWED, node.tag
        for name, value in node.attrib.items():
            assert name not in ("href", "src", "style", "srcset", "id") and not name.startswith("on"), (name, value)
    assert not re.search(r"url\(|@import|@font-face|javascript:|data:", text)
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) <= {SVG[1:-1]}
    return tree


def check_policy(tree):
    """A browser may use the page's one style, and nothing else."""
    (policy,) = (m.get("content") for m in tree.iter("meta") if m.get("http-equiv") == "Content-Security-Policy")
    (style,) = tree.iter("style")
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def words(node):
    """All text below a node, as one string."""
    return " ".join(" ".join(node.itertext()).split())


def svgs(tree):
    """The pictures by their titles; the swatches of a table have none."""
    found = ([tree] if tree.tag == f"{SVG}svg" else []) + list(tree.iter(f"{SVG}svg"))
    return {svg.get("aria-label"): svg for svg in found if svg.get("aria-label")}


def of_class(svg, name):
    """The elements of a picture whose class is `name` and maybe a number: shade, part, series."""
    return [node for node in svg.iter() if re.fullmatch(rf"{name}\d*", node.get("class", ""))]


def cells(table):
    """The texts of a table's body, row by row."""
    return [[words(cell) for cell in row] for body in table.iter("tbody") for row in body.iter("tr")]


def tables(tree):
    """The tables of a page by the first of their column heads."""
    found = {}
    for table in tree.iter("table"):
        heads = [words(th) for head in table.iter("thead") for th in head.iter("th")]
        if heads:
            found[heads[0]] = table
    return found
