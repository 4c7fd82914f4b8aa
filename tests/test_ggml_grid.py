"""llama.cpp's block types solved by GPTQ: grids decode as ggml does, and a GGUF file holds them as they are."""

import numpy as np
import pytest
import torch
from correlated import make_layer as correlated_layer
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke import qtool_json, refusal
from tiny import make_model

from formats.encoding import encoding_of
from formats.ggml.exact import exact
from formats.reader import QtmFile
from formats.tensors import decode_tensor
from qtool.errors import ConfigError
from qtool.factor import factorize
from qtool.fit import fit_grid, planned_encoding
from qtool.ggml_grid import kind_of
from qtool.gptq import gptq_quantize, rtn_quantize
from qtool.recipe import GGML, QuantSpec

TYPES = [(name, bits) for name, widths in GGML.items() for bits in widths]
SIZES = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 2}
"""Rows of 288 are no super-blocks: down_proj falls back."""
KINDS = {
    "q4_0": "Q4_0",
    "q5_0": "Q5_0",
    "q8_0": "Q8_0",
    "q4_1": "Q4_1",
    "q5_1": "Q5_1",
    "q2_k": "Q2_K",
    "q3_k": "Q3_K",
    "q4_k": "Q4_K",
    "q5_k": "Q5_K",
    "q6_k": "Q6_K",
}
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def weight_of(rows, inputs, seed=0):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(("name", "bits"), TYPES)
def test_a_grid_s_own_values_are_their_own_nearest(name, bits):
    """Codes of every value, and what the file decodes them to; also by rows and one column after the other."""
    spec = QuantSpec(format=name, bits=bits)
    grid = fit_grid(weight_of(5, 512), spec)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (5, 512)).astype(np.uint8)
    layer = grid.layer(codes, spec.groups_of(512), None, None)
    values = torch.from_numpy(layer.dequantize())
    groups = torch.arange(512) // spec.groups_of(512)
    found, decoded = grid.quantize(values.T.contiguous(), groups)
    assert torch.equal(decoded.T, values)
    steps = grid.scales[groups].T != 0  # where all codes mean the same, any will do
    assert torch.equal(found.T[steps], torch.from_numpy(codes).float()[steps])
    part, _ = grid.rows(slice(2, 4)).quantize(values[2:4, 7].contiguous(), int(groups[7]))
    assert torch.equal(part, found[7, 2:4])


@pytest.mark.parametrize(("name", "bits"), TYPES)
def test_the_solver_beats_rounding_and_its_layer_is_a_block_type(name, bits):
    weight, stats = correlated_layer(48, 512)
    spec = QuantSpec(format=name, bits=bits)
    solved = gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)
    rounded = rtn_quantize(weight, QuantSpec(method="rtn", format=name, bits=bits), stats)
    assert solved.relative_error < 0.75 * rounded.relative_error
    assert torch.equal(torch.from_numpy(solved.layer.dequantize()), solved.decoded)
    assert encoding_of(solved.layer) == planned_encoding(spec, (48, 512))
    blocks = exact(solved.layer)
    assert blocks.kind == kind_of(spec, 512) == f"Q{bits}_{name[-1].upper()}"
    assert np.array_equal(blocks.values(), solved.layer.dequantize())


@given(st.sampled_from(TYPES), st.integers(1, 9), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_rows_of_any_number_of_blocks(kind, rows, n_blocks, seed):
    """Super-blocks where they are whole, what llama.cpp falls back to where they are not; ggml decodes the same."""
    name, bits = kind
    weight, spec = weight_of(rows, 32 * n_blocks, seed), QuantSpec(method="rtn", format=name, bits=bits)
    weight[0, ::3] = 0
    layer = rtn_quantize(weight, spec).layer
    blocks = exact(layer)
    assert np.array_equal(blocks.values(), layer.dequantize())
    theirs = dequantize(blocks.pack(), GGMLQuantizationType[blocks.kind])
    assert np.array_equal(theirs.reshape(layer.shape), layer.dequantize())


def test_rows_that_are_no_blocks():
    with pytest.raises(ConfigError, match=r"^--format q_k: rows of 100 are no whole blocks of 32; leave it dense by"):
        kind_of(QuantSpec(format="q_k"), 100)
    assert kind_of(QuantSpec(format="q_k", bits=6), 96) == "Q8_0"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("wide") / "model", sizes=SIZES)


def small(tiny_files):
    return "--samples", "4", "--seq-len", "64", "--calibration", tiny_files.text


def types_in(path):
    """GGUF name of each linear of a block -> its type."""
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors if "blk" in t.name and len(t.shape) > 1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compressed_for_a_type_is_exported_as_it_is(tiny_files, wide, kind, tmp_path):
    file, gguf = tmp_path / "out.qtm", tmp_path / "out.gguf"
    qtool_json("compress", wide, "-o", file, "--for", f"gguf:{kind}", *small(tiny_files))
    assert qtool_json("export", file, "--to", "gguf", "-o", gguf)["losses"] == []
    wanted = KINDS[kind]
    for name, found in types_in(gguf).items():
        assert found == (FALLBACKS.get(wanted, wanted) if "ffn_down" in name else wanted), name
    qtool_json("import", gguf, "-o", tmp_path / "back.qtm")
    with QtmFile.open(file) as one, QtmFile.open(tmp_path / "back.qtm") as other:
        for name in one.tensors:
            a, b = (decode_tensor(opened, opened.tensors[name]) for opened in (one, other))
            assert torch.equal(a, b), name


def test_a_target_mixes_the_k_types(tiny_files, wide, tmp_path):
    file, gguf = tmp_path / "out.qtm", tmp_path / "out.gguf"
    found = qtool_json(
        "compress", wide, "-o", file, "--for", "gguf:q4_k", "--target-bits", "4.7", *small(tiny_files)
    )  # fmt: skip
    assert 4.3 < found["bits_per_weight"] <= 4.7
    assert qtool_json("export", file, "--to", "gguf", "-o", gguf)["losses"] == []
    kinds = set(types_in(gguf).values())
    assert len(kinds) > 1 and kinds <= {*KINDS.values(), *FALLBACKS.values()}


def test_layers_may_have_other_bits(tiny_files, wide, tmp_path):
    file = tmp_path / "out.qtm"
    qtool_json("compress", wide, "-o", file, "--format", "q_k", "--layer", "v_proj=6", "--method", "rtn")
    with QtmFile.open(file) as opened:
        bits = {name: e.encoding.bits for name, e in opened.tensors.items() if name.endswith("_proj.weight")}
    assert {bits["model.layers.0.self_attn.v_proj.weight"], bits["model.layers.0.self_attn.q_proj.weight"]} == {4, 6}
    report = qtool_json("export", file, "--to", "awq", "--lossy", "-o", tmp_path / "awq")
    assert {loss["reason"] for loss in report["losses"]} >= {"weights stored as affine"}
    message = refusal("compress", wide, "-o", tmp_path / "x.qtm", "--for", "gguf:q4_k", "--layer", "v_proj=8")
    assert message == "--for gguf:q4_k: bits must be 2, 3, 4, 5 or 6, --layer v_proj=8 is something else"


def test_a_layer_that_has_no_blocks_is_named(tmp_path):
    model = make_model("llama", tmp_path / "model", sizes={"hidden_size": 64, "intermediate_size": 50})
    message = refusal("compress", model, "-o", tmp_path / "x.qtm", "--format", "q_k")
    assert message == (
        "model.layers.0.mlp.down_proj.weight: --format q_k: rows of 50 are no whole blocks of 32; "
        "leave it dense by --ignore"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--group-size", "64"), "--group-size 64: q_k has the blocks of llama.cpp and nothing beside them"),
        (("--input-scales",), "--input-scales: q_k has the blocks of llama.cpp and nothing beside them"),
        (("--sym",), "--sym: q_k has no zeros; give --format int, or leave it out"),
        (
            ("--outliers", "1%"),
            "--outliers: q_k has the blocks of llama.cpp and nothing beside them",
        ),
        (("--method", "spqr"), "--method spqr: q_k has the blocks of llama.cpp and nothing beside them"),
        (("--bits", "8"), "bits=8: must be 2 to 6 for q_k"),
        (("--method", "int8"), "--format q_k: --method int8 has 8 bits in rows; leave it out"),
    ],
)
def test_options_that_do_not_go(tiny_files, options, said, tmp_path):
    message = refusal("compress", tiny_files.model("llama"), "-o", tmp_path / "x.qtm", "--format", "q_k", *options)
    assert message == said
