"""What the comparison with other tools rests on: their layout decoded, their bits counted, their failures told."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from benchmarks.peers import measure
from benchmarks.peers.environments import PeerError, run_logged
from benchmarks.peers.gptq_layout import decode, unpack_rows
from benchmarks.peers.inputs import importance_of
from benchmarks.peers.job import Job
from benchmarks.peers.settings import Setting
from tests.tiny import load_reference, make_model

NEEDS_HQQ = Setting(peer="HQQ", name="4 bits", module="hqq", options={"bits": 4, "group_size": 16})


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Arguments of `measure_peers`, with everything calibration makes already made."""
    (tmp_path / "text.txt").write_text("A text.")
    texts = {"calibration": tmp_path / "text.txt", "data": tmp_path / "text.txt"}
    return {"model": make_model("llama", tmp_path / "model"), **texts, "work": tmp_path / "work"}


def job(folder: Path) -> Job:
    return Job(model="", windows="", importance="", output=str(folder), seed=0, options={})


def test_a_code_of_three_bits_crosses_words():
    codes = [(5 * k + 1) % 8 for k in range(32)]
    stream = sum(code << 3 * k for k, code in enumerate(codes))  # 96 bits: codes 10 and 21 lie in two words each
    words = [(stream >> 32 * i) & 0xFFFFFFFF for i in range(3)]
    as_stored = torch.from_numpy(np.array([words], np.uint32).view(np.int32))
    assert unpack_rows(as_stored, bits=3).tolist() == [codes]


def test_a_weight_is_its_code_less_its_groups_zero_times_its_groups_scale():
    """Eight inputs, eight outputs, 4 bits: every code is 9; zero points are 7 and 8, less one in the file."""
    parts = {
        "qweight": torch.full((1, 8), int(np.uint32(0x99999999).view(np.int32)), dtype=torch.int32),
        "qzeros": torch.tensor([[0x66666666], [0x77777777]], dtype=torch.int32),
        "scales": torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16),
    }
    in_order = decode(parts, bits=4, group_size=4)
    assert in_order.tolist() == [[1.0] * 4 + [2.0] * 4] * 8
    shuffled = decode({**parts, "g_idx": torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])}, bits=4, group_size=4)
    assert shuffled.tolist() == [[2.0, 1.0] * 4] * 8


def test_bits_are_all_stored_bytes_over_all_weights(tmp_path):
    weights = {"a.layers.0.x.weight": np.ones((4, 8), np.float32), "a.layers.1.x.weight": np.ones((4, 4), np.float32)}
    job(tmp_path).finish(weights, stored_bytes=24, note="as it is")
    assert json.loads((tmp_path / "result.json").read_text()) == {"bits": 4.0, "note": "as it is"}
    assert load_file(tmp_path / "weights.safetensors")["a.layers.0.x.weight"].dtype == torch.float32


def test_importance_is_the_mean_squared_input_of_every_block_linear(tmp_path):
    model = make_model("llama", tmp_path / "model")
    importance = load(importance_of(model, np.arange(24).reshape(3, 8)))
    network = load_reference(model)
    seen = []
    network.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _module, x: seen.append(x[0]))
    with torch.no_grad():
        network(torch.arange(24).reshape(3, 8))
    torch.testing.assert_close(importance["model.layers.0.self_attn.q_proj.weight"], seen[0].square().mean(dim=(0, 1)))
    assert len(importance) == 3 * 7  # of the blocks; the head is no part of it


def test_a_peer_that_fails_is_a_row_that_says_why(inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SETTINGS", (NEEDS_HQQ,))
    monkeypatch.setattr(measure, "OUT_OF_REACH", {"X": "it needs a GPU"})
    monkeypatch.setattr(measure, "interpreter", lambda _module, _folder: sys.executable)  # in which there is no hqq
    monkeypatch.setattr(measure._Bench, "_inputs", (tmp_path, tmp_path))
    rows = measure.measure_peers(**inputs)
    assert {(row.bits, row.ratio) for row in rows} == {(None, None)}
    assert [(row.peer, row.note) for row in rows] == [
        ("HQQ", "not measured: ModuleNotFoundError: No module named 'hqq'"),
        ("X", "not measured: it needs a GPU"),
    ]


def decodes_to(monkeypatch, weights):
    """Let the peer's run end with these weights."""

    def run(_module, command, _log):
        Job(**json.loads(command[-1].read_text())).finish(weights, stored_bytes=1)

    monkeypatch.setattr(measure, "SETTINGS", (NEEDS_HQQ,))
    monkeypatch.setattr(measure, "interpreter", lambda _module, _folder: sys.executable)
    monkeypatch.setattr(measure._Bench, "_inputs", ("windows.npy", "importance.safetensors"))
    monkeypatch.setattr(measure, "run_logged", run)


def test_a_peer_that_leaves_linears_as_they_were_is_not_measured(inputs, monkeypatch):
    weights = {name: t.numpy() for name, t in load_file(inputs["model"] / "model.safetensors").items() if t.dim() == 2}
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.2.mlp.up_proj.weight"]
    decodes_to(monkeypatch, weights)
    row, _ = measure.measure_peers(**inputs)
    assert row.note == "not measured: leaves out 2 of 21 linears, such as model.layers.1.mlp.up_proj.weight"


def test_a_ratio_is_one_where_nothing_was_lost_and_none_where_the_weights_overflow(inputs, monkeypatch):
    monkeypatch.setattr(measure, "MEASURE", ["--seq-len", "4", "--max-windows", "1"])
    tensors = load_file(inputs["model"] / "model.safetensors")
    linears = {name: t.numpy() for name, t in tensors.items() if ".layers." in name and t.dim() == 2}
    decodes_to(monkeypatch, {name: np.full_like(weight, np.nan) for name, weight in linears.items()})
    row, _ = measure.measure_peers(**inputs)
    assert row.note == "not measured: what its weights decode to cannot be evaluated"
    decodes_to(monkeypatch, linears)
    row, _ = measure.measure_peers(**inputs)  # what failed is tried again
    assert row.ratio == 1.0


def test_a_cached_table_runs_nothing_and_forgets_rows_of_another_text(inputs, monkeypatch):
    monkeypatch.setattr(measure, "SETTINGS", (NEEDS_HQQ,))
    monkeypatch.setattr(measure, "OUT_OF_REACH", {})
    kept = measure.Row(peer="HQQ", setting="4 bits", bits=4.5, ratio=1.5, note="")
    monkeypatch.setattr(measure._Bench, "_measure", lambda _bench, _setting: kept)
    missing = measure.Row(peer="HQQ", setting="4 bits", bits=None, ratio=None, note="not measured: not in the cache")
    assert measure.measure_peers(**inputs, cached=True) == [missing]
    assert measure.measure_peers(**inputs) == [kept]
    assert measure.measure_peers(**inputs, cached=True) == [kept]
    inputs["data"].write_text("Another text.")
    assert measure.measure_peers(**inputs, cached=True) == [missing]


def test_the_reason_is_the_last_line_printed(tmp_path):
    script = "print('first'); print('no wheel for this machine'); raise SystemExit(3)"
    with pytest.raises(PeerError, match=r"^no wheel for this machine$"):
        run_logged("hqq", [sys.executable, "-c", script], tmp_path / "log")
