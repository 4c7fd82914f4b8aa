"""The calibration windows of a run, and the text that the model writes itself (`--calibration self`)."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from calibration.corpus import SampleSelf, calibration_windows
from calibration.windows import TokenWindows
from qtool.errors import ConfigError
from qtool.journal import write_durably
from qtool.model import BlockwiseModel
from qtool.recipe import Recipe

SAMPLES_PER_BATCH = 8


def draw_sample(
    model: BlockwiseModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, keep_own: Path
) -> TokenWindows:
    """The calibration windows of a recipe, cut to the model's context.

    What the model writes itself takes long: it is kept in `keep_own`, and taken from there if that exists.
    """
    spec = recipe.calibration
    if model.has_encoder and "self" in spec.sources:
        raise ConfigError(
            f"--calibration {spec.source}: an encoder-decoder ({model.config.model_type}) continues a text, and writes "
            "none of its own; give a text"
        )
    windows = calibration_windows(
        spec.source,
        lambda text: list(tokenizer(text, verbose=False).input_ids),
        n_samples=spec.samples,
        seq_len=model.window_length(spec.seq_len),
        seed=spec.seed,
        text_field=spec.text_field,
        sample_self=_kept(sample_from(model), keep_own),
    )
    model.check_tokens(torch.from_numpy(windows.ids))
    return windows


def _kept(sample: SampleSelf, path: Path) -> SampleSelf:
    def sample_or_load(n_samples: int, seq_len: int, seed: int) -> npt.NDArray[np.int64]:
        with suppress(OSError, ValueError, EOFError):  # what is torn is sampled again
            kept: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
            return kept
        ids, data = sample(n_samples, seq_len, seed), io.BytesIO()
        np.save(data, ids)
        write_durably(path, data.getvalue())
        return ids

    return sample_or_load


def sample_from(model: BlockwiseModel) -> SampleSelf:
    """A sampler (n_samples, seq_len, seed) -> ids [n_samples, seq_len] int64, each beginning with BOS.

    This is the one stage that holds the whole model, in float32: text cannot be written a block at a time.
    """

    def sample(n_samples: int, seq_len: int, seed: int) -> npt.NDArray[np.int64]:
        with model.materialised(model.tensor_names()), torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = [min(SAMPLES_PER_BATCH, n_samples - i) for i in range(0, n_samples, SAMPLES_PER_BATCH)]
            return np.concatenate([_generate(model, size, seq_len) for size in sizes])

    return sample


def _generate(model: BlockwiseModel, n_samples: int, seq_len: int) -> npt.NDArray[np.int64]:
    start = _start_token(model)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,  # plain sampling at temperature 1: the model's own distribution
        min_new_tokens=seq_len - 1,
        max_new_tokens=seq_len - 1,
        pad_token_id=start,
        eos_token_id=None,
    )
    prompt = torch.full((n_samples, 1), start)
    ids = cast(Any, model.skeleton).generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return ids.numpy().astype(np.int64)  # type: ignore[no-any-return]


def _start_token(model: BlockwiseModel) -> int:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(model.config, name, None)
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None and 0 <= token < model.vocab_size:
            return int(token)
    return 0
