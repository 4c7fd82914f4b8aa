"""compressed-tensors checkpoints of packed integers, which vLLM and transformers load."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from formats.export.card import Loading
from formats.export.engine import Engine, export_engine
from formats.export.regrid import Carrier, Form
from formats.export.report import ExportReport
from formats.layer import QuantizedLinear
from formats.layouts.pack_quantized import BITS, check_shape, pack_quantized
from formats.reader import QtmFile


def export_compressed_tensors(
    file: QtmFile, folder: Path, *, dtype: str | None = None, lossy: bool = False, overwrite: bool = False
) -> ExportReport:
    """Write the folder, exact unless `lossy`."""
    return export_engine(file, folder, _CompressedTensors(), dtype=dtype, lossy=lossy, overwrite=overwrite)


class _CompressedTensors(Engine):
    # It has zeros, but its own loader does not make room for those of packed weights (0.20).
    carrier = Carrier("compressed-tensors", BITS, asymmetric=False)
    loading = Loading(format="compressed-tensors", packages=("compressed-tensors",), has_vllm=True)

    def check(self, shape: tuple[int, int], form: Form) -> None:
        check_shape(shape, form.group_size)

    def tensors(self, layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
        return pack_quantized(layer)

    def config(self, forms: Mapping[str, Form], dense: list[str]) -> dict[str, Any]:
        modules = defaultdict(list)
        for module, form in forms.items():
            modules[form].append(module)
        # With one form all linears have it; with several each is named: a class would match first in some readers.
        groups = {
            f"group_{index}": _group(form, ["Linear"] if len(modules) == 1 else [_pattern(names)])
            for index, (form, names) in enumerate(modules.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": dense,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    by_row = form.group_size == -1
    return {
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if by_row else "group",
            "group_size": None if by_row else form.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        },
    }


def _pattern(modules: list[str]) -> str:
    return "re:^(?:" + "|".join(re.escape(name) for name in sorted(modules)) + ")$"
