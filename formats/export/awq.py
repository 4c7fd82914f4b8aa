"""AWQ checkpoints (`gemm`), which transformers, vLLM and SGLang load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from formats.errors import FormatError
from formats.export.card import Loading
from formats.export.engine import Engine, export_engine
from formats.export.regrid import Carrier, Form
from formats.export.report import ExportReport
from formats.layer import QuantizedLinear
from formats.layouts.awq import BITS, check_shape, pack_awq
from formats.reader import QtmFile


def export_awq(
    file: QtmFile, folder: Path, *, dtype: str | None = None, lossy: bool = False, overwrite: bool = False
) -> ExportReport:
    """Write the folder, exact unless `lossy`. 2 and 3 bits go into 4."""
    return export_engine(file, folder, _Awq(), dtype=dtype, lossy=lossy, overwrite=overwrite)


class _Awq(Engine):
    carrier = Carrier("awq", BITS)
    loading = Loading(format="awq", packages=("gptqmodel",), has_vllm=True)

    def check(self, shape: tuple[int, int], form: Form) -> None:
        check_shape(shape, form.group_size)

    def tensors(self, layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
        return pack_awq(layer)

    def config(self, forms: Mapping[str, Form], dense: list[str]) -> dict[str, Any]:
        """One group size for all: the format has no more."""
        first, *others = forms.items()
        for module, form in others:
            if form.group_size != first[1].group_size:
                raise FormatError(
                    f"{first[0]} has groups of {first[1].group_size}, {module} of {form.group_size}: awq has one size"
                )
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS[0],
            "group_size": first[1].group_size,
            "zero_point": True,
            "modules_to_not_convert": dense,
        }
