"""A quantized GGUF file comes in with the numbers that are in it, and goes out again as the same."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quants
from invoke import run_qtool
from tiny import make_model, silence
from tiny_gguf import write_gguf

from formats.encoding import Affine, Codebook, Dense, Uniform
from formats.errors import FormatError
from formats.export.gguf import export_gguf
from formats.ggml.exact import exact
from formats.ggml.fit import fit
from formats.ggml.layers import layer_of
from formats.layer import AffineLinear, CodebookLinear, QuantizedLinear
from formats.reader import QtmFile
from formats.section import pack
from formats.section import unpack as unpack_section
from formats.skeleton import build_skeleton
from qtool.errors import CheckpointError
from qtool.import_gguf import open_gguf

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"]
BLOCK_TYPES += ["TQ1_0", "TQ2_0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    silence()
    return make_model("llama", tmp_path_factory.mktemp("import") / "llama", sizes=SIZES)


def some_rows(kind, n_rows, n_inputs, seed=0):
    """Bytes of random blocks whose scales are reasonable numbers."""
    rng = np.random.default_rng(seed)
    block, n_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (n_rows, n_inputs // block, n_bytes), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    places |= {"Q4_1": (0, 2), "Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}
    for at in places.get(kind, (0,)):
        scales = (rng.standard_normal(raw.shape[:2]) / 64).astype("<f2")
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = rng.integers(104, 143, raw.shape[:2])
    if kind == "TQ2_0":  # four twos of bits, none of which is 3
        fields = rng.integers(0, 3, (*raw.shape[:2], 64, 4)).astype(np.uint8)
        raw[..., :64] = (fields << np.array([0, 2, 4, 6], np.uint8)).sum(-1).astype(np.uint8)
    if kind == "TQ1_0":
        values = rng.integers(-1, 2, (n_rows, n_inputs)).astype(np.float32)
        return quants.quantize(values, GGMLQuantizationType[kind])
    return raw.reshape(n_rows, -1)


def file_with(path, source, name, kind, rows):
    """The GGUF file `source` but for one tensor, whose blocks are given."""
    reader, writer = gguf.GGUFReader(source), GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path):
    source = open_gguf(path)
    skeleton = build_skeleton(source.checkpoint.config)
    source.checkpoint.bind(skeleton)
    return source, skeleton


def loaded(source, skeleton, name):
    source.checkpoint.load(skeleton, [name])
    return skeleton.get_parameter(name).detach().numpy()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_layer_has_the_values_of_the_file(model, tmp_path, kind):
    """Bit for bit those that the checkpoint decodes, rows in the model's order; also out of a section."""
    plain = write_gguf(model, tmp_path / "plain.gguf")
    path = file_with(tmp_path / "q.gguf", plain, "blk.0.attn_q.weight", kind, some_rows(kind, 256, 256))
    source, skeleton = opened(path)
    layer, want = source.layer(Q_PROJ), loaded(source, skeleton, Q_PROJ)
    assert np.array_equal(layer.dequantize(), want)
    again = unpack_section(pack(layer), layer.shape, layer.encoding)
    assert np.array_equal(again.dequantize(), want)
    assert source.decoded == {}
    expected = {"Q4_1": Affine, "Q5_1": Affine, "IQ4_NL": Codebook, "MXFP4": Codebook}
    expected |= dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), Affine)
    assert type(layer.encoding) is expected.get(kind, Uniform)


def test_whole_files(model, tmp_path):
    """Every linear and the embedding are layers, norms are not; a file of 16 bits has no layer at all."""
    source, skeleton = opened(write_gguf(model, tmp_path / "q8.gguf", "Q8_0"))
    names = [name for name, _ in skeleton.named_parameters()]
    quantized = [name for name in names if source.layer(name) is not None]
    assert sorted(quantized) == sorted(name for name in names if "norm" not in name)
    for name in quantized:
        assert np.array_equal(source.layer(name).dequantize(), loaded(source, skeleton, name)), name
    source, skeleton = opened(write_gguf(model, tmp_path / "f16.gguf", "F16"))
    assert all(source.layer(name) is None for name in names) and source.decoded == {}
    assert source.checkpoint.stored_dtype(Q_PROJ) == "F16"


def test_a_type_that_no_encoding_holds(model, tmp_path):
    """It is told, and decoded with all its digits."""
    plain = write_gguf(model, tmp_path / "plain.gguf")
    rows = some_rows("IQ4_XS", 256, 256)
    source, _ = opened(file_with(tmp_path / "x.gguf", plain, "blk.0.attn_q.weight", "IQ4_XS", rows))
    assert source.layer(Q_PROJ) is None
    assert source.decoded == {Q_PROJ: "IQ4_XS: no encoding holds it; stored as float32"}
    assert source.checkpoint.stored_dtype(Q_PROJ) == "F32"


def test_a_2_among_ternary_values_is_not_flattened(model, tmp_path):
    plain = write_gguf(model, tmp_path / "plain.gguf")
    rows = some_rows("TQ2_0", 256, 256)
    rows[:, 0] = 0xFF
    source, _ = opened(file_with(tmp_path / "x.gguf", plain, "blk.0.attn_q.weight", "TQ2_0", rows))
    assert source.layer(Q_PROJ) is None
    assert source.decoded == {Q_PROJ: "TQ2_0: no encoding holds it; stored as float32"}


def test_a_tensor_of_another_shape_is_refused(model, tmp_path):
    plain = write_gguf(model, tmp_path / "plain.gguf")
    rows = some_rows("Q8_0", 254, 256)
    source, _ = opened(file_with(tmp_path / "x.gguf", plain, "blk.0.attn_q.weight", "Q8_0", rows))
    with pytest.raises(CheckpointError, match=r"attn_q.weight is \[254, 256\], the config implies \[256, 256\]$"):
        source.layer(Q_PROJ)


def test_scales_that_are_no_numbers(model, tmp_path):
    plain = write_gguf(model, tmp_path / "plain.gguf")
    rows = some_rows("Q4_K", 256, 256)
    rows[3, :2] = 0xFF
    source, _ = opened(file_with(tmp_path / "x.gguf", plain, "blk.0.attn_q.weight", "Q4_K", rows))
    with pytest.raises(FormatError, match=r"x.gguf: tensor blk.0.attn_q.weight: a unit of the scales is NaN or inf"):
        source.layer(Q_PROJ)


def test_a_file_that_is_none(tmp_path):
    path = Path(tmp_path / "x.gguf")
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(CheckpointError, match="truncated or not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, True), (5, True), (8, True), (4, False), (5, False)])
@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_round_trip_of_steps(bits, symmetric, group_size):
    """Codes, scales and zeros are those that went out, where the type has as many integers."""
    rng = np.random.default_rng(bits)
    groups = (4, 512 // group_size)
    layer = QuantizedLinear(
        codes=rng.integers(0, 1 << bits, (4, 512)).astype(np.uint8),
        # few digits, so that every minimum is a number of 16 bits
        scales=(rng.integers(1, 64, groups) / 64).astype(np.float16),
        zeros=None if symmetric else rng.integers(0, 1 << bits, groups).astype(np.uint8),
        bits=bits,
        group_size=group_size,
    )
    blocks = exact(layer)
    assert blocks.kind == ({3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}[bits] if symmetric else f"Q{bits}_1")
    again = layer_of(blocks)
    assert (again.bits, again.group_size, again.symmetric) == (bits, group_size, symmetric)
    assert np.array_equal(again.codes, layer.codes)
    assert np.array_equal(again.scales, layer.scales)
    assert symmetric or np.array_equal(again.zeros, layer.zeros)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_round_trip_of_what_came_in(kind):
    """The same bytes."""
    rng = np.random.default_rng(0)
    blocks = fit(rng.standard_normal((4, 512)).astype(np.float32), kind)
    layer = layer_of(blocks)
    assert isinstance(layer, AffineLinear)
    out = exact(layer)
    assert out.kind == kind and np.array_equal(out.pack(), blocks.pack())
    assert np.array_equal(layer.dequantize(), dequantize(blocks.pack(), GGMLQuantizationType[kind]))


@pytest.mark.parametrize("options", [("--bits", "4", "--sym"), ("--bits", "3", "--sym"), ("--bits", "8", "--sym")])
def test_round_trip_of_a_model(model, tmp_path, options):
    """What was exported comes in with the same codes and scales, rows in their order; what is dense with its values."""
    path, target = tmp_path / "a.qtm", tmp_path / "a.gguf"
    made = run_qtool("compress", model, "-o", path, "--method", "rtn", "--group-size", "64", *options)
    assert made.exit_code == 0, made.output
    with QtmFile.open(path) as file:
        assert export_gguf(file, target).losses == []
        source, skeleton = opened(target)
        for name, entry in file.tensors.items():
            layer = source.layer(name)
            if isinstance(entry.encoding, Dense):
                assert layer is None and np.array_equal(loaded(source, skeleton, name), file.dense(name))
                continue
            want = file.layer(name)
            assert (layer.bits, layer.group_size, layer.symmetric) == (want.bits, want.group_size, True), name
            assert np.array_equal(layer.codes, want.codes) and np.array_equal(layer.scales, want.scales), name


def test_round_trip_of_levels():
    rows = some_rows("IQ4_NL", 4, 64)
    from formats.ggml.levels import unpack_levels

    layer = layer_of(unpack_levels("IQ4_NL", rows))
    assert isinstance(layer, CodebookLinear)
    assert exact(layer).kind == "IQ4_NL" and np.array_equal(exact(layer).pack(), rows)


def test_an_mxfp4_scale_beyond_16_bits(model, tmp_path):
    rows = some_rows("MXFP4", 256, 256)
    rows[0, 0] = 90
    plain = write_gguf(model, tmp_path / "plain.gguf")
    source, _ = opened(file_with(tmp_path / "x.gguf", plain, "blk.0.attn_q.weight", "MXFP4", rows))
    assert source.layer(Q_PROJ) is None and list(source.decoded) == [Q_PROJ]
