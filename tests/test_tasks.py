"""`qtool eval tasks`: lm-eval asks the model of a file, a folder beside it; what goes wrong is one line."""

from __future__ import annotations

import builtins
import json

import pytest
from invoke import python, refusal

from qtool import tasks
from qtool.tasks import format_tasks

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path):
    """A task of local files: questions about the tiny models' own words."""
    rows = [{"question": f"the {i} of", "choices": ["one", "two"], "label": i % 2} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path


def test_a_file_is_scored_beside_its_model(tiny_files, folder):
    """In a process of its own, since lm-eval warns of much when it is imported; its own run gives the same score."""
    pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
    file, model = tiny_files.compressed("llama", "--bits", "8"), tiny_files.model("llama")
    command = ("eval", "tasks", file, "--baseline", model, "--tasks", "tiny_choice", "--include-path", folder)
    done = python("-m", "qtool.cli", *command, "--limit", 10, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [row] = found["tasks"]
    assert (row["task"], row["metric"], found["questions"]) == ("tiny_choice", "acc", {"tiny_choice": 10})
    code = f"""
import json, lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
asked = HFLM(pretrained={str(model)!r}, dtype="float32", device="cpu")
manager = TaskManager(include_path={str(folder)!r}, include_defaults=False)
result = lm_eval.simple_evaluate(asked, tasks=["tiny_choice"], task_manager=manager, limit=10)
print(json.dumps(result["results"]["tiny_choice"]))
"""
    own = json.loads(python("-c", code).stdout.splitlines()[-1])
    assert row["baseline"] == own["acc,none"] and row["baseline_error"] == own["acc_stderr,none"]
    assert row["difference"] == row["score"] - row["baseline"]
    assert abs(row["difference"]) <= 0.2  # 8 bits change next to nothing


def test_the_table_has_a_row_for_every_metric():
    results = {
        "b": {"alias": "b", "acc,none": 0.5, "acc_stderr,none": 0.25, "exact_match,strict": 1, "acc_stderr,strict": 0},
        "a": {"perplexity,none": 3.0, "perplexity_stderr,none": "N/A", "sample_len": 4},
    }
    rows = tasks._rows(results)
    assert rows == [
        {"task": "a", "metric": "perplexity", "score": 3.0, "error": None},
        {"task": "b", "metric": "acc", "score": 0.5, "error": 0.25},
        {"task": "b", "metric": "exact_match (strict)", "score": 1.0, "error": None},
    ]
    tasks._compare(rows, [row | {"score": 0.25} for row in rows])
    told = format_tasks(
        {"tasks": rows, "baseline": "m", "questions": {"a": 4}, "lm_eval": "0.4", "seconds": 1.0, "model": "f"}
    ).splitlines()
    assert told[0].split() == ["task", "metric", "score", "+/-", "baseline", "+/-", "difference"]
    assert told[2].split() == ["b", "acc", "0.5000", "0.2500", "0.2500", "0.2500", "0.2500"]
    assert told[-1] == "questions: a 4; lm-eval 0.4, 1 s"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", ","), "--tasks: names no task; give one, as arc_easy"),
        (("--tasks", "a", "--limit", 0), "--limit 0: must be at least 1"),
        (("--tasks", "a", "--num-fewshot", -1), "--num-fewshot -1: must be at least 0"),
        (("--tasks", "a", "--batch-size", 0), "--batch-size 0: must be at least 1"),
        (("--tasks", "a", "--include-path", "/nowhere"),
         "--include-path /nowhere: no such folder; give the one that has the tasks' .yaml files"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options, message):
    assert refusal("eval", "tasks", "model.qtm", *options) == message


def test_without_the_extra(monkeypatch):
    real = builtins.__import__

    def no_lm_eval(name, *args, **kwargs):
        if name == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_lm_eval)
    assert refusal("eval", "tasks", "model.qtm", "--tasks", "a") == tasks.MISSING


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("none.qtm", "none.qtm: no such file; give a .qtm file, a model folder or a hub id"),
        (__file__, f"{__file__}: neither a .qtm file nor a model folder; compress it first"),
        ("/nowhere/model", "/nowhere/model: cannot be loaded: "),
    ],
)
def test_models_that_cannot_be_asked(model, message):
    with pytest.raises(tasks.CheckpointError) as refused:
        tasks._load(model, "cpu")
    assert str(refused.value).startswith(message)


def test_data_out_of_reach_is_told_with_the_task():
    with pytest.raises(tasks.ConfigError) as refused, tasks._naming_tasks(["arc_easy"]):
        raise ConnectionError("Couldn't reach the Hub")
    assert str(refused.value) == (
        "--tasks arc_easy: the data cannot be loaded (Couldn't reach the Hub); offline, give tasks of local files by "
        "--include-path"
    )


def test_a_task_that_nobody_knows(tiny_files, folder):
    pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
    code = (
        "import sys; from lm_eval.tasks import TaskManager; import lm_eval.tasks as found; from qtool.cli import main\n"
        "found.TaskManager = lambda include_path=None, include_defaults=False: "  # its own 15,000 take half a minute
        "TaskManager(include_path=include_path, include_defaults=False)\n"
        f"sys.argv = ['qtool', 'eval', 'tasks', {str(tiny_files.compressed('llama'))!r}, '--tasks', 'nope', "
        f"'--include-path', {str(folder)!r}]; main()"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    line = "Error: --tasks nope: no such task; lm-eval ls tasks lists them, --include-path adds your own"
    assert done.stderr.splitlines()[-1] == line


def test_an_encoder_decoder_is_asked_as_one(tiny_files):
    for model in (tiny_files.model("t5"), tiny_files.compressed("t5")):
        assert type(tasks._load(str(model), "cpu")[0]).__name__ == "T5ForConditionalGeneration"
