"""Which peers are measured, with which settings, and the packages each of them runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table. module: of this package. options: see the module. note: what a reader must know."""

    peer: str
    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


# By module. Peers need different versions of the same packages, so none shares an environment with another or qtool.
PACKAGES = {
    "llama_cpp": ("cyllama==0.2.18", "gguf==0.19.0", "numpy==2.4.6", "safetensors==0.8.0"),
    "llama_cpp_engine": ("llama-cpp-python==0.3.36", "numpy==2.4.6"),  # there is no wheel: it is built
    "hqq": ("hqq==0.2.8.post1", "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6"),
    "auto_round": ("auto-round==0.16.1", "torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6"),
    "gptq_engine": (*("gptqmodel==7.6.0", "optimum==2.3.0", "torch==2.13.0", "transformers==5.23.0", "numpy==2.2.6"),),
    "compressed_tensors_engine": (
        *("compressed-tensors==0.20.0", "accelerate==1.15.0", "torch==2.13.0", "transformers==5.23.0"),
    ),
    "gptqmodel": ("gptqmodel==7.6.0", "torch==2.13.0", "transformers==5.23.0", "numpy==2.2.6"),
}

# GPTQModel's pool asks for two workers of one that has half as many as there are cores.
VARIABLES = {"gptqmodel": {"GPTQMODEL_CPU_WORKERS": "2"}}

JOINED = "rows joined to multiples of 256: what the type is worth where shapes suit it; no llama.cpp runs this file"


def _llama_cpp(kind: str, *, fold: bool) -> Setting:
    name, note = (f"{kind}, rows joined", JOINED) if fold else (kind, "")
    return Setting(peer="llama.cpp", name=name, module="llama_cpp", options={"type": kind, "fold": fold}, note=note)


def _hqq(bits: int, group_size: int) -> Setting:
    options = {"bits": bits, "group_size": group_size}
    return Setting(peer="HQQ", name=f"{bits} bits, group {group_size}", module="hqq", options=options)


def _gptqmodel(bits: int, group_size: int) -> Setting:
    options = {"bits": bits, "group_size": group_size}
    return Setting(peer="GPTQModel", name=f"{bits} bits, group {group_size}", module="gptqmodel", options=options)


def _auto_round(bits: int, group_size: int) -> Setting:
    """Its defaults are 200 iterations over 128 windows of 2048, eight at a time: hours a row on two cores."""
    options = {"bits": bits, "group_size": group_size, "windows": 64, "seq_len": 512, "batch_size": 4, "iterations": 50}
    note = "50 iterations over 64 windows of 512, four at a time, for want of a GPU (defaults: 200, 128, 2048, eight)"
    name = f"{bits} bits, group {group_size}"
    return Setting(peer="AutoRound", name=name, module="auto_round", options=options, note=note)


# A row takes minutes to half an hour, so what says most comes first, and a stopped run has that.
SETTINGS = (
    *(_llama_cpp(kind, fold=False) for kind in ("Q4_K_M", "IQ4_XS", "Q4_K_S", "Q4_0", "IQ4_NL", "Q5_K_M", "Q6_K")),
    *(_llama_cpp(kind, fold=True) for kind in ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M")),
    *(_hqq(bits, group_size) for bits, group_size in ((4, 64), (3, 64), (2, 64), (2, 32), (2, 16))),
    *(_gptqmodel(bits, group_size) for bits, group_size in ((4, 64), (3, 64), (2, 64), (4, 128))),
    *(_auto_round(bits, group_size) for bits, group_size in ((4, 64), (3, 64), (2, 64), (4, 128), (2, 32))),
    *(_llama_cpp(kind, fold=True) for kind in ("IQ2_XS", "IQ2_S", "IQ3_S", "Q3_K_S", "Q4_K_S", "Q5_K_M", "Q6_K")),
    *(_llama_cpp(kind, fold=False) for kind in ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q5_K_S")),
    *(_llama_cpp(kind, fold=False) for kind in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")),
)

OUT_OF_REACH = {"exllamav3": "its quantizer runs on a CUDA device alone"}
