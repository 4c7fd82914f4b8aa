"""Layers solved by the workers of a Ray cluster: the same bytes, also when one is killed in the middle."""

from __future__ import annotations

import builtins
import json
import os
import signal

import pytest
from invoke import qtool_json, refusal, run_qtool

from qtool import cluster
from qtool.errors import ConfigError
from qtool.solve import Work

ray = pytest.importorskip("ray")

OPTIONS = ("--min-expert-tokens", "8")


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a cluster of two nodes on this machine; its workers stay from test to test."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False)
    yield made.address
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def command(tiny_files, output):
    return ["compress", tiny_files.model("qwen2_moe"), "-o", output, *tiny_files.compress_options(*OPTIONS)]


@pytest.fixture
def whole(tiny_files):
    return tiny_files.compressed("qwen2_moe", *OPTIONS).read_bytes()


def test_two_nodes_give_the_same_bytes_though_a_worker_is_killed_in_the_middle(
    two_nodes, command, whole, output, tmp_path, monkeypatch
):
    """The first process to solve a certain layer kills itself; Ray hands the work to another."""
    monkeypatch.setattr(cluster, "_solve_there", _suicidal(tmp_path / "killed", cluster._solve_there))
    result = run_qtool(*command, "--cluster", two_nodes)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "killed").read_text().isdigit()
    assert output.read_bytes() == whole


def test_independent_blocks_are_solved_in_parallel_with_the_same_bytes(two_nodes, command, tiny_files, output):
    result = run_qtool(*command, "--independent", "--cluster", two_nodes)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == tiny_files.compressed("qwen2_moe", *OPTIONS, "--independent").read_bytes()


def last_line(*command):
    """What a refused run ends with; Ray may have said something before, and after it, as the tests stay connected."""
    result = run_qtool(*command)
    assert result.exit_code == 1
    assert all("(raylet)" in line for line in result.stdout.splitlines())
    return result.stderr.splitlines()[-1]


def _suicidal(marker, solve):
    def solve_there(work, *args):
        if "model.layers.1.self_attn.o_proj.weight" in work.names and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(work, *args)

    return solve_there


def test_work_that_kills_every_worker_is_given_up_with_one_line(two_nodes, command, output, monkeypatch):
    def solve_there(work, *args):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cluster, "RETRIES", 0)
    monkeypatch.setattr(cluster, "_solve_there", solve_there)
    message = last_line(*command, "--cluster", two_nodes)
    assert f"--cluster {two_nodes}: model.layers.0.self_attn.q_proj.weight: given up after 1 tries" in message
    assert not output.exists()


def test_an_error_of_the_work_is_told_as_it_is_here(two_nodes, command, monkeypatch):
    def solve_there(work, *args):
        from qtool.errors import QuantizeError

        raise QuantizeError(f"{work.names[0]}: no")

    monkeypatch.setattr(cluster, "_solve_there", solve_there)
    assert last_line(*command, "--cluster", two_nodes).startswith("Error: model.layers.0.self_attn.q_proj.weight: no")


def test_a_worker_with_other_versions_is_refused():
    work = Work(names=["a"], weights=[], specs=[], stats=[None])
    with pytest.raises(ConfigError, match=r"^--cluster: a worker has {'qtool': .* install the same on all machines$"):
        cluster._solve_there(work, 1, {"qtool": "0.0"})


def test_a_dry_run_looks_at_the_cluster_and_says_what_its_workers_take(two_nodes, command, monkeypatch):
    found = run_qtool(*command, "--cluster", two_nodes, "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    estimate = json.loads(found.stdout[found.stdout.index("{") :])
    assert estimate["workers"] == 2 and estimate["worker_bytes"] > 500_000_000
    line = next(line for line in run_qtool(*command, "--cluster", two_nodes, "--dry-run").stdout.splitlines()
                if line.startswith("cluster "))  # fmt: skip
    assert line.endswith(" MB, and Ray's object store, come on top") and "2 workers of about " in line
    monkeypatch.setattr(cluster, "versions", lambda: {"qtool": "0.0"})
    assert "--cluster: a worker has {'qtool': " in last_line(*command, "--cluster", two_nodes, "--dry-run")


def test_a_dry_run_without_a_cluster_has_no_workers(command):
    assert qtool_json(*command, "--dry-run")["workers"] == 0
    message = refusal(*command, "--cluster", "127.0.0.1:1", "--dry-run")
    assert message.startswith("--cluster 127.0.0.1:1: cannot be reached ([Errno 111] Connection refused)")


def test_an_address_where_nothing_is(command):
    message = refusal(*command, "--cluster", "127.0.0.1:1")
    assert message.startswith("--cluster 127.0.0.1:1: cannot be reached ([Errno 111] Connection refused)")


def test_without_ray(command, monkeypatch):
    real = builtins.__import__

    def no_ray(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    assert refusal(*command, "--cluster", "local") == "--cluster local: needs the extra: pip install 'qtool[cluster]'"
