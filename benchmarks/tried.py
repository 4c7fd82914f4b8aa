"""What other solvers do and qtool does not, and why: each of it tried on the trellis in 3 bits.

    python -m benchmarks.tried --model build/reference-0

The same loop as the pipeline's (load, calibrate, quantize, hand on), with what is tried put in. It prints the ratio of
perplexities and the relative error of the hidden states behind the last block, on the calibration windows: a small
error there is not always a small loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.tools import parser, print_table
from calibration.capture import HessianCapture
from calibration.corpus import read_text
from calibration.hessian import LayerStats
from formats.skeleton import set_tensor
from qtool.checkpoint import find_tensor, open_checkpoint
from qtool.factor import factorize
from qtool.gptq import gptq_quantize
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32, quiet_transformers
from qtool.options import build_recipe
from qtool.sample import draw_sample

SEQ_LEN, SAMPLES, SCORED = 1024, 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is done otherwise."""

    propagate: bool = True  # a block is calibrated on the quantized blocks' output, not on the uncompressed model's
    sequential: bool = False  # inside a block too: o_proj sees what quantized q, k and v give (GPTQ's true-sequential)
    asymmetric: float = 0.0  # share of W (X - X') X'^T H^-1 that is added first (GPTAQ, arXiv 2504.02692)


TRIALS = {
    "as it is": Trial(),
    "true-sequential": Trial(sequential=True),
    "uncompressed inputs": Trial(propagate=False),
    "a quarter of the asymmetric correction": Trial(asymmetric=0.25),
    "half of it": Trial(asymmetric=0.5),
}


def main() -> None:
    args = parser(__doc__).parse_args()
    with exact_float32(), quiet_transformers():
        bench = Bench(args.model, args.calibration, args.data)
        base, _ = bench.run(None)
        rows = []
        for name, trial in TRIALS.items():
            perplexity, error = bench.run(trial)
            rows.append((name, f"{perplexity / base:.3f}", f"{error:.4f}"))
            print(*rows[-1], sep=", ", flush=True)
    print_table(("3 bits", "ratio", "error of the hidden states"), rows)


class Bench:
    """A model, the windows that it is calibrated on, and those that are scored."""

    def __init__(self, model: Path, calibration: Path, data: Path) -> None:
        checkpoint = open_checkpoint(str(model))
        tokenizer, self.model = checkpoint.tokenizer(), BlockwiseModel(checkpoint)
        recipe = build_recipe(
            calibration=str(calibration), text_field="text", samples=SAMPLES, seq_len=SEQ_LEN, seed=0, embeddings=16,
            method="gptq", number_format="trellis", effort="default", outliers=None, outlier_threshold=None, bits=3,
        )  # fmt: skip
        self.spec = recipe.linears
        self.calibration = torch.from_numpy(draw_sample(self.model, recipe, tokenizer, keep_own=Path()).ids)
        ids = torch.tensor(tokenizer(read_text(str(data), split="test").joined(), verbose=False).input_ids)
        self.scored = ids[: SCORED * SEQ_LEN].view(SCORED, SEQ_LEN)

    def run(self, trial: Trial | None) -> tuple[float, float]:
        """(perplexity, relative error of the last hidden states); None: of the uncompressed model."""
        with self.model.materialised(self.model.outside_names(head=False)):
            exact = [self.model.embed(ids) for ids in self.calibration.split(1)]
            scored = [self.model.embed(ids) for ids in self.scored.split(1)]
        states = exact
        for index in range(len(self.model.blocks)):
            with self.model.block(index):
                following = [self.model.run(index, x) for x in exact] if trial else exact
                if trial:
                    self._quantize(index, trial, exact, states)
                    states = [self.model.run(index, x) for x in states]
                exact, scored = following, [self.model.run(index, x) for x in scored]
        lost = sum(float((a - b).square().sum()) for a, b in zip(exact, states, strict=True))
        energy = sum(float(a.square().sum()) for a in exact)
        return self._perplexity(scored), lost / energy

    def _perplexity(self, hidden: Iterable[Tensor]) -> float:
        with self.model.outside(head=True):
            losses = [
                float(cross_entropy(self.model.logits(x)[0, :-1], ids[1:]))
                for x, ids in zip(hidden, self.scored, strict=True)
            ]
        return math.exp(math.fsum(losses) / len(losses))

    def _quantize(self, index: int, trial: Trial, exact: list[Tensor], states: list[Tensor]) -> None:
        stats = self._calibrate(index, states if trial.propagate else exact)
        corrections = self._corrections(index, stats, exact, states) if trial.asymmetric else {}
        groups = list(_by_input(stats))
        for position, names in enumerate(groups):
            if trial.sequential and position:
                stats = self._calibrate(index, states)
            weights = [find_tensor(self.model.skeleton, f"{name}.weight") for name in names]
            if corrections:
                weights = [w + trial.asymmetric * (w @ corrections[names[0]]) for w in weights]
            factor = factorize(stats[names[0]], weights, self.spec, names[0])
            for name, weight in zip(names, weights, strict=True):
                set_tensor(self.model.skeleton, f"{name}.weight", gptq_quantize(weight, factor, self.spec).decoded)

    def _calibrate(self, index: int, states: list[Tensor]) -> dict[str, LayerStats]:
        return HessianCapture(self.model.linears(index)).run(lambda x: self.model.run(index, x), states)

    def _corrections(
        self, index: int, stats: dict[str, LayerStats], exact: list[Tensor], states: list[Tensor]
    ) -> dict[str, Tensor]:
        """(X - X') X'^T H^-1 [in, in] of each group's first linear: what would undo the error of its inputs X'."""
        found: dict[str, Tensor] = {}
        for names in _by_input(stats):
            hessian = stats[names[0]].hessian.double()
            moment = torch.zeros_like(hessian)
            for x, moved in zip(exact, states, strict=True):
                inputs = [self._input(index, names[0], batch).double() for batch in (x, moved)]
                moment += (inputs[0] - inputs[1]).T @ inputs[1] / stats[names[0]].n_tokens
            hessian.diagonal().add_(self.spec.percdamp * hessian.diagonal().mean())
            found[names[0]] = torch.linalg.solve(hessian, moment.T).T.float()
        return found

    def _input(self, index: int, name: str, batch: Tensor) -> Tensor:
        """What a linear of the block reads [tokens, in] for a batch of the block's inputs."""
        seen: list[Tensor] = []
        hook = self.model.linears(index)[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.model.run(index, batch)
        hook.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])


def _by_input(stats: dict[str, LayerStats]) -> Iterator[list[str]]:
    """Linears that read one input, in the order of the block."""
    groups: dict[int, list[str]] = {}
    for name, shared in stats.items():
        groups.setdefault(id(shared), []).append(name)
    yield from groups.values()


if __name__ == "__main__":
    main()
