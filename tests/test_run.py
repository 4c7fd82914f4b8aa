"""What a run keeps to: its work folder, its lock, the disk, its log, and what it does about numbers that overflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import interrupt
from invoke import environment, python, qtool_json, refusal, run_qtool

import qtool.budget
import qtool.lock
from formats.reader import verify
from qtool.states import HiddenStates

# ---- the work folder


def test_work_dir(monkeypatch, command, output, tmp_path, whole):
    command += ["--work-dir", tmp_path / "elsewhere"]
    assert str(tmp_path / "elsewhere") in interrupt(monkeypatch, command)
    assert os.listdir(output.parent) == []
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == whole
    assert not (tmp_path / "elsewhere").exists()


def test_work_dir_on_another_file_system(command, output, whole):
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == output.parent.stat().st_dev:
        pytest.skip("no second file system here")
    work = shared_memory / f"qtool-test-{os.getpid()}"
    assert run_qtool(*command, "--work-dir", work).exit_code == 0
    assert output.read_bytes() == whole
    assert os.listdir(output.parent) == [output.name]
    assert not work.exists()


def test_a_folder_with_other_files_is_no_work_folder(command, tmp_path):
    (tmp_path / "thesis.tex").touch()
    message = refusal(*command, "--work-dir", tmp_path)
    assert message.startswith(f"{tmp_path}: has '") and message.endswith("which is no run's; give a new --work-dir")
    assert (tmp_path / "thesis.tex").exists()


def test_force_replaces_only_at_the_end(monkeypatch, command, output, whole):
    output.write_bytes(b"precious")
    interrupt(monkeypatch, [*command, "--force"])
    assert output.read_bytes() == b"precious"
    kept = refusal(*command)  # without --force, and the journal is kept
    assert kept == f"{output}: exists already; give another --output or --force"
    assert run_qtool(*command, "--force").exit_code == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("option", ["--work-dir", "--log-file"])
def test_one_path_for_two_things(command, output, option):
    assert refusal(*command, option, output) == f"{option} {output}: is the output itself; give another"
    assert os.listdir(output.parent) == []


def test_an_output_with_odd_characters(tiny_files, tmp_path):
    output = tmp_path / "a{b} %s 'c'.qtm"
    result = run_qtool("compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options())
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == tiny_files.compressed("llama").read_bytes()


# ---- two at once


def test_a_second_run_is_refused_while_the_first_lives(command, output, tmp_path, whole):
    code = (
        "import sys, time; from pathlib import Path; from qtool.lock import locked_output\n"
        "with locked_output(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, output], env=environment(), stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"\n"
        refused = f"{output}: another qtool (process {first.pid}) is writing it; wait for it, or give another --output"
        assert refusal(*command) == refused
        assert refusal(*command, "--work-dir", tmp_path / "elsewhere") == refused
    finally:
        first.kill()
        first.communicate()
    assert run_qtool(*command).exit_code == 0  # its lock file is still there, its lock is not
    assert output.read_bytes() == whole


def test_a_work_folder_in_use_is_refused(command, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with qtool.lock.locked_folder(folder):
        message = refusal(*command, "--work-dir", folder)
    assert message == f"{folder}: another qtool is working in it; wait for it, or give another --work-dir"


# ---- full disks


def refusal_at_limit(command, limit):
    """The line that a run ends with when the system lets no file grow beyond `limit` bytes."""
    code = (
        "import resource; from qtool.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main()"
    )
    done = python("-c", code, *command)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("limit", "kept"), [(20_000, "nothing was left behind"), (48_000, "3 of 3 blocks are kept")])
def test_a_full_disk_leaves_the_journal_intact(command, output, whole, limit, kept):
    line = refusal_at_limit(command, limit)
    assert line.startswith("Error: ") and "File too large" in line and line.endswith("make room and run again")
    assert kept in line
    assert not output.exists()
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == whole


def test_a_full_folder_for_temporary_files(command, output):
    line = refusal_at_limit(command, 3_000)
    assert line.startswith("Error: the tokenizer cannot be saved in ") and line.endswith("make room there")
    assert os.listdir(output.parent) == []


def test_too_little_space_is_said_before_the_start(monkeypatch, command, output):
    usage = type(qtool.budget.shutil.disk_usage("/"))
    monkeypatch.setattr(qtool.budget.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1_000_000))
    message = refusal(*command)
    assert message.startswith(f"{output}.work: the run needs 16.") and "1.0 MB are free; make room" in message
    assert os.listdir(output.parent) == []


# ---- the log


def test_log_file_has_a_line_for_every_layer(monkeypatch, command, output, tmp_path):
    log = tmp_path / "run.jsonl"
    command += ["--log-file", log]
    interrupt(monkeypatch, command, n_steps=3)
    assert run_qtool(*command).exit_code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    errors = {row["name"]: row["relative_error"] for row in qtool_json("inspect", output)["tensors"]}
    # The block that was being done is done again; whoever reads the log takes a layer's last line.
    assert {line["layer"] for line in lines} == {name for name, error in errors.items() if error is not None}
    for line in lines:
        assert line["relative_error"] == errors[line["layer"]]
        assert (line["method"], line["bits"], line["percdamp"], line["tokens"]) == ("gptq", 4, 0.01, 256)
        assert line["dropped_tokens"] == 0 and line["seconds"] > 0 and line["rss_bytes"] > 10_000_000


def test_log_file_that_cannot_be_written(command, output, tmp_path):
    log = tmp_path / "nowhere" / "run.jsonl"
    assert refusal(*command, "--log-file", log) == f"{log}: No such file or directory"
    assert os.listdir(output.parent) == []


# ---- numerical trouble


def test_a_few_tokens_that_overflow_are_left_out_and_counted(monkeypatch, command, output, tiny_files):
    read = HiddenStates.read

    def with_one_bad_token(states, step):
        for index, batch in enumerate(read(states, step)):
            if (step, index) == (1, 0):
                batch[0, -1] = float("nan")
            yield batch

    monkeypatch.setattr(HiddenStates, "read", with_one_bad_token)
    assert run_qtool(*command, "--samples", 128).exit_code == 0
    quality = qtool_json("inspect", output)["quality"]
    # One token where it enters; its window, 64 of 8192 tokens, behind the attention that spreads it.
    assert quality["dropped_tokens"]["model.layers.1.self_attn.q_proj.weight"] == 1
    assert quality["dropped_tokens"]["model.layers.1.mlp.down_proj.weight"] == 64
    assert quality["dropped_tokens"]["model.layers.2.self_attn.q_proj.weight"] == 64
    shown = run_qtool("inspect", output).stdout
    assert "model.layers.1.self_attn.q_proj.weight: 1 tokens with NaN or infinity left out" in shown
    verify(output)


def test_independent_blocks_are_calibrated_on_the_uncompressed_ones(tiny_files, tmp_path):
    """The last block's errors are those that it would have behind blocks that were left as they are."""
    options = tiny_files.compress_options("--bits", "3")
    files = {}
    for name, own in {"one": ("--independent",), "other": ("--ignore", "layers[.][01][.]"), "usual": ()}.items():
        files[name] = tmp_path / f"{name}.qtm"
        assert run_qtool("compress", tiny_files.model("llama"), "-o", files[name], *options, *own).exit_code == 0
    errors = {
        name: {
            t["name"]: t["relative_error"] for t in qtool_json("inspect", file)["tensors"] if "layers.2" in t["name"]
        }
        for name, file in files.items()
    }
    assert errors["one"] == errors["other"] != errors["usual"]
    verified = ("verify", files["one"], "--against", tiny_files.model("llama"), "--calibration", tiny_files.text)
    assert qtool_json(*verified)["ok"]
