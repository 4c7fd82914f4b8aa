"""What the fault campaign disturbs: one compress command over a small random model, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCKS, LINEARS = 6, 7  # linears of a block
RECIPE = ("--group-size", "64", "--samples", "8", "--seq-len", "128")
PATIENCE_S = 300.0
# One thread: on a machine that others use too, threads that wait for each other take ten times as long.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# As the installed command does; `python -m` would end by SIGINT once an interrupt has gone through an exec() of text.
START = "import sys; from qtool.cli import main; "
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "


@dataclass(frozen=True, slots=True)
class Kill:
    """A signal, and how long after its start a run gets it."""

    signal: signal.Signals
    delay_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended. `begun`: the command line had taken over from Python's start when the signal was sent."""

    code: int
    stdout: str
    stderr: str
    sent: signal.Signals | None = None
    begun: bool = False

    @property
    def by_itself(self) -> bool:
        """No signal was sent, or one that came too late."""
        return self.sent is None or self.stdout != "" or "exists already" in self.stderr

    @property
    def is_interrupted(self) -> bool:
        """One line, as the command line promises."""
        lines = self.stderr.splitlines()
        n_errors = sum(line.startswith("Error: ") for line in lines)
        ends_well = self.code == 1 and n_errors == 1 and lines[-1].startswith("Error: interrupted; ")
        return ends_well and "Traceback" not in self.stderr

    def __str__(self) -> str:
        return f"exit code {self.code}, stderr ...{self.stderr[-600:]!r}"


class Job:
    """One compress command that is run again and again in the same folder, and the bytes that it has to give."""

    def __init__(self, work: Path) -> None:
        self.folder, self.log, self.work = work / "run", work / "run.jsonl", work
        self.output = self.folder / "out.qtm"
        text, model = work / "text.txt", make_model(work / "model")
        text.write_text(" ".join(str(number) for number in range(20_000)), encoding="utf-8")
        self.command = ["compress", model, "-o", self.output, *RECIPE, "--calibration", text, "--log-file", self.log]
        self.wanted = self.other = b""
        self.imports_s = self.whole_s = 0.0

    def measure(self) -> None:
        """Make the wanted file, and one from other windows of the text; note how long a run takes."""
        for seed in (1, 0):
            self.empty()
            start = time.perf_counter()
            ended = self.run(options=("--seed", str(seed)))
            self.whole_s = time.perf_counter() - start
            if ended.code:
                sys.exit(f"a run that nothing disturbs fails: {ended}")
            self.imports_s = self.whole_s - float(json.loads(ended.stdout)["seconds"])
            self.wanted, self.other = self.output.read_bytes(), self.wanted

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def n_finished(self) -> int:
        """Steps in the journal."""
        journal = self.folder / f"{self.output.name}.work" / "journal.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def run(self, kill: Kill | None = None, limit_bytes: int | None = None, options: tuple[str, ...] = ()) -> Ended:
        """Start the command in a process of its own, and wait for its end."""
        self.log.unlink(missing_ok=True)
        limit = "" if limit_bytes is None else LIMITED.format(limit_bytes)
        # -B: at a limit, Python 3.11 would leave half a .pyc behind.
        start = [sys.executable, "-B", "-c", f"{START}{limit}sys.exit(main())"]
        command = [*start, *map(str, self.command), "--json", *options]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
            if kill is None:
                output = _end_of(process)
                return Ended(process.returncode, *output)
            try:
                output = process.communicate(timeout=kill.delay_s)
            except subprocess.TimeoutExpired:
                begun = _has_begun(process.pid)
                process.send_signal(kill.signal)
                output = _end_of(process)
                return Ended(process.returncode, *output, kill.signal, begun)
            return Ended(process.returncode, *output)

    def check_stopped(self, n_before: int) -> list[str]:
        """What is wrong with what a stopped run left."""
        if self.output.exists():
            return [] if self.output.read_bytes() == self.wanted else ["another file under the final name"]
        n_now = self.n_finished()
        return [f"{n_before} steps were finished, {n_now} are left"] if n_now < n_before else []

    def finish(self, ended: Ended, n_before: int, *, was_there: bool, lock_may_stay: bool) -> list[str]:
        """What is wrong with a run that nothing stopped, from `n_before` finished steps, and with what it left."""
        problems = []
        repeated = was_there and "exists already" in ended.stderr  # only the lock or the manifest was left to remove
        if ended.code and not ended.stdout and not repeated:
            problems.append(f"the next run: {ended}")
        if not self.output.exists() or self.output.read_bytes() != self.wanted:
            problems.append("other bytes than those of a run in one go")
        left = {path.name for path in self.folder.iterdir()} - {self.output.name}
        if left - ({f".{self.output.name}.lock"} if repeated and lock_may_stay else set()):
            problems.append(f"left behind: {sorted(left)}")
        n_layers = len(self.log.read_bytes().splitlines()) if self.log.exists() else 0
        n_needed = 0 if was_there else LINEARS * (BLOCKS - max(n_before - 1, 0))
        if n_layers != n_needed:
            problems.append(f"{n_layers} layers were quantized, {n_needed} were left to do")
        return problems


def _end_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it has written when it has ended; a process that hangs is killed."""
    try:
        return process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        return stdout, f"{stderr}\nhas not ended within {PATIENCE_S:.0f} s"


def _has_begun(pid: int) -> bool:
    """Whether a process catches SIGTERM, which the command line does and Python's start does not."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def make_model(folder: Path) -> Path:
    """A random Llama of five million weights, whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=768, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={mark: i for i, mark in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
