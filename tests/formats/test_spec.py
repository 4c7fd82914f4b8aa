"""SPEC.md is enough for a second reader, and every "must" in it is tested."""

import copy
import functools
import hashlib
import json
import operator
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import independent_reader
import numpy as np
import pytest
from both_readers import assert_same, both_read, claim, header_of, read_with_formats
from format_samples import write_items, write_tiny
from golden_samples import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_reader import MAX_ENTRY_CHARS, MAX_FREE_CHARS, Refused
from invoke import python
from layer_samples import LAYERS
from test_house import imported_packages

from formats.errors import FormatError
from formats.layer import QuantizedLinear, TernaryLinear
from formats.preamble import build_preamble
from formats.reader import QtmFile
from formats.section import pack
from formats.strict_json import BYTES_OF_ENTRY, MAX_ENTRIES

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "formats" / "SPEC.md"
FREE = ("model", "recipe", "provenance", "quality")


def test_the_second_reader_imports_only_numpy_and_the_standard_library():
    path = Path(independent_reader.__file__)
    parts = {"independent_encodings", "independent_ternary", "independent_values"}
    for name in (path.stem, *parts):
        assert imported_packages(path.with_name(f"{name}.py")) <= {*sys.stdlib_module_names, "numpy", *parts}
    code = (
        f"import sys; sys.path.insert(0, {str(path.parent)!r}); import independent_reader as reader, pathlib;"
        f"reader.read(pathlib.Path({str(FOLDER / 'v1.qtm')!r}));"
        "assert not {'formats', 'qtool', 'torch'} & {name.split('.')[0] for name in sys.modules}"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("options", [(), ("--bits", "3", "--sym")])
def test_both_readers_agree_on_a_compressed_model(tiny_files, options):
    path = tiny_files.compressed("llama", *options)
    theirs = independent_reader.read(path)
    assert_same(read_with_formats(path.read_bytes()), theirs)
    assert {"tokenizer.json"} <= theirs.files.keys()
    assert {entry["encoding"] for entry in theirs.header["tensors"]} == {"dense", "uniform"}


@st.composite
def any_uniform(draw) -> QuantizedLinear:
    """A layer of random bits: every finite scale, every positive input scale."""
    rows, n, bits = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(2, 8))
    group_size = draw(st.integers(1, n))
    groups = (rows, -(-n // group_size))
    integers = st.integers(0, 2**bits - 1)
    scales = st.floats(width=16, allow_nan=False, allow_infinity=False)
    inputs = st.floats(2.0**-24, 65504, width=16)
    return QuantizedLinear(
        codes=draw(hnp.arrays(np.uint8, (rows, n), elements=integers)),
        scales=draw(hnp.arrays(np.float16, groups, elements=scales)),
        zeros=draw(st.none() | hnp.arrays(np.uint8, groups, elements=integers)),
        bits=bits,
        group_size=group_size,
        input_scales=draw(st.none() | hnp.arrays(np.float16, n, elements=inputs)),
    )


# An F16 is finite here: what a signalling NaN becomes is left open (SPEC 7.2.1).
dense_values = st.one_of(
    hnp.arrays("<f2", hnp.array_shapes(min_dims=0), elements=st.floats(width=16, allow_nan=False)),
    hnp.arrays("<u2", hnp.array_shapes(min_dims=0)),
    hnp.arrays("<u4", hnp.array_shapes(min_dims=0)),
)


@settings(max_examples=40, deadline=None)
@given(
    content=st.lists(
        st.one_of(any_uniform(), st.sampled_from(list(LAYERS)), dense_values, st.binary(max_size=300)),
        max_size=4,
    )
)
def test_both_readers_agree_on_any_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "a.qtm"
    write_items(
        path, [LAYERS[item] if isinstance(item, str) else item for item in content]
    )  # a name: its repr is short
    assert both_read(path.read_bytes())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_both_readers_refuse_any_flipped_bit(data):
    name = data.draw(st.sampled_from(["uniform_3bit", "v1_1"]))
    file = bytearray((FOLDER / f"{name}.qtm").read_bytes())
    bit = data.draw(st.integers(0, 8 * len(file) - 1))
    file[bit // 8] ^= 1 << bit % 8
    assert not both_read(bytes(file))


REMOVED = object()
VALUES = (
    *(REMOVED, None, True, False, -1, 0, 1, 2, 8, 9, 11, 32, 256, 2**31, 2**63 - 1, 2**63, 4.0, 0.5, -0.0, 1e300),
    *("", "a", "w", "..", "a/b", "\x7f", "é" * 128, "x" * 1025, "F16", "F8", "0" * 64, "nf4", "fitted"),
    *("dense", "uniform", "codebook", "int8_rows", "trellis", "ternary", "ternary_dict", "ternary_rans"),
    *([], [3], [33], [3, 11], [11, 3], [1, 33], [3, 0], [3, 11.0], [True, 33], [1] * 9, {}, {"a": 1}),
)
ENTRIES = (("tensors", 0), ("tensors", 1), ("files", 0))
OPTIONAL = ("relative_error", "transposed", "input_scales", "dtype", "bits", "perm")
NEWER = ("stat_bits", "stat_rows", "outliers", "levels", "double_quant", "columns", "memory", "run")
NEWEST = ("share_low", "share_high", "codewords", "segment", "words")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every member and item of a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at `path`, or with none."""
    tree = copy.deepcopy(tree)
    *above, last = path
    parent = functools.reduce(operator.getitem, above, tree)
    if value is not REMOVED:
        parent[last] = value
    elif isinstance(parent, list) or last in parent:
        del parent[last]
    return tree


def test_both_readers_refuse_the_same_headers(tmp_path):
    """One field at a time: taken out, put in where it does not belong, set to what it may be and to what it may not."""
    tiny = write_tiny(tmp_path / "tiny.qtm")
    header = header_of(tiny)
    header["tensors"][0]["input_scales"] = False  # spelt out, which a writer never does (SPEC 7.3)
    fields = [*places(header), *((kind, i, name) for kind, i in ENTRIES for name in (*OPTIONAL, *NEWER, *NEWEST))]
    verdicts = [both_read(claim(tiny, changed(header, path, value))) for path in fields for value in VALUES]
    assert verdicts.count(True) > 50


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_both_readers_refuse_the_same_fields_of_every_encoding(layer, tmp_path):
    """The encoding of a good section, one field at a time; most values make it another length (SPEC 5.4)."""
    write_items(tmp_path / "a.qtm", [layer])
    good = (tmp_path / "a.qtm").read_bytes()
    header = header_of(good)
    own = set(header["tensors"][0]) - {"name", "offset", "bytes", "sha256"}
    fields = [("tensors", 0, name) for name in (own | {*NEWER, *NEWEST, *OPTIONAL})]
    verdicts = [both_read(claim(good, changed(header, path, value))) for path in sorted(fields) for value in VALUES]
    assert True in verdicts and False in verdicts


@pytest.mark.parametrize(
    ("quality", "good"),
    [
        ('{"a": 1, "a": 1}', False),
        (r'{"a": 1, "\u0061": 1}', False),  # the same key, 3.2.2
        ('{"é": 1, "e\u0301": 1}', True),  # not the same: nothing is normalised
        ('{"a": {"b": 1}, "b": {"b": 1}}', True),
        (' \t\r\n{ "a" : [ ] } ', True),
        ("{,}", False),
        ('{"a": 1,}', False),
        ('{"a": "\t"}', False),
        ('{"a": 01}', False),
        ('{"a": +1}', False),
        ('{"a": .5}', False),
        ('{"a": 1E5, "b": -0, "c": 1e-999}', True),
        ('{"a": 1e309}', False),
        ('{"a": 1.7976931348623159e308}', False),  # rounds to an infinity
        ('{"a": 1.7976931348623157e308}', True),
        ('{"a": Infinity}', False),
        ('{"a": 1' + "0" * 308 + "}", True),
        ('{"a": 1' + "0" * 309 + "}", False),
        ('{"a": -' + "9" * 5000 + "}", False),
        (r'{"a": "\ud83d\ude00"}', True),
        (r'{"a": "\ude00\ud83d"}', False),
        (r'{"a": ["\ud83d"]}', False),
        ('{"a": ' + "[" * 62 + "]" * 62 + "}", True),  # the header is level 1, quality 2, the last list 64
        ('{"a": ' + "[" * 63 + "]" * 63 + "}", False),
        ('{"a": "' + "[" * 100 + '"}', True),
        ('{"a": 1} //', False),
    ],
)
def test_spec_3_1_1_both_readers_agree_on_json(quality, good):
    empty = (FOLDER / "empty.qtm").read_bytes()
    header = '{"tensors": [], "files": [], "model": {}, "recipe": {}, "provenance": {}, "quality": ' + quality + "}"
    assert both_read(claim(empty, header.encode())) == good


def test_spec_3_2_1_both_readers_keep_the_same_limits(tmp_path):
    """White space counts where it stands inside a value, characters and not bytes are counted, objects add up."""
    tiny = write_tiny(tmp_path / "tiny.qtm")
    header = tiny[len(tiny) - int.from_bytes(tiny[24:32], "little") :].decode()
    entry = header[header.index('{"bytes":6') : header.index("]}]") + 2]  # of the tensor that comes first
    for n_chars, good in ((MAX_ENTRY_CHARS, True), (MAX_ENTRY_CHARS + 1, False)):
        longer = header.replace(entry, entry[:-1] + " " * (n_chars - len(entry)) + "}  ")
        assert both_read(claim(tiny, longer.encode())) == good
    for n_chars, good in ((MAX_FREE_CHARS, True), (MAX_FREE_CHARS + 1, False)):
        n_free = len('{}{"a":""}{}{}')
        longer = header.replace('"model":{}', '"model":{"a":"' + "é" * (n_chars - n_free) + '"}')
        assert both_read(claim(tiny, longer.encode())) == good


def test_spec_4_1_1_both_readers_count_sections():
    empty = (FOLDER / "empty.qtm").read_bytes()
    header = header_of(empty)
    entry = {"offset": 256, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    header["files"] = [{"name": f"{i}", **entry} for i in range(independent_reader.MAX_SECTIONS)]
    assert both_read(claim(empty, header))
    header["files"].append({"name": "one more", **entry})
    assert not both_read(claim(empty, header))


def test_spec_4_1_1_a_large_file_may_have_more_sections(tmp_path):
    """One tensor and empty files behind it; its values are a hole of the disk's."""
    for n_sections, n_bytes, good in (
        (MAX_ENTRIES + 1, (MAX_ENTRIES + 1) * BYTES_OF_ENTRY, True),
        (MAX_ENTRIES + 1, (MAX_ENTRIES + 1) * BYTES_OF_ENTRY - 256, False),
        (MAX_ENTRIES, 512, True),
    ):
        tensor = {"name": "w", "shape": [n_bytes // 2 - 128], "encoding": "dense", "dtype": "F16"}
        sections = [tensor | {"offset": 256, "bytes": n_bytes - 256, "sha256": "0" * 64}]
        sections += [{"name": f"{i}", "offset": n_bytes, "bytes": 0, "sha256": "0" * 64} for i in range(n_sections - 1)]
        header = {"tensors": sections[:1], "files": sections[1:]} | {name: {} for name in FREE}
        raw, path = json.dumps(header).encode(), tmp_path / f"{n_sections}-{n_bytes}.qtm"
        with open(path, "wb") as file:
            file.write(build_preamble(n_bytes, raw))
            file.seek(n_bytes)
            file.write(raw)
        if good:
            with QtmFile.open(path) as opened:
                assert opened.header.version == ((1, 3) if n_sections > MAX_ENTRIES else (1, 0))
            independent_reader.check_header(header, n_bytes)
        else:
            with pytest.raises(FormatError, match=r"header: more than 16384 sections \(SPEC 4.1.1\)"):
                QtmFile.open(path)
            with pytest.raises(Refused, match=r"SPEC 4.1.1"):
                independent_reader.check_header(header, n_bytes)


def test_spec_7_15_6_both_readers_count_dictionaries():
    """Of tensors of one value, whose one codeword is in every dictionary."""

    def file(n: int) -> bytes:
        layer = TernaryLinear(codes=np.zeros((1, 1), np.int8), scales=np.zeros((1, 2), np.float16))
        section = pack(layer)
        tensors = []
        data = bytearray()
        for i in range(n):
            fields = layer.encoding.fields() | {"share_low": 1 + i, "share_high": 1}
            place = {"offset": 256 * (1 + i), "bytes": len(section), "sha256": hashlib.sha256(section).hexdigest()}
            tensors.append({"name": f"{i}", "shape": [1, 1], **fields, **place})
            data += bytes(section).ljust(256, b"\0")
        free = {name: {} for name in ("model", "provenance", "quality", "recipe")}
        header = json.dumps({"tensors": tensors, "files": [], **free}).encode()
        return build_preamble(256 * (1 + n), header, (1, 2)).ljust(256, b"\0") + bytes(data) + header

    assert both_read(file(32))
    assert not both_read(file(33))
    with pytest.raises(FormatError, match=r"33 dictionaries: at most 32 in a file \(SPEC 7\.15\.6\)"):
        QtmFile(file(33), "x.qtm")


@pytest.mark.parametrize("integer", ["256.0", "2.56e2", "256e0", '"256"', "-256", "0256"])
def test_spec_3_3_1_an_integer_has_neither_fraction_nor_exponent(integer, tmp_path):
    tiny = write_tiny(tmp_path / "tiny.qtm")
    header = tiny[len(tiny) - int.from_bytes(tiny[24:32], "little") :]
    assert header.count(b'"offset":256') == 1
    assert both_read(claim(tiny, header))
    assert not both_read(claim(tiny, header.replace(b'"offset":256', f'"offset":{integer}'.encode())))


def paragraphs() -> list[tuple[str, str]]:
    """Number and text of every section's opening and every paragraph of SPEC.md, up to the appendices."""
    text = SPEC.read_text(encoding="utf-8").split("## Appendix A")[0]
    parts = re.split(r"^(?:## )?(?=\d+\. |\d+\.\d)([\d.]*\d)\.? ", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def musts() -> set[str]:
    return {number for number, text in paragraphs() if re.search(r"\bmust\b", text)}


def cited(*folders: str) -> set[str]:
    """Paragraphs that python files below these folders name, as `SPEC 4.2` or as `test_spec_4_2_`."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8").replace("\\.", ".") for path in files)
    lists = re.findall(r"SPEC (\d+(?:\.\d+)*(?:(?:, | and | to )\d+(?:\.\d+)*)*)", text)
    names = re.findall(r"def test_spec_(\d+(?:_\d+)*)_", text)
    return {number for item in lists for number in re.findall(r"[\d.]*\d", item)} | {n.replace("_", ".") for n in names}


def test_paragraphs_are_found():
    numbers = [number for number, _ in paragraphs()]
    assert len(set(numbers)) == len(numbers)  # or a line of text that begins with a number was taken for a paragraph
    assert {"1", "1.1", "2.3.4", "7", "7.4.1", "9.3"} <= set(numbers)
    assert {"2.4", "5.6", "7", "9.2"} - musts() == {"9.2"}


def test_every_must_is_cited_by_a_test():
    assert len(musts()) > 20
    assert musts() - cited("tests") == set()


def test_every_must_that_binds_a_reader_is_cited_by_the_code():
    """So that what was refused can be looked up. 8 binds writers; a sub-paragraph counts as its paragraph."""
    binding = {paragraph(number) for number in musts() if not number.startswith("8.")}
    assert binding - {paragraph(number) for number in cited("formats")} == set()


def paragraph(number: str) -> str:
    """7.4 for 7.4.1."""
    return ".".join(number.split(".")[:2])


def test_every_citation_exists():
    assert cited("formats", "qtool", "tests") - {number for number, _ in paragraphs()} == set()
