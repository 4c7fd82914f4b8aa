"""GPTQ checkpoints, which transformers, vLLM, SGLang, TGI and GPTQModel load."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from formats.export.card import Loading
from formats.export.engine import Engine, export_engine
from formats.export.regrid import Carrier, Form
from formats.export.report import ExportReport
from formats.layer import QuantizedLinear
from formats.layouts.gptq import BITS, FORMATS, check_shape, pack_gptq
from formats.reader import QtmFile

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM runs as one: it asks for what they are under a name of its own."""


def export_gptq(
    file: QtmFile,
    folder: Path,
    *,
    version: int = 2,
    dtype: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write the folder, exact unless `lossy`; `version` 1 is for readers that know no other, and has no zero of 0."""
    return export_engine(file, folder, _Gptq(version), dtype=dtype, lossy=lossy, overwrite=overwrite)


class _Gptq(Engine):
    def __init__(self, version: int) -> None:
        self.version = version
        given = ("--gptq-version", "1") if version == 1 else ()
        self.loading = Loading(format="gptq", packages=("gptqmodel",), has_vllm=True, options=given)
        self.carrier = Carrier(
            "gptq version 1" if version == 1 else "gptq", BITS, least_zero=1 if version == 1 else 0, ordered=True
        )

    def check(self, shape: tuple[int, int], form: Form) -> None:
        check_shape(shape)

    def tensors(self, layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
        return pack_gptq(layer, self.version)

    def config(self, forms: Mapping[str, Form], dense: list[str]) -> dict[str, Any]:
        is_ordered = any(form.is_ordered for form in forms.values())
        forms = {module: replace(form, is_ordered=False) for module, form in forms.items()}
        base = Counter(forms.values()).most_common(1)[0][0]
        return {
            "quant_method": "gptq",
            "checkpoint_format": FORMATS[self.version],
            **_fields(base),
            "desc_act": is_ordered,
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["qtool:0.1.0"]},
        } | _dynamic(forms, base, dense)

    def files(self, config: dict[str, Any]) -> dict[str, str]:
        """Older readers look into a file of its own."""
        return {"quantize_config.json": json.dumps(config, indent=2) + "\n"}


def _fields(form: Form) -> dict[str, Any]:
    return {"bits": form.bits, "group_size": form.group_size, "sym": form.symmetric}


def _dynamic(forms: Mapping[str, Form], base: Form, dense: list[str]) -> dict[str, Any]:
    """What differs from `base`: regular expressions that are matched with names, `-:` before those left dense."""
    by_form = defaultdict(list)
    for module, form in forms.items():
        if form != base:
            by_form[form].append(module)
    rules: dict[str, Any] = {f"+:{_pattern(modules)}": _fields(form) for form, modules in by_form.items()}
    left = [module for module in dense if module != "lm_head"]
    if left:
        rules[f"-:{_pattern(left)}"] = {}
    return {"dynamic": rules} if rules else {}


def _pattern(modules: list[str]) -> str:
    """Matches these, and what vLLM makes of them, and nothing else."""
    names, found = set(modules), list(modules)
    for merged, parts in MERGED.items():
        for parent in {module.rpartition(".")[0] for module in modules}:
            if all(f"{parent}.{part}" in names for part in parts):
                found.append(f"{parent}.{merged}")
    return "^(?:" + "|".join(re.escape(name) for name in sorted(found)) + ")$"
