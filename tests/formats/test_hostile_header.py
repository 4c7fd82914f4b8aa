"""Every "must" of SPEC 3, 5 and 6 broken: headers that lie, and headers that cost. All have the right digest."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from both_readers import claim, header_of
from format_samples import MEMBERS, write_tiny
from test_hostile import refuses

from benchmarks.hostile import ATTACKS, EMPTY, OPEN_AND_VERIFY, with_header, with_members
from formats.encoding import Dense
from formats.errors import FormatError
from formats.header import parse_header
from formats.reader import QtmFile
from formats.strict_json import MAX_ENTRIES, MAX_ENTRY_CHARS, MAX_FREE_CHARS
from formats.writer import Writer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.qtm")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", r"'' where '{' must stand \(SPEC 3.1, 3.3\)"),
        (b"{", r"not JSON, or longer than it may be \(SPEC 3.1, 3.2.1\)"),
        (b'{"model"', r"'' where ':' must stand \(SPEC 3.1"),
        (b'{"model":', "not JSON.*SPEC 3.1"),
        (b'{"model":{', "not JSON.*SPEC 3.1"),
        (b'{"model":{}', r"'' where '}' must stand \(SPEC 3.1"),
        (b'{"model":{},}', "not JSON.*SPEC 3.1"),
        (b'{"model":{} "recipe":{}}', r"'\"' where '}' must stand \(SPEC 3.1"),
        (b'{"tensors":[', "not JSON.*SPEC 3.1"),
        (b'{"tensors":[,]}', "not JSON.*SPEC 3.1"),
        (b'{"tensors":[1 2]}', "tensor entry is 1: must be an object"),
        (b'{"files":[{"name":"a"}', "file 'a': no field"),
        (b"{1:{}}", "a key is 1: must be a string"),
        (b'{"\xff": 1}', r"not UTF-8: invalid start byte \(SPEC 3.1\)"),
        (b'{"model":{}, "x\xe2\x82', r"not UTF-8: .*\(SPEC 3.1\)"),
        (b"\xef\xbb\xbf{}", r"'\\ufeff' where '{' must stand"),
        (b"[]", r"'\[' where '{' must stand \(SPEC 3.1, 3.3\)"),
        (b"{}", "no field 'files'.*SPEC 3.3"),
        (b'{"model": {}, "model": {}}', r"key 'model' stands twice in one object \(SPEC 3.2\)"),
        (b'{"model": {"a": 1, "a": 1}}', r"key 'a' stands twice in one object \(SPEC 3.2\)"),
        (b'{"model": {"a": 1, "\\u0061": 1}}', r"key 'a' stands twice in one object \(SPEC 3.2\)"),
        (b'{"tensors": [{"name": 1, "name": 1}]}', r"key 'name' stands twice in one object \(SPEC 3.2\)"),
        (b'{"model": {"a": NaN}}', r"number NaN is not finite \(SPEC 3.2\)"),
        (b'{"model": {"a": -Infinity}}', "number -Infinity is not finite"),
        (b'{"model": {"a": 1e999}}', "number 1e999 is not finite"),
        (b'{"model": {"a": ' + b"9" * 309 + b"}}", r"number 9{80} is not finite \(SPEC 3.2\)"),
        (b'{"model": {"a": ' + b"9" * 100_000 + b"}}", "number 9{80} is not finite"),
        (b'{"tensors": [' + b"9" * 5000 + b"]}", r"not JSON.*\(SPEC 3.1, 3.2.1\)"),
        (b'{"model": {"a": "\\ud800"}}', r"a string has a lone surrogate \(SPEC 3.2\)"),
        (b'{"model": {"\\udfff": 1}}', "a string has a lone surrogate"),
        (b'{"model": {"a": ' + b"[" * 63 + b"]" * 63 + b"}}", r"nested deeper than 64 levels \(SPEC 3.2\)"),
        (b'{"model": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested deeper than 64 levels"),
        (b'{"a": ' * 10**5 + b"1" + b"}" * 10**5, "unknown field 'a'"),
        (b'{"model":' + b'{"a": ' * 10**4 + b"1" + b"}" * 10**4 + b"}", "nested deeper than 64 levels"),
        (b'{"tensors":[' + b"[" * 5000, r"nested deeper than 64 levels \(SPEC 3.2\)"),
    ],
)
def test_spec_3_json_that_is_refused(header, message):
    refuses(with_header(header), f"x.qtm: header: {message}")


def test_spec_3_1_white_space_and_the_edges_of_what_is_decoded_at_a_time_do_not_matter(tiny):
    """Characters of two to four bytes, and white space in all places, across a window's end."""
    header = header_of(tiny)
    header["model"] = {"é": "😀" * 70_000}
    spaced = json.dumps(header, ensure_ascii=False, indent=3).replace("\n", "\n\t\r " * 200).encode()
    assert len(spaced) > 2**18
    assert QtmFile(claim(tiny, spaced), "x.qtm").header.model == header["model"]


def test_spec_3_1_nothing_may_stand_behind_the_header(tiny):
    raw = json.dumps(header_of(tiny)).encode()
    refuses(claim(tiny, raw + b" {}"), r"header: '{' behind the end of its JSON \(SPEC 3.1\)")
    assert QtmFile(claim(tiny, b" " + raw + b" \n"), "x.qtm").tensors


def test_spec_3_2_nesting_up_to_the_limit_is_read(tiny):
    header = header_of(tiny)
    header["quality"] = {"deep": json.loads("[" * 62 + "]" * 62)}
    assert QtmFile(claim(tiny, header), "x.qtm").header.quality == header["quality"]


def test_spec_3_2_a_pair_of_surrogates_is_a_character():
    model = QtmFile(with_members(model=r'{"\ud83d\ude00": 1}'), "x.qtm").header.model
    assert model == {"😀": 1}


def test_spec_3_2_1_the_four_objects_have_one_allowance():
    def with_free(n: int) -> bytes:
        texts = [f'{{"x":"{" " * (k - 8)}"}}' for k in (n - 3000, 1000, 1000, 1000)]
        return with_members(**dict(zip(("model", "recipe", "provenance", "quality"), texts, strict=True)))

    QtmFile(with_free(MAX_FREE_CHARS), "x.qtm")
    refuses(with_free(MAX_FREE_CHARS + 1), r"header: '{\\?\"x.*has 1000 characters: at most 999 \(SPEC 3.2.1\)")
    refuses(with_free(2 * MAX_FREE_CHARS), r"header: not JSON, or longer than it may be \(SPEC 3.1, 3.2.1\)")


def test_spec_3_2_1_the_longest_entry(tiny):
    def with_entry(n: int) -> bytes:
        first, *others = header_of(tiny)["tensors"]
        entry = json.dumps(first)
        tensors = [entry[:-1] + " " * (n - len(entry)) + "}", *map(json.dumps, others)]
        members = header_of(tiny) | {"tensors": "@"}
        return claim(tiny, json.dumps(members).replace('"@"', f"[{','.join(tensors)}]").encode())

    QtmFile(with_entry(MAX_ENTRY_CHARS), "x.qtm")
    refuses(with_entry(MAX_ENTRY_CHARS + 1), r"header: .*has 16385 characters: at most 16384 \(SPEC 3.2.1\)")


def test_spec_4_1_1_the_largest_number_of_sections():
    entry = '{"name":"#","offset":256,"bytes":0,"sha256":"' + "0" * 64 + '"}'
    entries = [entry.replace("#", str(i)) for i in range(MAX_ENTRIES + 1)]
    file = with_members(files=f"[{','.join(entries[:-1])}]")
    assert len(QtmFile(file, "x.qtm").files) == MAX_ENTRIES
    refuses(with_members(files=f"[{','.join(entries)}]"), r"header: more than 16384 sections \(SPEC 4.1.1\)")


def test_the_writer_keeps_the_limits(tmp_path):
    with Writer(tmp_path / "a.qtm") as writer:
        writer.add_tensor("w", (1,), Dense("F16"), bytes(2))
        with pytest.raises(FormatError, match=r"header: .*has 524296 characters: at most \d+ \(SPEC 3.2.1\)"):
            writer.finish(**MEMBERS | {"quality": {"x": "x" * MAX_FREE_CHARS}})


def test_headers_that_cost_are_refused_in_little_memory(tmp_path):
    """Of a whole process with numpy in it. `python -m benchmarks.hostile` says how much, and how long each takes."""
    paths = [tmp_path / f"{i}.qtm" for i in range(len(ATTACKS))]
    for path, attack in zip(paths, ATTACKS.values(), strict=True):
        path.write_bytes(attack())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (200_000_000, 200_000_000))

    command = [sys.executable, "-c", OPEN_AND_VERIFY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=True, cwd=ROOT)
    for name, path, line in zip(ATTACKS, paths, done.stdout.splitlines(), strict=True):
        refusal = line.split(" ", 2)[2]
        assert refusal.startswith(f"FormatError: {path}: header: ") and "(SPEC " in refusal, name


def test_a_header_without_members_is_a_file(tiny):
    """What the attacks are made of: without one, it is read."""
    raw = f"{{{','.join(f'{json.dumps(name)}:{value}' for name, value in EMPTY.items())}}}".encode()
    assert parse_header(raw, 256).sections() == []


def tensor(**changes):
    return lambda tree: tree["tensors"][0].update(changes)


def embedded(**changes):
    return lambda tree: tree["files"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("recipe"), "header: no field 'recipe'.*SPEC 3.3"),
        (lambda tree: tree.update(extra=1), "header: unknown field 'extra'.*SPEC 3.5"),
        (lambda tree: tree.update(model=[]), "header: model is .*must be an object.*SPEC 3.3"),
        (lambda tree: tree.update(tensors={}), "header: tensors must be a list.*SPEC 3.3"),
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
        (lambda tree: tree["tensors"][0].pop("sha256"), "tensor 'w': no field 'sha256' .*SPEC 3.3"),
        (tensor(perm=[0]), r"tensor 'w': unknown field 'perm' \(SPEC 3.5\)"),
        (tensor(dtype="F16"), "tensor 'w': unknown field 'dtype'"),
        (tensor(encoding="ternary"), "tensor 'w': unknown encoding 'ternary'; this reader knows affine, codebook"),
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
        (tensor(shape=[1] * 4000), r"tensor 'w': shape \[1, 1.{70,80}\.\.\.: at most"),
        (tensor(**{"x" * 10**4: 1}), r"unknown field 'x{70,80}\.\.\. \(SPEC 3.5\)"),
        (tensor(shape="3"), "must be a list"),
        (tensor(offset=512), r"starts at \d+, must be \d+ \(SPEC 4.2\)"),
        (tensor(offset=-256), "offset is -256: must be an integer"),
        (tensor(offset=2**63), "offset is 9223372036854775808"),
        (tensor(bytes=2**40), "SPEC 5.4"),
        (tensor(sha256="0" * 64), "tensor 'w': does not match its SHA-256: damaged.*SPEC 4.4"),
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
        (embedded(extra=1), "file 't.json': unknown field 'extra'"),
        (embedded(bytes=3), "does not match its SHA-256"),
        (embedded(bytes=2**62), "SPEC 4.2"),
        *[
            (embedded(name=name), r"file .*: must be a plain file name without a folder \(SPEC 6.2\)")
            for name in ("", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "a\0", "a\n", "é" * 128)
        ],
    ],
)
def test_a_header_that_lies_is_refused(tiny, change, message):
    header = header_of(tiny)
    change(header)
    refuses(claim(tiny, header), f"x.qtm: .*{message}")
