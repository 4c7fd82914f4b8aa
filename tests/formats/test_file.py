import errno
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from format_samples import MEMBERS, make_layer, same_layer, write_items, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import formats.writer
from formats.encoding import Dense, encoding_of
from formats.errors import FormatError
from formats.reader import QtmFile, verify
from formats.section import pack
from formats.writer import Writer

F16 = Dense("F16")


def test_spec_8_1_the_same_input_gives_the_same_bytes(tmp_path):
    assert write_tiny(tmp_path / "a.qtm") == write_tiny(tmp_path / "another-name.qtm")


def test_spec_8_1_the_order_of_keys_does_not_matter(tmp_path):
    for name, recipe in {"a": {"x": 1, "y": 2}, "b": {"y": 2, "x": 1}}.items():
        with Writer(tmp_path / name) as writer:
            writer.finish(model={}, recipe=recipe, provenance={}, quality={})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_spec_4_2_an_empty_file_is_a_preamble_and_a_header(tmp_path):
    with Writer(tmp_path / "a.qtm") as writer:
        writer.finish(model={}, recipe={}, provenance={}, quality={})
    report = verify(tmp_path / "a.qtm")
    assert report.n_sections == 0
    assert report.n_bytes == (tmp_path / "a.qtm").stat().st_size == writer.bytes_written


layers = st.builds(
    lambda rows, n, bits, group, symmetric, scaled: make_layer(rows, n, bits, min(group, n), symmetric, scaled),
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(2, 8),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(content=st.lists(st.one_of(layers, st.binary(max_size=600)), max_size=5))
def test_round_trip_of_any_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "a.qtm"
    write_items(path, content)
    verify(path)
    with QtmFile.open(path) as file:
        for i, item in enumerate(content):
            if isinstance(item, bytes):
                assert file.read_file(f"{i}") == item
            else:
                assert same_layer(file.layer(f"{i}"), item)


def test_streamed_rows_give_the_same_bytes(tmp_path):
    values = np.arange(400, dtype=np.float16).reshape(20, 20)
    for name, data in {"whole": values, "rows": (row for row in values)}.items():
        with Writer(tmp_path / name) as writer:
            writer.add_tensor("embed", (20, 20), F16, data)
            writer.finish(**MEMBERS)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "rows").read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(3), "tensor 'w': data has 3 bytes, its shape takes 4"),
        (bytes(5), "tensor 'w': data has more than the 4 bytes of its shape"),
        ([bytes(4), bytes(1)], "more than the 4 bytes"),
        ([], "data has 0 bytes"),
    ],
)
def test_spec_5_4_data_must_have_the_bytes_of_its_shape(tmp_path, data, message):
    """A section that failed leaves no trace, so a writer may go on."""
    with Writer(tmp_path / "a.qtm") as writer:
        with pytest.raises(FormatError, match=message):
            writer.add_tensor("w", (2,), F16, data)
        writer.add_tensor("w", (2,), F16, b"\1\2\3\4")
        writer.finish(**MEMBERS)
    verify(tmp_path / "a.qtm")


def test_an_array_that_is_not_contiguous_is_refused(tmp_path):
    with Writer(tmp_path / "a.qtm") as writer, pytest.raises(TypeError):
        writer.add_tensor("w", (2, 2), F16, np.zeros((2, 4), np.float16)[:, ::2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.add_tensor("", (1,), F16, bytes(2)), "SPEC 5.2"),
        (lambda w: w.add_tensor("norm", (1,), F16, bytes(2)), "tensor 'norm': the name stands twice"),
        (lambda w: w.add_tensor("a", (0,), F16, b""), r"shape \[0\].*SPEC 5.3"),
        (lambda w: w.add_tensor("a", (1,) * 9, F16, bytes(2)), "at most 8 sizes"),
        (lambda w: w.add_tensor("a", (1,), F16, bytes(2), relative_error=float("nan")), "SPEC 5.5"),
        (lambda w: w.add_tensor("a", (1,), F16, bytes(2), transposed=True), "only a matrix"),
        (lambda w: w.add_file("../a", b""), r"file '../a': must be a plain file name.*SPEC 6.2"),
        (lambda w: w.add_file("f", b""), "file 'f': the name stands twice"),
        (lambda w: w.finish(**MEMBERS | {"quality": {"x": float("nan")}}), "cannot be written as JSON"),
        (lambda w: w.finish(**MEMBERS | {"quality": {"x": object()}}), "cannot be written as JSON"),
        (lambda w: w.finish(**MEMBERS | {"quality": {1: "a", "1": "b"}}), "JSON|stands twice"),
        (lambda w: w.finish(**MEMBERS | {"quality": []}), "quality is .*must be an object"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(tmp_path, call, message):
    with Writer(tmp_path / "a.qtm") as writer:
        writer.add_tensor("norm", (1,), F16, bytes(2))
        writer.add_file("f", b"")
        with pytest.raises(FormatError, match=message):
            call(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_spec_8_2_an_interrupted_write_leaves_nothing(tmp_path, error):
    def pieces():
        yield b"\1\2"
        raise error

    with pytest.raises(error), Writer(tmp_path / "a.qtm") as writer:
        writer.add_tensor("w", (2,), F16, pieces())
    assert list(tmp_path.iterdir()) == []


def test_spec_8_2_leaving_without_finish_leaves_nothing(tmp_path):
    with Writer(tmp_path / "a.qtm") as writer:
        writer.add_file("f", b"abc")
        assert [path.name.startswith(".a.qtm.part-") for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_spec_8_2_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats.writer.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_tiny(tmp_path / "a.qtm")
    assert list(tmp_path.iterdir()) == []


def test_spec_8_3_an_existing_target_is_left_alone(tmp_path):
    path = tmp_path / "a.qtm"
    path.write_bytes(b"mine")
    with pytest.raises(FormatError, match=r"exists already; nothing was written \(SPEC 8.3\)"):
        write_tiny(path)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_spec_8_3_a_target_that_appears_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "a.qtm"
    with pytest.raises(FormatError, match="it was left as it is"), Writer(path) as writer:
        path.write_bytes(b"mine")
        writer.finish(**MEMBERS)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_spec_8_3_a_file_system_without_links_works(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(formats.writer.os, "link", no_links)
    write_tiny(tmp_path / "a.qtm")
    verify(tmp_path / "a.qtm")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.qtm"]


def test_overwrite_keeps_the_old_file_for_who_has_it_open(tmp_path):
    path = tmp_path / "a.qtm"
    write_tiny(path)
    with QtmFile.open(path) as old:
        with Writer(path, overwrite=True) as writer:
            writer.finish(**MEMBERS)
        assert old.read_file("t.json") == b"{}"
    with QtmFile.open(path) as new:
        assert new.tensors == {}


def test_a_writer_is_used_once(tmp_path):
    writer = Writer(tmp_path / "a.qtm")
    with pytest.raises(FormatError, match="not open"):
        writer.add_file("f", b"")
    with writer:
        writer.finish(**MEMBERS)
        with pytest.raises(FormatError, match="not open"):
            writer.finish(**MEMBERS)


def test_views_outlive_the_file(tmp_path):
    write_tiny(tmp_path / "a.qtm")
    with QtmFile.open(tmp_path / "a.qtm") as file:
        section = file.section(file.files["t.json"])
        array = np.frombuffer(section, np.uint8)
        layer = file.layer("w")
        file.drop_pages()
    assert bytes(section) == array.tobytes() == b"{}"
    assert same_layer(layer, make_layer())
    with pytest.raises(ValueError, match="released"):
        file.read_file("t.json")


def test_asking_for_what_is_not_there(tmp_path):
    write_tiny(tmp_path / "a.qtm")
    with QtmFile.open(tmp_path / "a.qtm") as file:
        for call, message in [
            (lambda: file.layer("v"), "no tensor 'v'"),
            (lambda: file.read_file("v"), "no file 'v'"),
            (lambda: file.layer("norm"), "tensor 'norm' is dense, not a quantized matrix"),
            (lambda: file.dense("w"), "tensor 'w' is uniform, not dense"),
        ]:
            with pytest.raises(FormatError, match=message):
                call()


def test_a_large_file_opens_fast(tmp_path):
    """64 blocks of 9 tensors: opening reads the header only. Best of three, for a busy machine."""
    layer = make_layer(8, 64, 4, 32)
    section = pack(layer)
    with Writer(tmp_path / "a.qtm") as writer:
        for i in range(64 * 9):
            writer.add_tensor(f"model.layers.{i // 9}.{i % 9}", (8, 64), encoding_of(layer), section)
        writer.finish(**MEMBERS)
    elapsed_s = []
    for _ in range(3):
        start = time.perf_counter()
        with QtmFile.open(tmp_path / "a.qtm") as file:
            assert len(file.tensors) == 576
        elapsed_s.append(time.perf_counter() - start)
    assert min(elapsed_s) < 0.1


def test_reading_needs_no_torch():
    code = "import formats.reader, formats.writer, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
