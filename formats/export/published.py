"""Weights under the names and in the pieces of published checkpoints: one tensor of experts here is many there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from formats.errors import FormatError
from formats.experts import fuse_experts

_ROWS = 1 << 32


@dataclass(frozen=True, slots=True)
class Rows:
    """Some outputs of a weight [out, in]; None: all, as they are."""

    name: str
    rows: npt.NDArray[np.int64] | None


def published_rows(model: PreTrainedModel, n_outputs: Mapping[str, int]) -> dict[str, Rows]:
    """What each published weight is made of.  n_outputs: of weights of `model`; of a mixture all or none

    FormatError for experts that are published as one tensor.
    """
    names = list(n_outputs)
    # Every row carries its number through transformers' own conversion, which cannot be asked what it does.
    numbered = {name: (torch.arange(n) + index * _ROWS)[:, None] for index, (name, n) in enumerate(n_outputs.items())}
    found = {}
    for published, numbers in publish(model, numbered).items():
        if numbers.dim() != 2 or numbers.shape[1] != 1:
            raise FormatError(f"{published} is one tensor for all experts, of which other engines load no codes")
        flat = numbers[:, 0].numpy()
        name, rows = names[int(flat[0]) // _ROWS], flat % _ROWS
        is_whole = len(rows) == n_outputs[name] and bool((rows == np.arange(len(rows))).all())
        found[published] = Rows(name, None if is_whole else rows)
    return found


def publish(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `model` as checkpoints have them; of a mixture all or none are given."""
    return revert_weight_conversion(model, fuse_experts(model, tensors)) if tensors else {}
