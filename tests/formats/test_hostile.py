"""Every "must" of SPEC 1, 2, 4 and 7 broken; `test_hostile_header.py` does the header. Digests are right unless they
are what is broken: an attacker can compute them."""

import struct

import numpy as np
import pytest
from both_readers import claim, header_of
from format_samples import MEMBERS, make_layer, write_tiny

from formats.encoding import Dense, encoding_of
from formats.errors import FormatError
from formats.preamble import MAX_HEADER_BYTES, build_preamble
from formats.reader import QtmFile, verify, verify_file
from formats.section import pack
from formats.writer import Writer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.qtm")


def header_offset(file: bytes) -> int:
    return struct.unpack_from("<Q", file, 16)[0]


def refuses(file: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        verify_file(QtmFile(file, "x.qtm"))


def place_of_byte(file: bytes) -> list[str]:
    """For every byte of a file, what an error about it must name: its section, or what its padding comes before."""
    place = ["preamble"] * 64
    for section in QtmFile(file, "x.qtm").header.sections():
        place += [f"{section.label}: the padding before it"] * (section.offset_bytes - len(place))
        place += [section.label] * section.n_bytes
    place += ["header: the padding before it"] * (header_offset(file) - len(place))
    return place + ["header"] * (len(file) - len(place))


def test_the_tiny_file_is_good_and_small(tiny):
    assert verify_file(QtmFile(tiny, "x.qtm")).n_sections == 3
    assert len(tiny) < 2200
    assert verify_file(QtmFile(claim(tiny, header_of(tiny)), "x.qtm")).n_sections == 3


def test_every_truncation_is_refused(tiny, tmp_path):
    for n in range(len(tiny)):
        with pytest.raises(FormatError, match=r"preamble: .*truncated.*\(SPEC 2\.[15]\)"):
            QtmFile(tiny[:n], "x.qtm")
    for n in (0, 10, 64, len(tiny) - 1):  # as a real file: an empty one cannot be mapped
        (tmp_path / "cut.qtm").write_bytes(tiny[:n])
        with pytest.raises(FormatError, match=r"cut.qtm: preamble: .*truncated"):
            QtmFile.open(tmp_path / "cut.qtm")


def test_every_flipped_bit_is_found_and_its_section_named(tiny):
    flipped, places = bytearray(tiny), place_of_byte(tiny)
    for i in range(8 * len(tiny)):
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(FormatError) as caught:
            verify_file(QtmFile(bytes(flipped), "x.qtm"))
        assert places[i // 8] in str(caught.value) and "(SPEC " in str(caught.value), (i, caught.value)
        flipped[i // 8] ^= 1 << i % 8


def test_the_first_bad_section_is_named_however_many_threads_hash(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.reader._PIECE_BYTES", 1000)  # a thread's share is a section, read in pieces
    path = tmp_path / "a.qtm"
    with Writer(path) as writer:
        for i in range(40):
            writer.add_tensor(f"t{i}", (2000,), Dense("F16"), bytes(4000))
        writer.finish(**MEMBERS)
    assert verify(path).n_sections == 40
    data = bytearray(path.read_bytes())
    for i in range(30, 12, -1):
        data[256 + 4096 * i + 3999] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match=rf"tensor 't{i}': does not match its SHA-256"):
            verify(path)


def test_no_section_reaches_out_of_the_file(tiny):
    """By 4.2 a section ends where the header begins at the latest; a slice of a view would be shortened in silence."""
    file = QtmFile(tiny, "x.qtm")
    for section in file.header.sections():
        assert len(file.section(section)) == section.n_bytes
    for change in (1, 256, 2**40, -1):
        header = header_of(tiny)
        header["files"][0]["bytes"] += change
        refuses(claim(tiny, header), r"SPEC (4\.[234]|3\.3)")


def test_spec_2_2_magic(tiny):
    refuses(b"GGUF" + tiny[4:], r"x.qtm: preamble: starts with b'GGUF.*not a .qtm file \(SPEC 2.2\)")


@pytest.mark.parametrize("major", [0, 2, 65535])
def test_spec_2_3_another_major_version(tiny, major):
    file = tiny[:8] + struct.pack("<HH", major, 7) + tiny[12:]
    refuses(file, rf"preamble: format version {major}.7: this reader reads 1.x.*\(SPEC 2.3\)")


def test_spec_2_3_a_newer_minor_version_is_read_when_nothing_in_it_is_new(tiny):
    file = QtmFile(claim(tiny, version=(1, 4)), "x.qtm")
    assert file.version == (1, 4)
    assert file.layer("w").bits == 3


def test_spec_2_3_a_newer_minor_version_says_what_is_new(tiny):
    header = header_of(tiny)
    header["tensors"][0]["encoding"] = "ternary"
    message = r"tensor 'w': unknown encoding 'ternary'.*; the file is version 1.4, this reader knows 1.3"
    refuses(claim(tiny, header, version=(1, 4)), message)


def test_spec_2_4_reserved_bytes(tiny):
    refuses(tiny[:12] + b"\1\0\0\0" + tiny[16:], r"preamble: reserved bytes are 01000000.*SPEC 2.4")


@pytest.mark.parametrize(
    ("offset", "n_bytes", "message"),
    [
        (2**40, 100, r"preamble: the header claims bytes 1099511627776 .* the file has \d+.*SPEC 2.5"),
        (2**64 - 1, 1, "SPEC 2.5"),
        (0, 2**64 - 1, "preamble: the header claims 18446744073709551615 bytes: at most 16777216"),
        (256, 4 * 2**30, r"preamble: the header claims 4294967296 bytes: at most 16777216 \(SPEC 2.5\)"),
        (256, MAX_HEADER_BYTES + 1, "at most 16777216"),
        (256, MAX_HEADER_BYTES, "the file has"),
        (0, 0, "SPEC 2.5"),
    ],
)
def test_spec_2_5_the_place_of_the_header(tiny, offset, n_bytes, message):
    refuses(tiny[:16] + struct.pack("<QQ", offset, n_bytes) + tiny[32:], message)


def test_spec_2_5_a_header_of_4_gb_that_is_really_there(tmp_path):
    """A sparse file: it takes no room on the disk."""
    with open(tmp_path / "a.qtm", "wb") as file:
        file.write(build_preamble(256, b"{}")[:16] + struct.pack("<QQ", 256, 2**32))
        file.truncate(256 + 2**32)
    with pytest.raises(FormatError, match=r"preamble: the header claims 4294967296 bytes.*\(SPEC 2.5\)"):
        verify(tmp_path / "a.qtm")


def test_spec_2_5_a_header_inside_the_preamble(tiny):
    refuses(tiny[:16] + struct.pack("<QQ", 63, len(tiny) - 63) + tiny[32:], "preamble: .*SPEC 2.5")


def test_spec_2_5_trailing_bytes(tiny):
    refuses(tiny + b"\0", "preamble: .*something was appended")


def test_spec_2_5_the_writer_keeps_the_limit():
    with pytest.raises(FormatError, match=r"header: .*SPEC 2\.5"):
        build_preamble(256, bytes(MAX_HEADER_BYTES + 1))


def test_spec_2_6_header_hash(tiny):
    refuses(tiny[:-1] + b" ", r"preamble and header do not match their SHA-256: the file is damaged \(SPEC 2.6\)")


@pytest.mark.parametrize("moved", range(-256, 257, 64))
def test_spec_4_2_a_section_must_stand_right_behind_the_one_before(tiny, moved):
    """Overlap, hole, another alignment, out of the file: whatever is not the one place."""
    header = header_of(tiny)
    header["tensors"][0]["offset"] += moved
    if moved:
        refuses(claim(tiny, header), r"header: .*: starts at \d+, must be \d+ \(SPEC 4.2\)")
    else:
        verify_file(QtmFile(claim(tiny, header), "x.qtm"))


def test_spec_4_2_two_sections_may_not_share_bytes(tiny):
    header = header_of(tiny)
    header["tensors"].append(header["tensors"][0] | {"name": "copy"})
    refuses(claim(tiny, header), r"tensor 'copy': starts at \d+, must be \d+ \(SPEC 4.2\)")


def test_spec_4_2_empty_files_share_their_offset(tmp_path):
    """They do not overlap: there is nothing in them."""
    with Writer(tmp_path / "a.qtm") as writer:
        for i in range(3):
            writer.add_file(f"{i}", b"")
        writer.finish(**MEMBERS)
    with QtmFile.open(tmp_path / "a.qtm") as file:
        assert {section.offset_bytes for section in file.header.sections()} == {256}
    verify(tmp_path / "a.qtm")


@pytest.mark.parametrize("at", [64, 255])
def test_spec_4_3_padding_before_the_first_section(tiny, at):
    changed = tiny[:at] + b"\1" + tiny[at + 1 :]
    refuses(changed, r"x.qtm: tensor 'w': the padding before it is not zero \(SPEC 4.3\)")


def test_spec_4_3_padding_before_the_header(tiny):
    offset = header_offset(tiny)
    refuses(tiny[: offset - 1] + b"\1" + tiny[offset:], "header: the padding before it is not zero")


def with_section(path, layer, section: bytes):
    """A file of one layer, whose section a liar has written: the hash is right."""
    with Writer(path) as writer:
        writer.add_tensor("w", layer.codes.shape, encoding_of(layer), section)
        writer.finish(**MEMBERS)
    return path


def f16(value: float) -> bytes:
    return np.array([value], "<f2").tobytes()


SCALES = 128  # where they begin in a 3-bit layer of 3 x 11: behind a plane of 12 bytes and one of 12, both aligned


@pytest.mark.parametrize(
    ("at", "value", "message", "when_decoded"),
    [
        (SCALES, f16(np.nan), r"a scale is NaN or infinite \(SPEC 7.6\)", True),
        (SCALES, f16(-np.inf), r"a scale is NaN or infinite \(SPEC 7.6\)", True),
        (-22, f16(np.nan), r"an input scale is NaN, infinite or not above 0 \(SPEC 7.6\)", True),
        (-2, f16(0), r"an input scale is NaN, infinite or not above 0 \(SPEC 7.6\)", True),
        (-2, f16(-1), "an input scale is NaN, infinite or not above 0", True),
        (60, b"\1", r"bytes before part 'codes.1' are not zero \(SPEC 4.3\)", False),
        (3, b"\xff", r"part 'codes.2': bits behind the last code are not zero \(SPEC 7.4.4\)", False),
    ],
)
def test_spec_7_numbers_that_a_hash_cannot_tell(tmp_path, at, value, message, when_decoded):
    layer = make_layer(scaled=True)
    section = bytearray(pack(layer))
    at %= len(section)
    section[at : at + len(value)] = value
    path = with_section(tmp_path / "a.qtm", layer, bytes(section))
    with pytest.raises(FormatError, match=f"a.qtm: tensor 'w': {message}"):
        verify(path)
    with QtmFile.open(path) as file:
        if when_decoded:
            with pytest.raises(FormatError, match=f"a.qtm: tensor 'w': {message}"):
                file.layer("w")
        else:
            file.layer("w")


@pytest.mark.parametrize("encoding", ["sparse", "ternary", "uniform_permuted", "int8", "UNIFORM", "", None, 1, []])
def test_spec_7_8_what_later_versions_may_bring_is_unknown_to_this_one(tiny, encoding):
    """There are no permutations in this version, so none that could point anywhere."""
    header = header_of(tiny)
    header["tensors"][0]["encoding"] = encoding
    refuses(
        claim(tiny, header),
        r"header: tensor 'w': unknown encoding .*this reader knows affine, codebook, dense, .*, uniform \(SPEC 7\)",
    )


@pytest.mark.parametrize("field", ["perm", "g_idx", "row_ptr", "col_idx", "levels"])
def test_spec_7_8_a_field_of_theirs_is_unknown_too(tiny, field):
    header = header_of(tiny)
    header["tensors"][0][field] = [2**40]
    refuses(claim(tiny, header), rf"header: tensor 'w': unknown field '{field}' \(SPEC 3.5\)")


def test_spec_9_2_a_damaged_section_is_found_when_touched_and_not_before(tmp_path):
    path = tmp_path / "a.qtm"
    with Writer(path) as writer:
        for name in ("good", "bad"):
            writer.add_tensor(name, (2,), Dense("F16"), b"\0\x3c\0\x3c")
        writer.finish(**MEMBERS)
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
