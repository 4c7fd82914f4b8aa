"""Text stays text, whatever stands in it."""

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from qtool.pictures.markup import Markup, element, join

ANY_TEXT = st.text(st.characters(codec=None))


def test_known_markup():
    inner = element("text", 'a<b> & "c"', class_="x", stroke_width=1.5, fill=None)
    assert inner == '<text class="x" stroke-width="1.5">a&lt;b&gt; &amp; &quot;c&quot;</text>'
    assert element("g", inner, "'") == f"<g>{inner}&#x27;</g>"
    assert element("rect", x=1 / 3, y=2) == '<rect x="0.33" y="2"/>'
    assert element("rect", element("title", "t"), x=10.0) == '<rect x="10"><title>t</title></rect>'
    assert element("td") == "<td></td>"


def test_control_characters_and_marks_of_direction_are_shown_as_such():
    assert element("p", "a\x00b\x1b[31m\u202ec\n") == "<p>a\ufffdb\ufffd[31m\ufffdc\ufffd</p>"


@given(ANY_TEXT, ANY_TEXT)
def test_text_can_be_neither_markup_nor_attribute(text, value):
    tree = ET.fromstring(element("p", join(text, Markup("<b/>")), title=value))
    shown = "".join(char if char.isprintable() else "\ufffd" for char in text)
    assert (tree.text or "", [child.tag for child in tree], list(tree.attrib)) == (shown, ["b"], ["title"])
    assert tree.get("title") == "".join(char if char.isprintable() else "\ufffd" for char in value)
