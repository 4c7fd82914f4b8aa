"""What happens to a file that claims another version (SPEC 2.3): in both readers and on the command line."""

import struct

import independent_reader
import numpy as np
import pytest
from both_readers import both_read, claim, header_of
from format_samples import make_layer, write_items
from golden_samples import FIRST, FOLDER, FOURTH, SECOND, THIRD
from independent_reader import Refused
from invoke import refusal, run_qtool
from layer_samples import LAYERS

from formats.errors import FormatError
from formats.layer import AffineLinear, TernaryLinear
from formats.preamble import VERSION
from formats.reader import QtmFile

V1 = FOLDER / "v1.qtm"
BROUGHT_BY = {TernaryLinear: (1, 2), AffineLinear: (1, 3)}


def refusals(data: bytes, path) -> list[str]:
    """What the independent reader, `qtool inspect` and `qtool verify` say, each in one line."""
    path.write_bytes(data)
    with pytest.raises(Refused) as refused:
        independent_reader.read(path)
    return [str(refused.value), refusal("inspect", path), refusal("verify", path)]


def test_spec_2_3_2_every_golden_file_has_the_lowest_version_that_suffices():
    """Also after the next version: what is in these files was in that one already."""
    assert VERSION == independent_reader.VERSION
    for version, names in (((1, 0), FIRST), ((1, 1), SECOND), ((1, 2), THIRD), ((1, 3), FOURTH)):
        for name in names:
            assert independent_reader.read(FOLDER / f"{name}.qtm").version == version, name


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_spec_2_3_2_one_tensor_decides(layer, tmp_path):
    """Whatever a version brought makes the file that version, wherever it stands."""
    write_items(tmp_path / "a.qtm", [make_layer(), layer, b""])
    is_ordered = getattr(layer, "input_order", None) is not None
    assert QtmFile.open(tmp_path / "a.qtm").version == ((1, 3) if is_ordered else BROUGHT_BY.get(type(layer), (1, 1)))
    write_items(tmp_path / "b.qtm", [make_layer(), np.zeros(3, np.float16), b""])
    assert QtmFile.open(tmp_path / "b.qtm").version == (1, 0)


@pytest.mark.parametrize("minor", [1, 65535])
def test_spec_2_3_a_newer_minor_version_with_nothing_new_is_read(minor, tmp_path):
    """The number alone decides nothing (2.3.3)."""
    data = claim(V1.read_bytes(), version=(1, minor))
    assert both_read(data)
    path = tmp_path / "newer.qtm"
    path.write_bytes(data)
    assert independent_reader.read(path).version == (1, minor)
    for command in ("inspect", "verify"):
        assert run_qtool(command, path).exit_code == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda header: header["tensors"][0].update(encoding="ternary"), "ternary"),
        (lambda header: header["tensors"][0].update(permutation=[1, 0]), "permutation"),
        (lambda header: header["tensors"][0].update(bits=1), "bits"),
        (lambda header: header["tensors"][-1].update(dtype="F8"), "F8"),
        (lambda header: header["files"][0].update(compression="zstd"), "compression"),
        (lambda header: header.update(indexes=[]), "indexes"),
    ],
)
def test_spec_2_3_3_a_newer_minor_version_says_what_is_new_and_both_versions(change, named, tmp_path):
    header = header_of(V1.read_bytes())
    change(header)
    for line in refusals(claim(V1.read_bytes(), header, version=(1, 7)), tmp_path / "newer.qtm"):
        assert named in line
        assert "1.7" in line and "1.3" in line


def test_spec_2_3_3_this_version_is_not_blamed_on_a_newer_one():
    header = header_of(V1.read_bytes())
    header["tensors"][0]["encoding"] = "ternary"
    for read, error in [(lambda data: QtmFile(data, "x.qtm"), FormatError), (independent_reader.read_bytes, Refused)]:
        with pytest.raises(error, match="ternary") as refused:
            read(claim(V1.read_bytes(), header))
        assert "version" not in str(refused.value)


@pytest.mark.parametrize("major", [0, 2, 65535])
def test_spec_2_3_4_another_major_version_is_refused_whatever_follows(major, tmp_path):
    good = V1.read_bytes()
    start = good[:8] + struct.pack("<HH", major, 3)
    garbage = [start + good[12:], start + b"\xff" * 52, start + bytes(52), start + b"\xa5" * 5000]
    for data in [*garbage, claim(good, version=(major, 3))]:
        for line in refusals(data, tmp_path / "other.qtm"):
            assert f"version {major}.3" in line
            assert "this reader" in line and "1." in line
            assert "SPEC 2.3" in line


def test_spec_2_3_4_only_length_and_magic_come_before_the_version(tmp_path):
    newer = V1.read_bytes()[:8] + struct.pack("<HH", 2, 0)
    assert all("SPEC 2.1" in line for line in refusals(newer + bytes(51), tmp_path / "short.qtm"))
    assert all("SPEC 2.2" in line for line in refusals(b"GGUF" + newer[4:] + bytes(52), tmp_path / "other.gguf"))
