"""Every "must" of SPEC.md, broken."""

import copy
import hashlib
import json
import struct

import numpy as np
import pytest
from format_samples import make_layer, write_tiny

from formats.encoding import Dense, encoding_of
from formats.errors import FormatError
from formats.preamble import MAX_HEADER_BYTES, build_preamble
from formats.reader import QtmFile, verify, verify_file
from formats.section import pack
from formats.writer import Writer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.qtm")


def header_place(file: bytes) -> tuple[int, int]:
    return struct.unpack_from("<QQ", file, 16)


def with_header(file: bytes, header: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """The file with another header, its place and hash put right: what only a liar would write."""
    offset, _ = header_place(file)
    fixed = bytearray(build_preamble(offset, header))
    fixed[8:12] = struct.pack("<HH", *version)
    return resign(bytes(fixed) + file[64:offset] + header)


def resign(file: bytes) -> bytes:
    offset, _ = header_place(file)
    return file[:32] + hashlib.sha256(file[:32] + file[offset:]).digest() + file[64:]


def tree_of(file: bytes) -> dict:
    return json.loads(file[header_place(file)[0] :])


def lie(file: bytes, change, **kw) -> bytes:
    """The file after `change` has been let loose on the header's JSON."""
    tree = copy.deepcopy(tree_of(file))
    change(tree)
    return with_header(file, json.dumps(tree).encode(), **kw)


def refuses(file: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        verify_file(QtmFile(file, "x.qtm"))


def test_the_tiny_file_is_good_and_small(tiny):
    assert verify_file(QtmFile(tiny, "x.qtm")).n_sections == 3
    assert len(tiny) < 2200
    assert verify_file(QtmFile(lie(tiny, lambda tree: None), "x.qtm")).n_sections == 3


def test_every_truncation_is_refused(tiny, tmp_path):
    for n in range(len(tiny)):
        with pytest.raises(FormatError, match="truncated"):
            QtmFile(tiny[:n], "x.qtm")
    for n in (0, 10, 64, len(tiny) - 1):  # as a real file: an empty one cannot be mapped
        (tmp_path / "cut.qtm").write_bytes(tiny[:n])
        with pytest.raises(FormatError, match=r"cut.qtm: .*truncated"):
            QtmFile.open(tmp_path / "cut.qtm")


def test_every_flipped_bit_is_found(tiny):
    flipped, missed = bytearray(tiny), []
    for i in range(8 * len(tiny)):
        flipped[i // 8] ^= 1 << i % 8
        try:
            verify_file(QtmFile(bytes(flipped), "x.qtm"))
            missed.append(i)
        except FormatError:
            pass
        flipped[i // 8] ^= 1 << i % 8
    assert missed == []


def test_spec_2_2_magic(tiny):
    refuses(b"GGUF" + tiny[4:], r"x.qtm: starts with b'GGUF.*not a .qtm file \(SPEC 2.2\)")


@pytest.mark.parametrize("major", [0, 2, 65535])
def test_spec_2_3_another_major_version(tiny, major):
    file = tiny[:8] + struct.pack("<HH", major, 7) + tiny[12:]
    refuses(file, rf"format version {major}.7: this reader reads 1.x.*\(SPEC 2.3\)")


def test_spec_2_3_a_newer_minor_version_is_read_when_nothing_in_it_is_new(tiny):
    file = QtmFile(lie(tiny, lambda tree: None, version=(1, 3)), "x.qtm")
    assert file.version == (1, 3)
    assert file.layer("w").bits == 3


def test_spec_2_3_a_newer_minor_version_says_what_is_new(tiny):
    file = lie(tiny, lambda tree: tree["tensors"][0].update(encoding="codebook"), version=(1, 3))
    refuses(file, r"tensor 'w': unknown encoding 'codebook'.*; the file is version 1.3, this reader knows 1.0")


def test_spec_2_4_reserved_bytes(tiny):
    refuses(resign(tiny[:12] + b"\1\0\0\0" + tiny[16:]), "reserved bytes are 01000000.*SPEC 2.4")


@pytest.mark.parametrize(
    ("offset", "n_bytes", "message"),
    [
        (2**40, 100, r"header claims bytes 1099511627776 .* the file has \d+.*SPEC 2.5"),
        (2**64 - 1, 1, "SPEC 2.5"),
        (0, 2**64 - 1, "header claims 18446744073709551615 bytes: at most 67108864"),
        (256, MAX_HEADER_BYTES + 1, "at most 67108864"),
        (256, MAX_HEADER_BYTES, "the file has"),
        (0, 0, "SPEC 2.5"),
    ],
)
def test_spec_2_5_the_place_of_the_header(tiny, offset, n_bytes, message):
    refuses(tiny[:16] + struct.pack("<QQ", offset, n_bytes) + tiny[32:], message)


def test_spec_2_5_a_header_inside_the_preamble(tiny):
    refuses(tiny[:16] + struct.pack("<QQ", 63, len(tiny) - 63) + tiny[32:], "SPEC 2.5")


def test_spec_2_5_trailing_bytes(tiny):
    refuses(tiny + b"\0", "something was appended")


def test_spec_2_5_the_writer_keeps_the_limit():
    with pytest.raises(FormatError, match=r"SPEC 2\.5"):
        build_preamble(256, bytes(MAX_HEADER_BYTES + 1))


def test_spec_2_6_header_hash(tiny):
    refuses(tiny[:-1] + b" ", r"header does not match its SHA-256: the file is damaged \(SPEC 2.6\)")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not UTF-8 JSON"),
        (b"{", "not UTF-8 JSON"),
        (b'{"\xff": 1}', "not UTF-8 JSON"),
        (b"\xef\xbb\xbf{}", "not UTF-8 JSON"),
        (b"[]", r"header is \[\]: must be an object"),
        (b"{}", "header has no field 'files'"),
        (b'{"a": 1, "a": 1}', r"key 'a' stands twice in one object \(SPEC 3.2\)"),
        (b'{"a": NaN}', r"number NaN is not finite \(SPEC 3.2\)"),
        (b'{"a": -Infinity}', "number -Infinity is not finite"),
        (b'{"a": 1e999}', "number 1e999 is not finite"),
        (b'{"a": "\\ud800"}', r"lone surrogate \(SPEC 3.2\)"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not UTF-8 JSON"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", r"nested deeper than 64 levels \(SPEC 3.2\)"),
        (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "nested deeper than 64 levels"),
        (b'{"a": ' * 10**5 + b"1" + b"}" * 10**5, "nested deeper than 64 levels"),
    ],
)
def test_spec_3_json_that_is_refused(tiny, header, message):
    refuses(with_header(tiny, header), message)


def test_spec_3_2_nesting_up_to_the_limit_is_read(tiny):
    def nest(tree):
        value: list = []
        for _ in range(61):
            value = [value]
        tree["quality"] = {"deep": value}

    QtmFile(lie(tiny, nest), "x.qtm")


def tensor(**changes):
    return lambda tree: tree["tensors"][0].update(changes)


def file(**changes):
    return lambda tree: tree["files"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("recipe"), "header has no field 'recipe'.*SPEC 3.3"),
        (lambda tree: tree.update(extra=1), "header has an unknown field 'extra'.*SPEC 3.5"),
        (lambda tree: tree.update(model=[]), "model is .*must be an object.*SPEC 3.3"),
        (lambda tree: tree.update(tensors={}), "tensors is .*must be a list"),
        (lambda tree: tree.update(tensors=[1]), "tensor entry is 1: must be an object"),
        (lambda tree: tree.update(files=[None]), "file entry is None"),
        (lambda tree: tree["tensors"].append(tree["tensors"][0]), "tensor 'w': the name stands twice.*5.2"),
        (lambda tree: tree["files"].append(tree["files"][0]), "file 't.json': the name stands twice.*6.2"),
        (lambda tree: tree["tensors"].pop(0), r"tensor 'norm': starts at \d+, must be 256 \(SPEC 4.2\)"),
        (lambda tree: tree["files"].pop(0), r"header: starts at \d+, must be \d+ \(SPEC 4.2\)"),
        (tensor(name=""), "1 to 1024 bytes.*SPEC 5.2"),
        (tensor(name="a\x1b[2J"), r"tensor 'a\\x1b\[2J': .*no control characters"),
        (tensor(name="a" * 1025), "SPEC 5.2"),
        (tensor(name=1), "name of a tensor is 1: must be a string"),
        (lambda tree: tree["tensors"][0].pop("name"), "name of a tensor is None"),
        (lambda tree: tree["tensors"][0].pop("sha256"), "tensor 'w': entry has no field 'sha256'"),
        (tensor(perm=[0]), r"tensor 'w': entry has an unknown field 'perm' \(SPEC 3.5\)"),
        (tensor(dtype="F16"), "tensor 'w': entry has an unknown field 'dtype'"),
        (tensor(encoding="codebook"), "tensor 'w': unknown encoding 'codebook'; this reader knows dense"),
        (tensor(bits=4), r"tensor 'w': \d+ bytes, but uniform \[3, 11\] takes \d+ \(SPEC 5.4\)"),
        (tensor(bits=9), "tensor 'w': bits=9: must be 2 to 8"),
        (tensor(bits=True), "tensor 'w': bits=True: must be int"),
        (tensor(group_size=12), "tensor 'w': group_size=12: more than 11 inputs.*SPEC 7.3"),
        (tensor(symmetric=True), "SPEC 5.4"),
        (tensor(shape=[33]), "uniform needs two dimensions"),
        (tensor(shape=[3, -11]), "shape is -11: must be an integer"),
        (tensor(shape=[3, 0]), r"tensor 'w': shape \[3, 0\]: .*SPEC 5.3"),
        (tensor(shape=[3, 11.0]), "shape is 11.0"),
        (tensor(shape=[2**32, 2**32]), r"2\*\*48 elements \(SPEC 5.3\)"),
        (tensor(shape=[2**62, 2**62]), "SPEC 5.3"),
        (tensor(shape=[1] * 10**6), r"tensor 'w': shape \[1, 1.{70,80}\.\.\.: at most"),
        (tensor(**{"x" * 10**6: 1}), r"unknown field 'x{70,80}\.\.\. \(SPEC 3.5\)"),
        (tensor(shape="3"), "must be a list"),
        (tensor(offset=512), r"starts at \d+, must be \d+ \(SPEC 4.2\)"),
        (tensor(offset=-256), "offset is -256: must be an integer"),
        (tensor(offset=2**63), "offset is 9223372036854775808"),
        (tensor(bytes=2**40), "SPEC 5.4"),
        (tensor(sha256="0" * 64), "x.qtm: tensor 'w': does not match its SHA-256: damaged.*SPEC 4.4"),
        (tensor(sha256="A" * 64), "must be 64 lower-case hexadecimal digits.*SPEC 4.4"),
        (tensor(sha256=None), "sha256=None"),
        (tensor(relative_error=-1), "relative_error=-1: must be finite.*SPEC 5.5"),
        (tensor(relative_error=10**400), "must be finite"),
        (tensor(relative_error=True), "relative_error=True: must be a number"),
        (tensor(relative_error=None), "relative_error=None: must be a number"),
        (tensor(transposed=1), "transposed=1: must be true or false.*SPEC 5.6"),
        (lambda tree: tree["tensors"][1].update(transposed=True), "tensor 'norm': .*only a matrix.*SPEC 5.6"),
        (lambda tree: tree["tensors"][1].update(dtype="F64"), "tensor 'norm': dtype 'F64': must be one of"),
        (lambda tree: tree["tensors"][1].update(dtype="F32"), "SPEC 5.4"),
        (lambda tree: tree["tensors"][1].update(shape=[1] * 8 + [3]), "at most 8 sizes"),
        (file(extra=1), "file 't.json': entry has an unknown field 'extra'"),
        (file(bytes=3), "does not match its SHA-256"),
        (file(bytes=2**62), "SPEC 4.2"),
        *[
            (file(name=name), r"must be a plain file name without a folder \(SPEC 6.2\)")
            for name in ("", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "a\0", "a\n", "é" * 128)
        ],
    ],
)
def test_a_header_that_lies_is_refused(tiny, change, message):
    refuses(lie(tiny, change), message)


def test_spec_4_2_two_sections_may_not_share_bytes(tiny):
    tree = tree_of(tiny)
    first, second = tree["tensors"]
    second |= {"name": "copy", "offset": first["offset"]}
    refuses(with_header(tiny, json.dumps(tree).encode()), "SPEC 4.2")


@pytest.mark.parametrize("at", [64, 255])
def test_spec_4_3_padding_before_the_first_section(tiny, at):
    changed = tiny[:at] + b"\1" + tiny[at + 1 :]
    refuses(changed, r"x.qtm: tensor 'w': the padding before it is not zero \(SPEC 4.3\)")


def test_spec_4_3_padding_before_the_header(tiny):
    offset, _ = header_place(tiny)
    refuses(tiny[: offset - 1] + b"\1" + tiny[offset:], "header: the padding before it is not zero")


def test_spec_7_6_a_scale_that_is_not_finite(tmp_path):
    """The hash is right, so only a look at the numbers can tell."""
    layer = make_layer()
    section = bytearray(pack(layer))
    section[128:130] = np.array([np.nan], np.float16).tobytes()
    with Writer(tmp_path / "nan.qtm") as writer:
        writer.add_tensor("w", (3, 11), encoding_of(layer), section)
        writer.finish(model={}, recipe={}, provenance={}, quality={})
    with pytest.raises(FormatError, match=r"nan.qtm: tensor 'w': a scale is NaN or infinite \(SPEC 7.6\)"):
        verify(tmp_path / "nan.qtm")
    with QtmFile.open(tmp_path / "nan.qtm") as file, pytest.raises(FormatError, match="'w': a scale is NaN"):
        file.layer("w")


def test_spec_9_2_a_damaged_section_is_found_when_touched_and_not_before(tmp_path):
    path = tmp_path / "a.qtm"
    with Writer(path) as writer:
        for name in ("good", "bad"):
            writer.add_tensor(name, (2,), Dense("F16"), b"\0\x3c\0\x3c")
        writer.finish(model={}, recipe={}, provenance={}, quality={})
    data = bytearray(path.read_bytes())
    data[512] ^= 1
    path.write_bytes(data)
    with QtmFile.open(path) as file:
        assert file.dense("good").tolist() == [1, 1]
        with pytest.raises(FormatError, match=r"a.qtm: tensor 'bad': does not match its SHA-256"):
            file.dense("bad")
    with QtmFile.open(path, check=False) as file:
        assert file.dense("bad").tolist() != [1, 1]
    with pytest.raises(FormatError, match="tensor 'bad': does not match"):
        verify(path)
