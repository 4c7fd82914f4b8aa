"""`qtool inspect --report`: the page says what the file holds, adds up, and stays harmless whatever the file says."""

import json
import math

import pytest
from invoke import python, qtool_json, refusal, run_qtool
from page_tools import cells, check_policy, of_class, parse, svgs, tables, words

from formats.encoding import Dense, Uniform
from formats.reader import QtmFile
from formats.writer import Writer
from qtool.pictures.breakdown import size_by_part
from qtool.pictures.depth import by_depth

BITS, ERRORS = "Bits per weight by kind of layer and depth", "Relative error by kind of layer and depth"
KINDS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
FREE = {"model": {"blocks": "b"}, "recipe": {"linears": {"method": "rtn"}}, "provenance": {}, "quality": {}}


def page_of(file, tmp_path, *options):
    result = run_qtool("inspect", file, "--report", tmp_path / "page.html", *options)
    assert result.exit_code == 0, result.output
    tree = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    check_policy(tree)
    return tree


def write(path, tensors, **free):
    """A file of zeros: name -> (shape, encoding, relative error)."""
    with Writer(path) as writer:
        for name, (shape, encoding, error) in tensors.items():
            data = bytes(encoding.section_bytes(shape))
            writer.add_tensor(name, shape, encoding, data, relative_error=error)
        writer.finish(**(FREE | free))
    return path


# ---- what the page says


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_page_says_what_inspect_says(tiny_files, tmp_path, family):
    file = tiny_files.compressed(family)
    tree, found = page_of(file, tmp_path), qtool_json("inspect", file)
    text = words(tree)
    assert words(next(tree.iter("h1"))) == file.name
    for said in (f"{found['parameters']:,} parameters", f"{found['bits_per_weight']:.3f}", "text.txt, 4 windows"):
        assert said in text
    assert f"mean relative error {found['quality']['mean_relative_error']:.6g} " in text
    listed = cells(tables(tree)["name"])
    assert [row[0] for row in listed] == [t["name"] for t in found["tensors"]]
    assert [row[5] for row in listed] == [f"{t['bytes']:,}" for t in found["tensors"]]
    assert "No layer of this file holds outliers" in text
    assert "No perplexity is in the file" in text


def test_heat_maps_by_kind_and_depth(tiny_files, tmp_path):
    file = tiny_files.compressed("llama")
    pictures = svgs(page_of(file, tmp_path))
    linears = [t for t in qtool_json("inspect", file)["tensors"] if t["relative_error"] is not None]
    assert len(linears) == 21
    for title, value in ((BITS, "{bits:.3f} bits"), (ERRORS, "error {relative_error:.2e}")):
        drawn = {words(node): node for node in of_class(pictures[title], "shade") if len(node)}
        for t in linears:
            t = t | {"bits": 8 * t["bytes"] / math.prod(t["shape"])}
            node = drawn.pop(f"{t['name']}: {value.format(**t)}")
            block, kind = t["name"].removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            assert float(node.get("y")) == 24 * KINDS.index(kind)
            assert float(node.get("x")) == pytest.approx(float(drawn_left(pictures[title])) + 30 * int(block))
        assert not drawn


def drawn_left(svg):
    return min(float(node.get("x")) for node in of_class(svg, "shade"))


def test_the_table_of_kinds(tiny_files, tmp_path):
    file = tiny_files.compressed("llama")
    rows = {row[0]: row for row in cells(tables(page_of(file, tmp_path))["kind"])}
    assert list(rows) == KINDS
    errors = {
        t["name"].split(".")[2]: t["relative_error"]
        for t in qtool_json("inspect", file)["tensors"]
        if "down_proj" in t["name"]
    }
    worst = max(errors, key=errors.get)
    assert rows["mlp.down_proj"][1] == "3"
    assert rows["mlp.down_proj"][3] == f"{sum(errors.values()) / 3:.2e}"
    assert rows["mlp.down_proj"][4] == f"{errors[worst]:.2e} in block {worst}"


def test_experts_of_a_block_share_a_cell(tmp_path):
    encoding = Uniform(bits=4, group_size=8, symmetric=True)
    tensors = {f"b.{block}.experts.{i}.up.weight": ((4, 8), encoding, i / 10) for block in (0, 10, 2) for i in (1, 3)}
    with QtmFile.open(write(tmp_path / "a.qtm", tensors)) as file:
        depth = by_depth(file.header)
    assert (depth.kinds, depth.blocks) == (["experts.*.up"], ["0", "2", "10"])
    tree = page_of(tmp_path / "a.qtm", tmp_path)
    titles = [words(node) for node in of_class(svgs(tree)[ERRORS], "shade") if len(node)]
    assert titles[0] == "b.0.experts.1.up.weight and 1 like it: error 2.00e-01"


@pytest.mark.parametrize(("errors", "most_apart"), [((0.010, 0.012), 2), ((1e-4, 1e-2), 20)])
def test_errors_that_are_nearly_equal_look_so(tmp_path, errors, most_apart):
    tensors = {f"b.{i}.q.weight": ((4, 8), Dense("F16"), error) for i, error in enumerate(errors)}
    picture = svgs(page_of(write(tmp_path / "a.qtm", tensors), tmp_path))[ERRORS]
    low, high = (int(node.get("class").removeprefix("shade")) for node in of_class(picture, "shade") if len(node))
    assert most_apart / 2 <= high - low <= most_apart


def test_a_part_has_one_colour_in_every_page(tiny_files, tmp_path):
    colours = []
    for file in (tiny_files.compressed("llama"), tiny_files.compressed("llama", "--method", "rtn")):
        bar = svgs(page_of(file, tmp_path, "--force"))["Size of the file by part"]
        colours.append({words(node).split(":")[0]: node.get("class") for node in of_class(bar, "part")})
    gptq, rtn = colours
    assert gptq.keys() - rtn.keys() == {"input scales"}
    assert all(rtn[name] == gptq[name] for name in rtn)
    assert len(set(gptq.values())) == len(gptq)


def test_a_file_without_errors_or_blocks_has_a_page(tmp_path):
    tensors = {"b.0.q.weight": ((4, 8), Dense("F16"), None), "b.0.k.weight": ((4, 8), Dense("F16"), 0.0)}
    tree = page_of(write(tmp_path / "a.qtm", tensors), tmp_path)
    assert {BITS, ERRORS} <= svgs(tree).keys()  # an error of zero has a place too
    only = {"b.0.q.weight": tensors["b.0.q.weight"]}
    assert "No error was recorded." in words(page_of(write(tmp_path / "b.qtm", only), tmp_path, "--force"))
    empty = words(page_of(write(tmp_path / "c.qtm", {}), tmp_path, "--force"))
    assert "The file names no blocks with linear layers in them." in empty
    assert empty.endswith(
        "How it was made recipe linears method rtn Every tensor 0 tensors, as they are stored name "
        "shape encoding bits group bytes relative error"
    )


def test_recorded_figures_are_shown_whatever_their_name(tmp_path):
    quality = {"mean_relative_error": 0.25, "perplexity": 12.5, "by": {"text": "wiki", "windows": 3}}
    text = words(page_of(write(tmp_path / "a.qtm", {}, quality=quality), tmp_path))
    for said in ("perplexity 12.5", "by text wiki", "by windows 3"):
        assert said in text
    assert "No perplexity" not in text


# ---- sizes


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", [(), ("--bits", "3", "--sym", "--embeddings", "16")])
def test_parts_add_up_to_the_file(tiny_files, tmp_path, family, options):
    file = tiny_files.compressed(family, *options)
    with QtmFile.open(file) as opened:
        sizes = size_by_part(opened)
    assert sum(sizes.values()) == file.stat().st_size
    assert all(n > 0 for n in sizes.values())
    rows = cells(tables(page_of(file, tmp_path))["part"])
    assert [(name, n) for name, n, *_ in rows] == [
        *((name, f"{n:,}") for name, n in sizes.items()),
        ("the file", f"{file.stat().st_size:,}"),
    ]


def test_sizes_by_hand(tmp_path):
    """3 bits: planes of 2 and 1 bit. A section's parts start at multiples of 64 bytes, sections at those of 256."""
    encoding = Uniform(bits=3, group_size=16, symmetric=False, input_scales=True)
    tensors = {
        "b.0.q.weight": ((4, 32), encoding, 0.5),
        "b.0.norm.weight": ((32,), Dense("F32"), None),
        "embed.weight": ((8, 32), Dense("F16"), None),
    }
    path = write(tmp_path / "a.qtm", tensors)
    with QtmFile.open(path) as file:
        sizes, header = size_by_part(file), file.n_bytes - 1536
    codes, scales, zeros, inputs = 4 * 8 + 4 * 4, 4 * 2 * 2, 4 + 4, 2 * 32
    in_section, section = 64 * 5 + inputs - (codes + scales + zeros + inputs), 64 * 5 + inputs
    assert sizes == {
        "codes": codes,
        "scales": scales,
        "zeros": zeros,
        "input scales": inputs,
        "embeddings, head": 512,
        "norms and others left dense": 128,
        "padding": in_section + (256 - 64) + (512 - section) + (256 - 128),
        "header": 64 + header,
    }


def test_the_bar_is_as_long_as_its_parts(tiny_files, tmp_path):
    bar = svgs(page_of(tiny_files.compressed("llama"), tmp_path))["Size of the file by part"]
    segments = of_class(bar, "part")
    ends = [float(s.get("x")) + float(s.get("width")) for s in segments]
    assert all(end <= float(other.get("x")) for end, other in zip(ends, segments[1:], strict=False))
    assert ends[-1] == pytest.approx(960, abs=1.6)


# ---- hostile files


HOSTILE = "<script>alert('x')</script>\"&'</title></style>"


def test_names_cannot_become_markup(tmp_path):
    encoding = Uniform(bits=4, group_size=8, symmetric=True)
    free = {
        "model": {"blocks": "b", "model_type": HOSTILE},
        "recipe": {"linears": {"method": HOSTILE}, HOSTILE: HOSTILE},
        "provenance": {HOSTILE: [HOSTILE], "shown": "\x1b[31m\x00\u202e"},
        "quality": {"harder_damped": {HOSTILE: 1}, HOSTILE: {"x\x7f": HOSTILE}},
    }
    tensors = {
        f"b.0.{HOSTILE}.weight": ((4, 8), encoding, 1e308),
        f"b.{'9' * 900}.x.weight": ((4, 8), encoding, 5e-324),
        HOSTILE: ((4, 8), encoding, None),
    }
    file = write(tmp_path / "a.qtm", tensors, **free)
    tree = page_of(file, tmp_path)  # the parser there refuses every element that is not the page's own
    assert words(tree).count("<script>alert('x')</script>") >= 8
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in raw
    assert not any(char in raw for char in "\x00\x1b\x7f\u202e")
    assert "\ufffd[31m\ufffd\ufffd" in words(tree)


def test_a_file_name_cannot_become_markup(tmp_path):
    file = write(tmp_path / "<script>alert(1)<&quot;.qtm", {})
    assert words(next(page_of(file, tmp_path).iter("h1"))) == file.name


@pytest.mark.parametrize("free", [{"recipe": {"linears": []}}, {"quality": {"mean_relative_error": "low"}}])
def test_free_objects_of_another_kind_give_one_line(tmp_path, free):
    file = write(tmp_path / "a.qtm", {}, **free)
    message = refusal("inspect", file, "--report", tmp_path / "page.html")
    assert message.startswith("header: recipe or quality are not as qtool writes them")
    assert not (tmp_path / "page.html").exists()


# ---- the command


def test_report_json_and_text_name_the_page(tiny_files, tmp_path):
    page = tmp_path / "page.html"
    assert qtool_json("inspect", tiny_files.compressed("llama"), "--report", page)["report"] == str(page)
    result = run_qtool("inspect", tiny_files.compressed("llama"), "--report", page, "--force")
    assert result.stdout.splitlines()[-1] == f"report           {page}"
    assert "report" not in qtool_json("inspect", tiny_files.compressed("llama"))


def test_the_same_file_gives_the_same_page(tiny_files, tmp_path):
    pages = []
    for _ in range(2):
        page_of(tiny_files.compressed("llama"), tmp_path, "--force")
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_layer_that_holds_no_outliers(tiny_files, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    assert f"{name} holds no outliers." in words(page_of(tiny_files.compressed("llama"), tmp_path, "--layer", name))


def test_options_that_make_no_sense(tiny_files, tmp_path):
    file, page = tiny_files.compressed("llama"), tmp_path / "page.html"
    assert refusal("inspect", file, "--layer", "x") == (
        "--layer x: chooses what --report shows; give --report OUT.html too"
    )
    assert refusal("inspect", file, "--report", page, "--layer", "x") == (
        f"--layer x: no such tensor in {file}; qtool inspect FILE --tensors lists them"
    )
    assert refusal("inspect", file, "--report", file, "--force") == (
        f"--report {file}: the name must end in .html or .htm"
    )
    missing = tmp_path / "nowhere" / "page.html"
    assert refusal("inspect", file, "--report", missing) == f"{missing}: its folder does not exist; make it first"
    folder = tmp_path / "folder.html"
    folder.mkdir()
    assert refusal("inspect", file, "--report", folder, "--force") == f"{folder}: is a folder; give the name of a file"
    page.write_text("mine")
    assert refusal("inspect", file, "--report", page) == f"{page}: exists already; give another --report or --force"
    assert refusal("inspect", page, "--report", page, "--force").startswith(f"{page}: preamble: ")
    assert page.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "page.html"]


def test_a_full_disk_leaves_what_was_there(tiny_files, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from qtool.cli import main; main(sys.argv[1:])"
    )
    done = python("-c", code, "inspect", tiny_files.compressed("llama"), "--report", page, "--force")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {page}: File too large; nothing was left behind, make room and run again\n"
    assert page.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_needs_no_torch(tiny_files, tmp_path):
    code = (
        "import sys; from qtool.cli import main;"
        "main(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = python("-c", code, "inspect", tiny_files.compressed("llama"), "--report", tmp_path / "page.html", "--json")
    assert done.stdout.splitlines()[-1] == "False"
    assert json.loads(done.stdout.rpartition("\n}\n")[0] + "}")["model_type"] == "llama"
