"""A run that is stopped at any moment goes on from its work folder, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invoke import environment, python, qtool_json, refusal, run_qtool

import formats.writer
import qtool.commands
import qtool.pipeline
from formats.reader import verify
from qtool.states import HiddenStates

N_BLOCKS = 3


@pytest.fixture
def output(tmp_path):
    """A place of its own: whatever else lies in it afterwards was left behind."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder / "out.qtm"


@pytest.fixture
def command(tiny_files, output):
    return ["compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options()]


@pytest.fixture
def whole(tiny_files):
    """The bytes of a run in one go."""
    return tiny_files.compressed("llama").read_bytes()


def stop_after(monkeypatch, n_steps, error):
    """Let a run finish `n_steps` steps (what lies outside the blocks is the first), then raise `error`."""
    commit = qtool.journal.Journal.commit

    def stopping(journal, *args):
        if len(journal.steps) == n_steps:
            raise error
        commit(journal, *args)

    monkeypatch.setattr(qtool.journal.Journal, "commit", stopping)


def refusal_of_resumed(command):
    """The line that ends a run which said before that it goes on."""
    result = run_qtool(*command)
    assert result.exit_code == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("resumes after ")
    return last.removeprefix("Error: ")


def interrupt(monkeypatch, command, n_steps=2):
    with monkeypatch.context() as patched:
        stop_after(patched, n_steps, KeyboardInterrupt())
        return refusal(*command)


# ---- killed at any moment


def die_at(n, command):
    """Run in a child that dies, as by kill -9, before its nth act that changes what is on the disk; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            _die_before_act(n)
            run_qtool(*command)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _die_before_act(n):
    acts = []

    def counted(act):
        def counting(*args, **kwargs):
            acts.append(act)
            if len(acts) == n:
                os._exit(9)
            return act(*args, **kwargs)

        return counting

    for name in ("fsync", "replace", "link", "unlink", "truncate", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    Writer = formats.writer.Writer
    Writer._append = counted(Writer._append)  # half a file, and half a line
    HiddenStates._path = counted(HiddenStates._path)


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
    block = qtool.pipeline._Run._block
    monkeypatch.setattr(qtool.pipeline._Run, "_block", lambda self, i, *args: (run.append(i), block(self, i, *args)))
    assert run_qtool(*command).exit_code == 0
    assert run == [2]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("options", [(), ("--method", "rtn"), ("--embeddings", "16"), ("--calibration", "self")])
def test_every_kind_of_run_goes_on(monkeypatch, tiny_files, output, family, options):
    command = ["compress", tiny_files.model(family), "-o", output, *tiny_files.compress_options(*options)]
    interrupt(monkeypatch, command)
    assert run_qtool(*command).exit_code == 0
    assert output.read_bytes() == tiny_files.compressed(family, *options).read_bytes()


def test_what_the_model_wrote_is_not_written_again(monkeypatch, tiny_files, output):
    command = [
        "compress",
        tiny_files.model("llama"),
        "-o",
        output,
        *tiny_files.compress_options("--calibration", "self"),
    ]
    interrupt(monkeypatch, command)
    monkeypatch.setattr(qtool.sample, "_generate", lambda *args: pytest.fail("written again"))
    assert run_qtool(*command).exit_code == 0


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


def test_what_the_model_wrote_and_the_disk_lost_is_written_again(monkeypatch, tiny_files, output):
    command = [
        "compress",
        tiny_files.model("llama"),
        "-o",
        output,
        *tiny_files.compress_options("--calibration", "self"),
    ]
    interrupt(monkeypatch, command)
    (sample,) = output.with_name(f"{output.name}.work").glob("self.*.npy")
    os.truncate(sample, 100)
    assert run_qtool(*command).exit_code == 0
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
    assert qtool.cli._outlook(caught.value) == "1 of 3 blocks are kept"


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
