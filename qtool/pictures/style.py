"""The colours and the style of pages and pictures, in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.pictures.heatmap import N_SHADES

Colour = tuple[int, int, int]

# Lightness alone tells the shades apart, so that they can be read in grey and by the colour-blind.
_LIGHT_SHADES: Sequence[Colour] = ((222, 235, 247), (107, 174, 214), (8, 48, 107))
_DARK_SHADES: Sequence[Colour] = ((27, 44, 66), (56, 125, 189), (226, 240, 255))
# Paul Tol's "muted" scheme, made for colour-blind readers, and a grey; in the dark with its darkest members lightened.
_LIGHT_PARTS = [
    "#332288",
    "#88ccee",
    "#44aa99",
    "#117733",
    "#999933",
    "#ddcc77",
    "#cc6677",
    "#882255",
    "#aa4499",
    "#7f8790",
]
_DARK_PARTS = [
    "#8f7fe8",
    "#88ccee",
    "#44aa99",
    "#3da35d",
    "#999933",
    "#ddcc77",
    "#cc6677",
    "#c2558a",
    "#d07fc4",
    "#9aa3ad",
]
N_PARTS = len(_LIGHT_PARTS)
# Okabe and Ito's, in the order in which the series of a chart take them.
_LIGHT_SERIES = ["#0072b2", "#d55e00", "#007a5a", "#a04a86", "#8a6d00", "#444444"]
_DARK_SERIES = ["#56b4e9", "#f0883e", "#2fc29a", "#e08cc4", "#f0e442", "#d0d0d0"]

_LIGHT = "--paper:#fdfdfc;--ink:#1b1e22;--soft:#565d66;--rule:#d6dade;--band:#f1f3f5;--accent:#0b5cad"
_DARK = "--paper:#14171a;--ink:#e7eaee;--soft:#a4acb6;--rule:#363c43;--band:#1d2126;--accent:#7ab7f5"

_RULES = """
svg{font:12px system-ui,"Segoe UI",Roboto,sans-serif;display:block}
text{fill:var(--ink)}
.tick{fill:var(--soft);font-size:11px}
.axis{fill:var(--ink);font-size:12.5px}
.grid{stroke:var(--rule);stroke-width:1}
.frame{stroke:var(--soft);stroke-width:1;fill:none}
.frontier{stroke:var(--soft);stroke-width:1.5;fill:none}
.reference{stroke:var(--ink);stroke-width:1;stroke-dasharray:5 4}
.leader{stroke:var(--soft);stroke-width:.75}
.back{fill:var(--band)}
.count{fill:var(--accent)}
.paper{fill:var(--paper)}
"""
_PAGE_RULES = """
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{margin:.5rem 0;max-width:45rem}
figure{margin:.75rem 0;overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.87rem}
th,td{text-align:left;vertical-align:top;padding:.2rem 1.25rem .2rem 0;border-bottom:1px solid var(--rule)}
td{overflow-wrap:anywhere}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
.n{text-align:right;white-space:nowrap}
.wide{overflow-x:auto}
.wide td{white-space:nowrap}
summary{cursor:pointer;color:var(--accent)}
.swatch{vertical-align:-1px;margin-right:.5rem;display:inline}
"""


def page_style() -> str:
    """The style of a whole page."""
    return svg_style() + _PAGE_RULES


def svg_style() -> str:
    """The style of a picture: colours for shades, parts and series, light and dark."""
    dark = f":root{{{_DARK}}}{_colours(_DARK_SHADES, _DARK_PARTS, _DARK_SERIES)}"
    light = f":root{{{_LIGHT}}}{_colours(_LIGHT_SHADES, _LIGHT_PARTS, _LIGHT_SERIES)}"
    return f"{light}{_RULES}@media (prefers-color-scheme: dark){{{dark}}}"


def _colours(shades: Sequence[Colour], parts: Sequence[str], series: Sequence[str]) -> str:
    mixed = [_hex(_mix(shades, index / (N_SHADES - 1))) for index in range(N_SHADES)]
    rules = [
        f".{kind}{index}{{fill:{colour}}}"
        for kind, colours in (("shade", mixed), ("part", parts), ("series", series))
        for index, colour in enumerate(colours)
    ]
    return "".join(rules) + "".join(f".line{index}{{stroke:{colour}}}" for index, colour in enumerate(mixed))


def _mix(anchors: Sequence[Colour], share: float) -> Colour:
    """The colour at `share` of the way along the anchors, which lie at equal distances."""
    place = share * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    left, right = anchors[index], anchors[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(left, right, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
