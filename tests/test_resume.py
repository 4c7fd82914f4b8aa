"""A run that is stopped at any moment goes on from its work folder, and ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from interrupted import die_at, interrupt, refusal_of_resumed
from invoke import environment, refusal, run_qtool

import formats.writer
import qtool.commands
import qtool.pipeline
import qtool.run

N_BLOCKS = 3


@pytest.fixture
def own_sample(tiny_files, command):
    """The command that calibrates on what the model itself writes."""
    return [*command, "--calibration", "self"]


# ---- killed at any moment


def test_killed_before_any_act_the_same_command_gives_the_same_bytes(command, output, whole):
    n, died, work = 0, True, output.with_name(f"{output.name}.work")
    while died:
        n += 1
        died = die_at(n, command)
        if output.exists():
            assert output.read_bytes() == whole  # never half a file under the final name
        # Killed when its journal was gone already, or only its lock was left: done, as it says to who repeats it.
        done = output.exists() and not (work / "journal.jsonl").exists()
        if died and os.listdir(output.parent) != [output.name]:
            result = run_qtool(*command)
            assert result.exit_code == 0 or (done and "exists already" in result.stderr), (n, result.output)
        assert output.read_bytes() == whole, n
        assert set(os.listdir(output.parent)) <= {output.name, f".{output.name}.lock"}, n
        output.unlink()
    assert n > 60  # the acts were really counted


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_by_a_signal(tiny_files, output, whole, kind):
    """In a process of its own, after its first block is in the journal."""
    options = tiny_files.compress_options("--max-memory", "4GB")
    arguments = [str(a) for a in ("compress", tiny_files.model("llama"), "-o", output, *options)]
    slow = (
        "import time; from qtool.cli import main; from qtool.journal import Journal; commit = Journal.commit\n"
        "def slowly(*args): commit(*args); time.sleep(1)\n"
        "Journal.commit = slowly; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], env=environment(), stderr=subprocess.PIPE, text=True
    )
    journal = output.with_name(f"{output.name}.work") / "journal.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(kind)
        stderr = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    if kind == signal.SIGKILL:
        assert process.returncode == -kind
    else:
        assert process.returncode == 1, stderr
        assert stderr.splitlines()[-1].startswith("Error: interrupted; ")
        assert "blocks are kept in" in stderr and "Traceback" not in stderr
    result = run_qtool(*arguments)
    assert result.exit_code == 0 and f"of {N_BLOCKS} blocks, kept in {journal.parent}" in result.stderr
    assert output.read_bytes() == whole
    assert os.listdir(output.parent) == [output.name]


def test_interrupted_says_how_to_go_on(monkeypatch, command, output, whole):
    work = output.with_name(f"{output.name}.work")
    message = interrupt(monkeypatch, command)
    assert message == f"interrupted; 1 of {N_BLOCKS} blocks are kept in {work}, the same command goes on from there"
    assert not output.exists()
    result = run_qtool(*command)
    assert f"resumes after 1 of {N_BLOCKS} blocks, kept in {work}" in result.stderr
    assert output.read_bytes() == whole
    assert os.listdir(output.parent) == [output.name]


def test_interrupted_before_anything_is_done_leaves_nothing(monkeypatch, command, output):
    assert interrupt(monkeypatch, command, n_steps=0) == "interrupted; nothing was left behind"
    assert os.listdir(output.parent) == []


def test_a_resumed_run_does_no_block_twice(monkeypatch, command):
    interrupt(monkeypatch, command, n_steps=3)
    run = []
    block = qtool.run.Run._block
    monkeypatch.setattr(qtool.run.Run, "_block", lambda self, i, *args: run.append(i) or block(self, i, *args))
    assert run_qtool(*command).exit_code == 0
    assert run == [2]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("options", [(), ("--method", "rtn"), ("--embeddings", "16"), ("--calibration", "self")])
def test_every_kind_of_run_goes_on(monkeypatch, tiny_files, output, family, options):
    command = ["compress", tiny_files.model(family), "-o", output, *tiny_files.compress_options(*options)]
    interrupt(monkeypatch, command)
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == tiny_files.compressed(family, *options).read_bytes()


def test_what_the_model_wrote_is_not_written_again(monkeypatch, tiny_files, output, own_sample):
    interrupt(monkeypatch, own_sample)
    monkeypatch.setattr(qtool.sample, "_generate", lambda *args: pytest.fail("written again"))
    assert run_qtool(*own_sample).exit_code == 0


# ---- what a journal is not gone on with


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--bits", "3"), "recipe.linears.bits is 3, was 4"),
        (("--percdamp", "0.1"), "recipe.linears.percdamp is 0.1, was 0.01"),
        (("--samples", "5"), "recipe.calibration.samples is 5, was 4"),
        (("--embeddings", "16"), "recipe.embeddings is 16, was 8"),
    ],
)
def test_another_recipe_does_not_mix(monkeypatch, command, output, whole, options, difference):
    interrupt(monkeypatch, command)
    work = output.with_name(f"{output.name}.work")
    assert refusal(*command, *options) == (
        f"{work}: holds another run ({difference}); run that one to its end, "
        "give --restart to drop it, or another --work-dir"
    )
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == whole


def test_another_model_does_not_mix(monkeypatch, tiny_files, command, tmp_path):
    interrupt(monkeypatch, command)
    command[1] = tiny_files.model("mistral")
    assert "holds another run (config is " in refusal(*command)


def test_another_text_under_the_same_name_does_not_mix(monkeypatch, tiny_files, command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny_files.text.read_text())
    command += ["--calibration", text]
    interrupt(monkeypatch, command)
    text.write_text(tiny_files.text.read_text()[::-1])
    assert "holds another run (calibration_sha256 is " in refusal_of_resumed(command)
    text.unlink()
    assert "does not exist" in refusal_of_resumed(command)
    text.write_text(tiny_files.text.read_text())
    assert run_qtool(*command).exit_code == 0


def test_restart_begins_anew(monkeypatch, command, output, tiny_files):
    interrupt(monkeypatch, [*command, "--bits", "3"])
    assert run_qtool(*command, "--restart").exit_code == 0
    assert output.read_bytes() == tiny_files.compressed("llama").read_bytes()


def test_damaged_sections_are_not_gone_on_with(monkeypatch, command, output):
    interrupt(monkeypatch, command)
    sections = output.with_name(f"{output.name}.work") / "sections"
    data = bytearray(sections.read_bytes())
    data[300] ^= 1
    sections.write_bytes(data)
    assert refusal(*command) == f"{sections}: damaged; give --restart to begin anew"
    sections.unlink()
    assert refusal(*command) == f"{sections}: damaged; give --restart to begin anew"


def test_damaged_states_are_not_gone_on_with(monkeypatch, command, output):
    interrupt(monkeypatch, command)
    states = output.with_name(f"{output.name}.work") / "states.1"
    os.truncate(states, states.stat().st_size - 4)
    assert refusal_of_resumed(command) == f"{states}: damaged; give --restart to begin anew"


@pytest.mark.parametrize("tail", [b"0123456789abcdef {", b"\0" * 100, b"0123456789abcdef {}\n"])
def test_a_torn_line_is_cut_off(monkeypatch, command, output, whole, tail):
    interrupt(monkeypatch, command)
    with open(output.with_name(f"{output.name}.work") / "journal.jsonl", "ab") as journal:
        journal.write(tail)
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == whole


def test_another_machine_may_go_on_but_is_told(monkeypatch, command):
    interrupt(monkeypatch, command)
    monkeypatch.setattr(qtool.pipeline, "machine", lambda: {"threads": 96, "instructions": "AVX512"})
    result = run_qtool(*command)
    assert result.exit_code == 0
    assert "a few codes can differ from a run in one go" in result.stderr


def test_states_that_a_disk_lost_are_not_gone_on_with(monkeypatch, command, output, whole):
    interrupt(monkeypatch, command)
    states = output.with_name(f"{output.name}.work") / "states.1"
    data = bytearray(states.read_bytes())
    data[:4096] = bytes(4096)
    states.write_bytes(data)
    assert refusal_of_resumed(command) == f"{states}: damaged; give --restart to begin anew"
    assert run_qtool(*command, "--restart").exit_code == 0
    assert output.read_bytes() == whole


def test_what_the_model_wrote_and_the_disk_lost_is_written_again(monkeypatch, tiny_files, output, own_sample):
    interrupt(monkeypatch, own_sample)
    (sample,) = output.with_name(f"{output.name}.work").glob("self.*.npy")
    os.truncate(sample, 100)
    assert run_qtool(*own_sample).exit_code == 0
    assert output.read_bytes() == tiny_files.compressed("llama", "--calibration", "self").read_bytes()


def test_no_memory_for_a_block_keeps_the_blocks_before(monkeypatch, command, output, whole):
    read, reads = qtool.checkpoint.convert_and_load_state_dict_in_model, []

    def without_memory(*args, **kwargs):
        reads.append(args)
        if len(reads) > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")
        return read(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(qtool.checkpoint, "convert_and_load_state_dict_in_model", without_memory)
        message = refusal(*command)
    assert message.startswith("out of memory; ") and f"of {N_BLOCKS} blocks are kept" in message
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == whole


def test_restart_destroys_nothing_before_the_run_can_start(monkeypatch, command, output, whole):
    interrupt(monkeypatch, command)
    assert "does not exist" in refusal(*command, "--restart", "--calibration", "nowhere.txt")
    output.write_bytes(b"precious")
    assert "exists already" in refusal(*command, "--restart")
    output.unlink()
    result = run_qtool(*command)
    assert result.exit_code == 0 and "resumes after 1 of" in result.stderr
    assert output.read_bytes() == whole


def test_a_folder_in_which_nothing_was_done_is_no_other_run(monkeypatch, command, output, tiny_files):
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    (work / "manifest.json").write_text('{"recipe": "of somebody else"}')
    assert run_qtool(*command).exit_code == 0


def stop_before_publishing(monkeypatch, command):
    with monkeypatch.context() as patched:
        patched.setattr(formats.writer.Writer, "_publish", lambda writer: (_ for _ in ()).throw(KeyboardInterrupt))
        return refusal(*command)


def test_an_old_output_is_not_taken_for_the_finished_one(monkeypatch, command, output, tiny_files):
    output.write_bytes(tiny_files.compressed("mistral").read_bytes())
    assert f"{N_BLOCKS} of {N_BLOCKS} blocks are kept" in stop_before_publishing(monkeypatch, [*command, "--force"])
    work = output.with_name(f"{output.name}.work")
    (work / "sections").unlink()
    expected = f"{work}: its file was finished, and moved away; give --restart to make it again"
    assert refusal(*command, "--force") == expected


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_makes_an_error_of(monkeypatch, command, output, kind):
    """transformers makes a missing module of an interrupt while it is imported."""

    def swallow(*args, **options):
        try:
            os.kill(os.getpid(), kind)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr(qtool.commands, "open_checkpoint", swallow)
    assert refusal(*command) == "interrupted; nothing was left behind"
    assert os.listdir(output.parent) == []


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, command, output):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("a handler was set"))
    assert run_qtool(*command).exit_code == 0


def test_a_second_interrupt_does_not_make_the_message_lie():
    """The second comes while the first, which knows what is kept, is being seen to."""
    first = KeyboardInterrupt()
    first.add_note("1 of 3 blocks are kept")
    with pytest.raises(KeyboardInterrupt) as caught:
        try:
            raise first
        finally:
            raise KeyboardInterrupt
    assert qtool.cli_group.outlook(caught.value) == "1 of 3 blocks are kept"
