"""Blocks × stages: load, calibrate, quantize, pack, one block at a time. The only file that knows the order."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import qtool
from calibration.capture import HessianCapture
from calibration.corpus import calibration_windows
from calibration.hessian import LayerStats
from calibration.windows import TokenWindows
from formats.encoding import encoding_of
from formats.errors import error_context
from formats.loader import GENERATION_CONFIG
from formats.section import pack
from formats.skeleton import set_tensor
from formats.writer import Writer
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.gptq import Factor, Solution, factorize, gptq_quantize, rtn_quantize
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32, release_free_memory
from qtool.pack import dense_section, rounded_section
from qtool.plan import TensorPlan, plan_tensors
from qtool.recipe import Recipe
from qtool.sample import sample_from

LEFT_OUT_OF_CONFIG = ("_name_or_path", "_model_name_or_path", "auto_map")  # paths, and code that is never run
TOKENS_PER_BATCH = 1024
"""Tokens run through a block at a time: enough for full matrix speed, little enough for short temporaries."""


@dataclass(slots=True)
class RunReport:
    """What a run did, for the CLI to print."""

    relative_errors: dict[str, float] = field(default_factory=dict)
    harder_damped: dict[str, float] = field(default_factory=dict)  # layer -> the percdamp it took
    uncalibrated: list[str] = field(default_factory=list)  # layers no token reached, rounded to nearest
    seconds: float = 0.0


def compress(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> RunReport:
    """Write `output`, the compressed model. Nothing appears under that name unless the whole run succeeds.

    `warn` is handed each line that the user should read, as soon as it is known.
    """
    started = time.perf_counter()
    report = RunReport()
    with exact_float32(), Writer(output, overwrite=overwrite) as writer:
        tokenizer = checkpoint.tokenizer()  # first: the cheapest thing that can be missing
        model = BlockwiseModel(checkpoint)
        if unused := checkpoint.unused():
            names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            warn(f"{len(unused)} stored tensors are not part of the model that config.json describes: {names}")
        run = _Run(model, plan_tensors(model, recipe), writer, report)
        windows = None
        if recipe.linears.method != "rtn":
            windows = draw_sample(model, recipe, tokenizer)
            for line in (*windows.warnings, *windows.notes):
                warn(line)
        run.blocks(windows)
        for name, data in tokenizer_files(tokenizer).items():
            writer.add_file(name, data)
        writer.add_file(GENERATION_CONFIG, checkpoint.generation_config().to_json_string().encode())
        writer.finish(**_header(model, recipe, windows, report))
    report.seconds = time.perf_counter() - started
    return report


def draw_sample(model: BlockwiseModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
    """The calibration windows of a recipe, cut to the model's context."""
    spec = recipe.calibration
    windows = calibration_windows(
        spec.source,
        lambda text: list(tokenizer(text, verbose=False).input_ids),
        n_samples=spec.samples,
        seq_len=min(spec.seq_len, model.max_seq_len or spec.seq_len),
        seed=spec.seed,
        text_field=spec.text_field,
        sample_self=sample_from(model),
    )
    model.check_tokens(torch.from_numpy(windows.ids))
    return windows


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name -> content of the tokenizer as transformers saves it, chat template included."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


class _Run:
    """One pass over the model, from the first tensor to the last."""

    def __init__(self, model: BlockwiseModel, plan: list[TensorPlan], writer: Writer, report: RunReport) -> None:
        self.model, self.writer, self.report = model, writer, report
        self.plan = {tensor.name: tensor for tensor in plan}

    def blocks(self, windows: TokenWindows | None) -> None:
        """Write every tensor; with calibration windows, hand each block the quantized blocks' output."""
        hidden = self._outside(windows)
        count = len(self.model.blocks)
        with tqdm(total=count, unit="block", desc="quantize", disable=None) as bar:
            for index in range(count):
                bar.set_description(f"quantize block {index + 1} of {count}")
                with self.model.block(index):
                    self._block(index, hidden, bar)
                release_free_memory()
                bar.update()

    def _outside(self, windows: TokenWindows | None) -> list[Tensor]:
        """Write what lies outside the blocks; returns the first block's inputs, a batch [b, seq, hidden] each."""
        names = self.model.outside_names()
        with self.model.materialised(names):
            for name in names:
                decoded = self._write(self.plan[name])
                if decoded is not None and windows is not None:
                    set_tensor(self.model.skeleton, name, decoded)  # blocks are calibrated on what will be looked up
            if windows is None:
                return []
            self.model.skeleton.tie_weights()
            batch = max(1, TOKENS_PER_BATCH // windows.ids.shape[1])
            return [self.model.embed(ids) for ids in torch.from_numpy(windows.ids).split(batch)]

    def _block(self, index: int, hidden: list[Tensor], bar: tqdm[Any]) -> None:
        """Calibrate, quantize and write one block; leave its quantized outputs in `hidden`."""
        stats: dict[str, LayerStats] = {}
        if hidden:
            stats = HessianCapture(self.model.linears(index)).run(lambda x: self.model.run(index, x), hidden)
        block = f"{self.model.block_name(index)}."
        tensors = [self.plan[name] for name in self.model.tensor_names(block)]
        for readers in _by_input([t for t in tensors if t.spec is not None], stats):
            for tensor, solution in self._solve(readers, stats.get(readers[0].layer)):
                self._write_solution(tensor, solution)
                bar.set_postfix_str(f"{tensor.layer.removeprefix(block)} error {solution.relative_error:.2e}")
        for tensor in tensors:
            if tensor.spec is None:
                self._write(tensor)
        if index + 1 < len(self.model.blocks):
            for states in hidden:
                states.copy_(self.model.run(index, states))

    def _solve(self, readers: list[TensorPlan], stats: LayerStats | None) -> Iterator[tuple[TensorPlan, Solution]]:
        """Quantize the linears that read one input, and put their decoded weights in the model."""
        weights = [self._weight(tensor) for tensor in readers]
        factor: Factor | None = None
        for tensor, weight in zip(readers, weights, strict=True):
            assert tensor.spec is not None
            with error_context(tensor.name):
                if tensor.spec.method == "rtn" or stats is None:
                    solution = rtn_quantize(weight, tensor.spec)
                else:
                    factor = factor or factorize(stats, weights, tensor.spec, tensor.name)
                    solution = gptq_quantize(weight, factor, tensor.spec)
            if stats is None and tensor.spec.method != "rtn":
                self.report.uncalibrated.append(tensor.name)
            if factor is not None and factor.percdamp > tensor.spec.percdamp:
                self.report.harder_damped[tensor.name] = factor.percdamp
            decoded = solution.decoded.T.contiguous() if tensor.transposed else solution.decoded
            set_tensor(self.model.skeleton, tensor.name, decoded)
            yield tensor, solution

    def _weight(self, tensor: TensorPlan) -> Tensor:
        """The weight [out, in] f32 of a linear that is materialised."""
        weight = find_tensor(self.model.skeleton, tensor.name)
        return weight.T if tensor.transposed else weight

    def _write(self, tensor: TensorPlan) -> Tensor | None:
        """STAGE 5, pack: append a tensor that no solver touches; returns its decoded values if it was rounded."""
        values, decoded = find_tensor(self.model.skeleton, tensor.name), None
        if tensor.spec is None:
            section: Any = dense_section(values, tensor)
        else:
            with error_context(tensor.name):
                section, decoded = rounded_section(values, tensor)
        self.writer.add_tensor(tensor.name, tensor.shape, tensor.encoding, section)
        return decoded

    def _write_solution(self, tensor: TensorPlan, solution: Solution) -> None:
        """STAGE 5, pack: append a layer that was solved."""
        self.report.relative_errors[tensor.name] = solution.relative_error
        self.writer.add_tensor(
            tensor.name,
            tensor.shape,
            encoding_of(solution.layer),
            pack(solution.layer),
            transposed=tensor.transposed,
            relative_error=solution.relative_error,
        )


def _by_input(tensors: list[TensorPlan], stats: dict[str, LayerStats]) -> list[list[TensorPlan]]:
    """Linears grouped by the statistics they share, in the model's order; without statistics, each alone."""
    groups: dict[int, list[TensorPlan]] = {}
    for tensor in tensors:
        key = id(stats[tensor.layer]) if tensor.layer in stats else -1 - len(groups)
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def _header(
    model: BlockwiseModel, recipe: Recipe, windows: TokenWindows | None, report: RunReport
) -> dict[str, dict[str, Any]]:
    """The free objects of the file's header. No time stamps and no paths: the same run gives the same bytes."""
    checkpoint = model.checkpoint
    config = json.loads(checkpoint.config.to_json_string(use_diff=False))
    values = recipe.to_dict()
    if windows is None:
        values["calibration"] = None
    else:  # as it was drawn: windows end at the model's context
        samples, seq_len = windows.ids.shape
        values["calibration"] |= {"source": windows.source, "samples": samples, "seq_len": seq_len}
    return {
        "model": {
            "model_type": checkpoint.config.model_type,
            "architecture": type(model.skeleton).__name__,
            "blocks": model.block_list,
            "config": {k: v for k, v in config.items() if k not in LEFT_OUT_OF_CONFIG},
        },
        "recipe": values,
        "provenance": {
            "qtool": qtool.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "source_format": checkpoint.format,
            "source_files": [{"name": name, "bytes": size} for name, size in checkpoint.source_files()],
            "calibration_sha256": windows.sha256 if windows else None,
        },
        "quality": {
            "mean_relative_error": float(np.mean(list(report.relative_errors.values()) or [0.0])),
            "harder_damped": report.harder_damped,
            "uncalibrated": report.uncalibrated,
        },
    }
