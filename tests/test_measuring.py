"""What a target measures first: kept for the next one, made once, and stopped at any moment."""

from __future__ import annotations

import json
import os
import shutil
from itertools import chain, repeat

import pytest
import torch
from correlated import make_layer
from interrupted import die_at, interrupt
from invoke import qtool_json, refusal, run_qtool
from targeting import MEASURED, bits_of, count_measuring, dry_run, forbid_measuring, last_line

import qtool.budget
import qtool.job
import qtool.pipeline
import qtool.sample
import qtool.sweep
from qtool.errors import QuantizeError
from qtool.factor import factorize
from qtool.layer_loss import sample_rows
from qtool.model import BlockwiseModel
from qtool.recipe import CalibrationSpec, QuantSpec, Recipe
from qtool.sensitivity import Gradients
from qtool.states import HiddenStates


def test_the_run_after_a_dry_run_measures_nothing(monkeypatch, fresh, output):
    passes, command = count_measuring(monkeypatch), [*fresh, "--target-size", "60kB"]
    planned = dry_run(command)
    result = run_qtool(*command)
    assert result.exit_code == 0 and len(passes) == 1
    work = output.with_name(f"{output.name}.work")
    assert f"{MEASURED}{work}" in result.stderr.splitlines()
    rows = {row["name"]: row["bits"] for row in qtool_json("inspect", output)["tensors"]}
    assert bits_of(planned).items() <= rows.items()
    assert os.listdir(work) == ["sweep.json"]


def test_one_measurement_serves_every_target_of_a_work_folder(monkeypatch, targeted, output, measured):
    forbid_measuring(monkeypatch)
    work = ("--work-dir", measured.parent)
    options = [("--target-size", "50kB"), ("--target-bits", "6"), ("--target-bits", "5.5", "--fused")]
    options += [("--target-bits", "6", "--layer", "q_proj=3"), ("--target-size", "80kB", "--ignore", "up_proj")]
    assert len({json.dumps(dry_run(targeted, *o, *work)["layers"]) for o in options}) == len(options)


def other_text(tiny_files, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(tiny_files.text.read_text()[::-1])
    return ("--calibration", text)


@pytest.mark.parametrize("changed", ["text", "model", "method", "samples", "restart"])
def test_what_was_measured_on_something_else_is_measured_again(monkeypatch, tiny_files, targeted, tmp_path, changed):
    options = {
        "text": other_text(tiny_files, tmp_path),
        "method": ("--sym",),
        "samples": ("--samples", "3"),
        "restart": ("--restart",),
    }.get(changed, ())
    if changed == "model":
        targeted[1] = tiny_files.model("mistral")
    passes = count_measuring(monkeypatch)
    dry_run(targeted, "--target-bits", "6", *options)
    assert len(passes) == 1


def test_what_was_left_out_is_measured_when_it_is_not(monkeypatch, fresh):
    passes = count_measuring(monkeypatch)
    dry_run(fresh, "--target-size", "80kB", "--ignore", "up_proj")
    assert sum("up_proj" in name for name in bits_of(dry_run(fresh, "--target-size", "80kB"))) == 3
    assert len(passes) == 2


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"identity": 3}', None])
def test_a_torn_measurement_is_made_again(monkeypatch, targeted, output, measured, torn):
    kept = output.with_name(f"{output.name}.work") / "sweep.json"
    kept.write_bytes(measured.read_bytes()[:-200] if torn is None else torn)
    passes = count_measuring(monkeypatch)
    dry_run(targeted, "--target-bits", "6")
    assert len(passes) == 1 and kept.read_bytes() == measured.read_bytes()


def test_text_that_the_model_wrote_is_its_own(monkeypatch, tiny_files, fresh):
    """It is kept from the dry run to the run, and no other model takes it for its own."""
    written, generate = [], qtool.sample._generate
    monkeypatch.setattr(
        qtool.sample, "_generate", lambda model, *args: (written.append(model), generate(model, *args))[1]
    )
    command = [*fresh, "--target-bits", "6", "--calibration", "self"]
    dry_run(command)
    dry_run(command)
    assert len(written) == 1
    dry_run([command[0], tiny_files.model("mistral"), *command[2:]])
    assert len(written) == 2
    assert run_qtool(*command).exit_code == 0 and len(written) == 2


def test_the_row_of_a_weight_far_from_all_others_is_measured():
    weight, stats = make_layer(1500, 32)
    weight[1013, 5] = 40.0
    for spec in (QuantSpec(), QuantSpec(input_scales=False)):
        kept = weight.clone()
        chosen, counts = sample_rows(weight, factorize(stats, [weight], spec, "layer"))
        assert len(chosen) <= 132 and counts.sum() == pytest.approx(1500)
        assert counts[chosen == 1013].tolist() == [1.0]  # it stands for itself alone
        assert torch.equal(weight, kept)


# ---- stopped at any moment


def stop_measuring(monkeypatch, stop):
    """Call `stop` when one block has been measured and the second is about to be."""
    advance = qtool.sweep.calibrate_and_advance

    def stopping(model, index, states):
        if index == 1:
            stop()
        return advance(model, index, states)

    monkeypatch.setattr(qtool.sweep, "calibrate_and_advance", stopping)


def in_a_child(run):
    """The exit status of a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_interrupted_while_it_measures_it_goes_on_behind_the_last_block(monkeypatch, fresh, output, in_one_go):
    def stop():
        raise KeyboardInterrupt

    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    with monkeypatch.context() as patched:
        stop_measuring(patched, stop)
        message = f"interrupted; what was measured is kept in {work}, the same command goes on from there"
        assert refusal(*command) == message
    with monkeypatch.context() as patched:
        measured, advance = [], qtool.sweep.calibrate_and_advance
        patched.setattr(qtool.sweep, "calibrate_and_advance", lambda m, i, s: (measured.append(i), advance(m, i, s))[1])
        assert run_qtool(*command).exit_code == 0
    assert measured == [1, 2]
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


@pytest.mark.parametrize("damaged", [None, "sweep.1", "sweep.part.json", "gradient.3"])
def test_killed_while_it_measures_the_same_command_gives_the_same_bytes(monkeypatch, fresh, output, in_one_go, damaged):
    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*command)) == 9
    left = {"sweep.0", "sweep.1", "sweep.part.json", "gradient.2", "gradient.3"}
    assert set(os.listdir(work)) == left
    if damaged:
        with open(work / damaged, "r+b") as file:
            file.write(b"damaged.")
    result = run_qtool(*command)
    assert result.exit_code == 0, result.output
    goes_on = f"goes on measuring after 1 of 3 blocks, kept in {work}"
    assert (goes_on in result.stderr) == (damaged is None)
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


@pytest.mark.parametrize("first", [1, 7])
def test_killed_before_any_act_of_measuring_the_same_command_gives_the_same_bytes(fresh, output, in_one_go, first):
    """Every thirteenth act from these on: each costs two passes over the model."""
    command, want = [*fresh, "--target-size", "60kB"], in_one_go("--target-size", "60kB")
    n, work = first, output.with_name(f"{output.name}.work")
    while not (work / "sweep.json").exists():  # not killed before all was measured
        assert die_at(n, command)
        if (work / "sweep.json").exists():
            break
        assert not output.exists()
        result = run_qtool(*command)
        assert result.exit_code == 0, (n, result.output)
        assert output.read_bytes() == want, n
        assert os.listdir(work) == ["sweep.json"]
        output.unlink()
        (work / "sweep.json").unlink()
        work.rmdir()
        n += 13
    assert n > 40  # the acts were really counted


@pytest.mark.parametrize(("first", "second"), [(("--ignore", "up_proj"), ()), ((), ("--restart",))])
def test_a_part_of_a_measurement_that_does_not_fit_is_made_again(monkeypatch, fresh, output, first, second):
    command = [*fresh, "--target-size", "80kB"]
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*command, *first)) == 9
    result = run_qtool(*command, *second)
    assert result.exit_code == 0, result.output
    assert "goes on" not in result.stderr
    assert os.listdir(output.with_name(f"{output.name}.work")) == ["sweep.json"]


def test_what_was_measured_to_the_end_outlives_what_lies_beside_it(monkeypatch, targeted, output, measured):
    work = output.with_name(f"{output.name}.work")
    for name in ("sweep.0", "sweep.1", "sweep.part.json"):
        (work / name).write_bytes(b"of a run that was killed")
    forbid_measuring(monkeypatch)
    dry_run(targeted, "--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


def test_measurements_that_cannot_be_read_are_none(fresh, output):
    (output.parent / "a.work" / "sweep.json").mkdir(parents=True)
    assert run_qtool(*fresh, "--target-size", "60kB").exit_code == 0


def test_what_cannot_be_measured_leaves_nothing(monkeypatch, fresh, output):
    def stop():
        raise QuantizeError("a layer that cannot be solved")

    stop_measuring(monkeypatch, stop)
    assert refusal(*fresh, "--target-size", "60kB") == "a layer that cannot be solved"
    assert os.listdir(output.parent) == []


def test_too_little_space_for_measuring_is_said_before_it(monkeypatch, fresh, output):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(qtool.budget.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    forbid_measuring(monkeypatch)
    message = refusal(*fresh, "--target-size", "60kB")
    assert message.startswith(f"{output}.work: the run needs ") and "1.0 kB are free; make room" in message
    assert os.listdir(output.parent) == []


def test_memory_is_watched_while_it_measures(monkeypatch, fresh, output):
    stop_measuring(monkeypatch, lambda: None)
    taken = chain([0], repeat(10**12))  # after the text, and after the first block
    monkeypatch.setattr(qtool.budget, "peak_rss_bytes", lambda: next(taken))
    message = refusal(*fresh, "--target-size", "60kB", "--max-memory", "10GB")
    assert message.startswith("--max-memory 10.0 GB: this run needs at least 1.1 TB: block 0 takes that much")
    assert "sweep.part.json" in os.listdir(output.with_name(f"{output.name}.work"))  # the same command goes on from it


def interrupt_in(monkeypatch, name):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gradients, name, stop)


def test_interrupted_before_a_block_is_measured_it_leaves_nothing(monkeypatch, fresh, output):
    """What gradients take on disk is large, and nothing could go on with it."""
    with monkeypatch.context() as patched:
        interrupt_in(patched, "_at_logits")
        assert refusal(*fresh, "--target-size", "60kB") == "interrupted; nothing was left behind"
    assert os.listdir(output.parent) == []


def test_a_model_without_gradients_leaves_nothing(monkeypatch, fresh, output):
    run = BlockwiseModel.run
    monkeypatch.setattr(BlockwiseModel, "run", lambda self, index, x: run(self, index, x).detach())
    message = refusal(*fresh, "--target-size", "60kB")
    assert message.startswith("model.layers.2: its gradients cannot be computed") and message.endswith("; give --bits")
    assert os.listdir(output.parent) == []


def test_a_file_of_the_users_own_is_not_taken_for_a_gradient(fresh, output):
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    (work / "gradient.py").touch()
    assert "has 'gradient.py' in it, which is no run's" in refusal(*fresh, "--target-size", "60kB")
    assert os.listdir(work) == ["gradient.py"]


def test_disk_is_never_more_than_is_said(monkeypatch, fresh, output):
    sizes, path_of, said = [], HiddenStates._path, []
    work = output.with_name(f"{output.name}.work")

    def counting(states, step):
        sizes.append(sum(path.stat().st_size for path in work.iterdir() if path.name[-1].isdigit()))
        return path_of(states, step)

    check = qtool.job.check_disk_for_states
    monkeypatch.setattr(qtool.job, "check_disk_for_states", lambda *a: (said.append(a[1].measuring_bytes), check(*a)))
    monkeypatch.setattr(HiddenStates, "_path", counting)
    dry_run(fresh, "--target-size", "60kB")
    assert 0.8 * said[0] <= max(sizes) <= said[0]


def test_windows_of_all_sources_are_run_backward():
    recipe = Recipe(calibration=CalibrationSpec(source="code.txt,prose.txt,self"))
    assert qtool.sweep._mixed(torch.arange(7).numpy(), recipe).tolist() == [0, 3, 5, 1, 4, 6, 2]
    assert qtool.sweep._mixed(torch.arange(7).numpy(), Recipe()).tolist() == list(range(7))


def test_a_second_target_takes_what_a_run_beside_it_measured(fresh, output, tmp_path):
    assert run_qtool(*fresh, "--target-size", "60kB").exit_code == 0
    second = run_qtool(*fresh, "-o", output.with_name("second.qtm"), "--target-size", "55kB")
    assert second.exit_code == 0
    assert f"losses of each layer are taken from {output}.work" in second.stderr
    assert os.listdir(output.with_name("second.qtm.work")) == ["sweep.json"]


def test_what_a_killed_measurement_left_goes_with_any_run(monkeypatch, fresh, output):
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*fresh, "--target-size", "60kB")) == 9
    assert run_qtool(*fresh, "--bits", "4").exit_code == 0
    assert os.listdir(output.parent) == [output.name]


def test_a_run_that_is_stopped_goes_on_with_the_same_bits(monkeypatch, fresh, output, in_one_go):
    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    assert "1 of 3 blocks are kept in" in interrupt(monkeypatch, command)
    forbid_measuring(monkeypatch)
    result = run_qtool(*command)
    assert result.exit_code == 0 and f"resumes after 1 of 3 blocks, kept in {work}" in result.stderr
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


def test_another_target_does_not_mix_but_can_be_planned(monkeypatch, fresh):
    interrupt(monkeypatch, [*fresh, "--target-size", "60kB"])
    assert dry_run(fresh, "--target-size", "61kB")["layers"]
    monkeypatch.setattr(qtool.pipeline, "meet_target", lambda *args: pytest.fail("measured for nothing"))
    assert "holds another run (" in last_line(fresh, "--target-size", "61kB")


def test_an_output_that_exists_is_refused_before_anything_is_measured(monkeypatch, tiny_files, targeted, output):
    command = [*targeted, "--target-size", "60kB"]
    assert run_qtool(*command).exit_code == 0
    forbid_measuring(monkeypatch)
    message = refusal(*command, *other_text(tiny_files, output.parent))
    assert message == f"{output}: exists already; give another --output or --force"
