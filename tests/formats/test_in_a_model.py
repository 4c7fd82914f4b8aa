"""A model whose tensors are stored in every encoding: loaded, exported, listed and verified like any other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blockwise import blockwise_logits, some_ids
from format_samples import make_layer
from independent_reader import read
from invoke import qtool_json, refusal, run_qtool
from layer_samples import make_codebook, make_int8, make_spqr, make_ternary, make_trellis, with_outliers

import qtool as api
from formats.encoding import Uniform
from formats.header import TensorEntry
from formats.layer import CodebookLinear, Layer, QuantizedLinear
from formats.modules import QuantEmbedding, QuantLinear
from formats.reader import QtmFile
from formats.section import pack
from formats.writer import Writer

KINDS: list[Callable[[int, int], Layer]] = [
    lambda out, n: make_layer(out, n, 3, 16, scaled=True),
    lambda out, n: make_codebook(out, n, 4, 16, "nf4", "double_quant", scaled=True),
    lambda out, n: make_int8(out, n, (0, 5)),
    lambda out, n: with_outliers(make_spqr(out, n, 3, 16, stat_rows=16, scaled=True), every=37),
    lambda out, n: make_codebook(out, n, 3, 16, "fitted", "two_level"),
    lambda out, n: with_outliers(make_codebook(out, n, 4, 16, "fp4"), every=50),
    lambda out, n: make_trellis(out, n, 2, 16, 7, 32, scaled=True),
    lambda out, n: make_ternary(out, n, 9, scaled=True),
    lambda out, n: make_ternary(out, n, 4, "ternary_rans"),
]


def rewritten(source: Path, target: Path, layer_for: Callable[[QtmFile, TensorEntry], Layer | None]) -> Path:
    """A copy of a file in which some quantized tensors are other layers; a None is copied as it is."""
    with QtmFile.open(source) as file, Writer(target) as writer:
        for entry in file.tensors.values():
            layer = layer_for(file, entry) if isinstance(entry.encoding, Uniform) else None
            encoding, data = (entry.encoding, file.section(entry)) if layer is None else (layer.encoding, pack(layer))
            extra = {"transposed": entry.transposed, "relative_error": entry.relative_error}
            writer.add_tensor(entry.name, entry.shape, encoding, data, **extra)
        for name in file.files:
            writer.add_file(name, file.read_file(name))
        members: Any = {name: getattr(file.header, name) for name in ("model", "recipe", "provenance", "quality")}
        writer.finish(**members)
    return target


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("first", range(len(KINDS)))  # of which the embedding is
def test_a_model_of_every_encoding_runs(tiny_files, family, first, tmp_path):
    kinds = itertools.cycle(KINDS[first:] + KINDS[:first])
    path = rewritten(tiny_files.compressed(family), tmp_path / "a.qtm", lambda _, entry: next(kinds)(*entry.shape))
    model, ids = api.load(path), some_ids()
    modules = [type(module) for module in model.modules()]
    assert QuantLinear in modules and any(issubclass(kind, QuantEmbedding) for kind in modules)
    want = blockwise_logits(path, ids)
    assert want.isfinite().all()
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=2e-4 * want.abs().max().item())
    stored = read(path).tensors
    (name,) = [n for n in stored if n.endswith(("embed_tokens.weight", "wte.weight"))]
    rows = model.get_input_embeddings()(ids)
    scale = rows.abs().max() / np.abs(stored[name][ids[0].numpy()]).max()  # Gemma's own, after the look-up
    assert torch.equal(rows[0], torch.from_numpy(stored[name][ids[0].numpy()]) * scale)


def test_inspect_and_verify_know_them(tiny_files, tmp_path):
    kinds = itertools.cycle(KINDS)
    path = rewritten(tiny_files.compressed("llama"), tmp_path / "a.qtm", lambda _, entry: next(kinds)(*entry.shape))
    assert run_qtool("verify", path).exit_code == 0
    found = qtool_json("inspect", path)
    assert found["format_version"] == "1.2"
    rows = [row for row in found["tensors"] if row["encoding"] != "dense"]
    assert {(row["encoding"], row["bits"], row["group_size"], row["outliers"] > 0) for row in rows} == {
        ("uniform", 3, 16, False),
        ("codebook", 4, 16, False),
        ("int8_rows", 8, None, True),
        ("uniform", 3, 16, True),
        ("codebook", 3, 16, False),
        ("codebook", 4, 16, True),
        ("trellis", 2, 16, False),
        ("ternary_dict", 2, None, False),
        ("ternary_rans", 1, None, False),
    }
    assert {row["settings"].get("levels") for row in rows} == {None, "nf4", "fitted", "fp4"}
    table = run_qtool("inspect", path, "--tensors").stdout.splitlines()
    (line,) = [line for line in table if "layers.0.self_attn.k_proj" in line]
    row = next(row for row in rows if "layers.0.self_attn.k_proj" in row["name"])
    assert line.split()[2:6] == [
        row["encoding"],
        str(row["bits"]),
        str(row["group_size"] or "-"),
        str(row["outliers"] or "-"),
    ]


def as_codebook(layer: QuantizedLinear) -> CodebookLinear:
    """The same weights: a symmetric grid is a table of integers."""
    levels = (np.arange(1 << layer.bits) - (1 << layer.bits - 1)).astype(np.float16)
    return CodebookLinear(
        codes=layer.codes,
        levels=levels,
        scales=layer.scales,
        bits=layer.bits,
        group_size=layer.group_size,
        input_scales=layer.input_scales,
    )


def test_verify_against_decodes_them(tiny_files, tmp_path):
    """The layers of a symmetric grid, stored as the codebook that decodes to the same: the errors are as recorded."""
    source = tiny_files.compressed("llama", "--bits", "3", "--sym")
    options = ("--against", tiny_files.model("llama"), "--calibration", tiny_files.text)

    def linears(file: QtmFile, entry: TensorEntry) -> Layer | None:
        return as_codebook(file.layer(entry.name)) if entry.relative_error is not None else None

    path = rewritten(source, tmp_path / "linears.qtm", linears)
    assert {row["encoding"] for row in qtool_json("inspect", path)["tensors"]} == {"dense", "uniform", "codebook"}
    assert qtool_json("verify", path, *options)["layers"] == qtool_json("verify", source, *options)["layers"]

    path = rewritten(source, tmp_path / "all.qtm", lambda file, entry: as_codebook(file.layer(entry.name)))
    message = refusal("verify", path, *options)
    assert "tensor 'model.embed_tokens.weight' against" in message
    assert message.endswith("is stored as codebook without a relative error; there is nothing to compare it by")


def test_export_holds_the_decoded_values(tiny_files, tmp_path):
    kinds = itertools.cycle(KINDS)
    path = rewritten(tiny_files.compressed("llama"), tmp_path / "a.qtm", lambda _, entry: next(kinds)(*entry.shape))
    qtool_json("export", path, "--to", "dense", "-o", tmp_path / "dense")
    ids = some_ids()
    want = blockwise_logits(path, ids)
    torch.testing.assert_close(
        blockwise_logits(tmp_path / "dense", ids), want, rtol=0, atol=2e-4 * want.abs().max().item()
    )
