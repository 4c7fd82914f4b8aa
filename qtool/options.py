"""From a command's options to a recipe: what is left open is filled in by the method and the format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qtool.errors import ConfigError
from qtool.memory import parse_size
from qtool.recipe import FORMATS, GGML, METHODS, CalibrationSpec, QuantSpec, Recipe, Target, one_of

GROUP_SIZES = {"int": 128, "nf4": 64, "fp4": 64, "fitted": 64, "trellis": -1}
TERNARY_GRIDS = ("minmax", "mse")
EFFORTS = ("fast", "default", "best")
SPQR = {"group_size": 16, "stat_bits": 3, "outlier_threshold": 0.2}
"""SpQR's near-lossless recipe (arXiv 2306.03078), statistics in sets of 16 rows; the user's own choices go first."""
OF_OTHER_BLOCKS = ("group_size", "input_scales", "stat_bits", "double_quant")
INT8 = {"format": "int", "bits": 8, "stat_bits": 0, "group_size": -1, "double_quant": False}
"""What LLM.int8() is, where it has to be said at all."""
MEMORY = {"fast": 6, "default": 8, "best": 9}
"""Path bits of a trellis: the time doubles with each, the error falls by some 2%."""


def build_recipe(
    *,
    calibration: str,
    text_field: str,
    samples: int,
    seq_len: int,
    seed: int,
    embeddings: int | None,
    target_size: str | int | None = None,
    target_bits: float | None = None,
    fused: bool = False,
    independent: bool = False,
    layers: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    min_expert_tokens: int = 64,
    bits: float | None = None,
    expert_format: str | None = None,
    ternary_grid: str | None = None,
    widths: tuple[int, ...] = (),
    **linears: Any,
) -> Recipe:
    """The recipe of a command's options; ConfigError names the value that makes no sense."""
    target = None
    if target_size is not None or target_bits is not None:
        size = 0 if target_size is None else parse_size(target_size, "--target-size")
        target = Target(size_bytes=size, bits=target_bits or 0.0)
        if bits is not None:
            raise ConfigError(f"--bits {bits:g}: a target chooses the bits itself; give one of the two")
    if fused and target is None:
        raise ConfigError("--fused: holds what a target spreads together; give --target-size or --target-bits")
    if bits is not None and 0 < bits < 1:  # what ternary experts take
        bits, expert_format = None, expert_format or "ternary"
    elif bits is not None and not (math.isfinite(bits) and bits == int(bits)):
        raise ConfigError(f"--bits {bits:g}: must be whole, or below 1 for ternary experts; --target-bits mixes widths")
    linears["bits"] = None if bits is None else int(bits)
    if linears["method"] == "ternary":
        linears["method"], expert_format = "gptq", expert_format or "ternary"
    if ternary_grid is not None and "ternary" not in (linears["number_format"], expert_format):
        raise ConfigError(f"--ternary-grid {ternary_grid}: is for ternary weights; give --method ternary")
    return Recipe(
        linears=_linears(targeted=target is not None, grid=ternary_grid or "minmax", **linears),
        experts=_experts(expert_format, linears["method"], linears.get("percdamp"), ternary_grid or "minmax"),
        embeddings=(0 if target is not None and target.size_bytes else 8) if embeddings is None else embeddings,
        calibration=CalibrationSpec(
            source=calibration,
            text_field=text_field,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            min_expert_tokens=min_expert_tokens,
        ),
        target=target,
        fused=fused,
        widths=widths,
        independent=independent,
        layers=tuple(_layer_bits(text) for text in layers),
        ignore=tuple(ignore),
    )


def _experts(number_format: str | None, method: str, percdamp: float | None, grid: str) -> QuantSpec | None:
    """How experts are stored where they are not stored as all linears."""
    if number_format is None:
        return None
    one_of("expert_format", number_format, ("ternary",))
    return _ternary(method, grid, {} if percdamp is None else {"percdamp": percdamp})


def _ternary(method: str, grid: str, chosen: dict[str, Any]) -> QuantSpec:
    """As QMoE has it: hard damped, columns as they stand."""
    one_of("ternary_grid", grid, TERNARY_GRIDS)
    if method == "rtn" and grid != "minmax":
        raise ConfigError(f"--ternary-grid {grid}: is searched by the Hessian, --method rtn has none; leave it out")
    if method not in ("gptq", "rtn"):
        raise ConfigError(f"--method {method}: ternary weights are found by gptq or rtn")
    own = {"group_size": -1, "percdamp": 0.1, "act_order": False, "input_scales": False, "bits": 2}
    values = own | chosen | {"scale_search": grid == "mse"}
    return QuantSpec(method=method, format="ternary", **values)  # type: ignore[arg-type]


def _linears(
    *,
    targeted: bool,
    grid: str,
    method: str,
    number_format: str | None,
    effort: str,
    outliers: str | float | None,
    outlier_threshold: float | None,
    **values: Any,
) -> QuantSpec:
    one_of("method", method, (*METHODS, "spqr", "ternary"))
    one_of("effort", effort, EFFORTS)
    chosen = {name: value for name, value in values.items() if value is not None}
    _refuse_idle(method, number_format, chosen)
    chosen["outliers"] = 0.0 if outliers is None else parse_share(outliers)
    if outlier_threshold is not None:
        chosen["outlier_threshold"] = outlier_threshold
    if number_format == "ternary":
        if "scale_search" in chosen:
            raise ConfigError(
                f"{_given('scale_search', chosen['scale_search'])}: ternary has --ternary-grid mse for it"
            )
        if chosen.get("symmetric"):
            raise ConfigError("--sym: ternary has no zeros to choose; leave it out")
        if effort != "default":
            raise ConfigError(f"--effort {effort}: ternary is solved in one way; leave it out")
        return _ternary(method, grid, chosen)
    if number_format in GGML:
        beside = {"--method spqr": method == "spqr", "--outliers": outliers, "--outlier-threshold": outlier_threshold}
        beside |= {_given(name, chosen[name]): chosen[name] for name in OF_OTHER_BLOCKS if name in chosen}
        for option, is_given in beside.items():
            if is_given:
                raise ConfigError(f"{option}: {number_format} has the blocks of llama.cpp and nothing beside them")
    if method == "spqr":
        method = "gptq"
        left = {"outlier_threshold"} if outliers is not None else set()
        left |= {"stat_bits"} if chosen.get("double_quant") else set()
        chosen = {name: value for name, value in SPQR.items() if name not in left} | chosen
    if number_format is None:
        number_format = "trellis" if method == "gptq" and (effort == "best" or targeted) else "int"
    if number_format in FORMATS and number_format != "int" and chosen.get("symmetric"):
        raise ConfigError(f"--sym: {number_format} has no zeros; give --format int, or leave it out")
    if number_format == "trellis":
        if "scale_search" in chosen:
            raise ConfigError(
                f"{_given('scale_search', chosen['scale_search'])}: a trellis has no search; leave it out"
            )
        chosen["memory"] = MEMORY[effort]
    if number_format == "trellis" and method == "gptq" and outliers is None and "outlier_threshold" not in chosen:
        chosen["outliers_pay"] = True  # a path has no level for a weight far from all others
    if effort == "fast":
        chosen.setdefault("scale_search", False)
    chosen.setdefault("group_size", GROUP_SIZES.get(number_format, 128))
    return QuantSpec(method=method, format=number_format, **chosen)  # type: ignore[arg-type]


def _refuse_idle(method: str, number_format: str | None, chosen: dict[str, Any]) -> None:
    """What is asked for and would be left undone."""
    if method == "int8":
        asked = {"format": number_format} | chosen
        for name, own in INT8.items():
            if (value := asked.get(name)) not in (None, own):
                raise ConfigError(f"{_given(name, value)}: --method int8 has 8 bits in rows; leave it out")
    else:
        for name in ("outlier_features", "activation_threshold"):
            if name in chosen:
                raise ConfigError(f"{_given(name, chosen[name])}: is for --method int8; give it, or leave this out")
    if method in ("int8", "rtn"):
        for name in ("act_order", "percdamp", "scale_search", "input_scales"):
            if name in chosen:
                raise ConfigError(
                    f"{_given(name, chosen[name])}: is the solver's, --method {method} has none; leave it out"
                )
    if "stat_rows" in chosen and method != "spqr" and not chosen.get("stat_bits"):
        raise ConfigError(
            f"--stat-rows {chosen['stat_rows']}: are for statistics that are rounded; give --stat-bits too"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(name: str, value: Any) -> str:
    """An option as it was written."""
    if isinstance(value, bool):
        return _option(name if value else f"no_{name}")
    return f"{_option(name)} {value}"


def parse_share(share: str | float) -> float:
    """0.5% or 0.005 as 0.005."""
    text = str(share)
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"--outliers {text}: must be a share of the weights, as 0.5% or 0.005") from None


def _layer_bits(text: str) -> tuple[str, int]:
    pattern, separator, bits = text.rpartition("=")
    if not (separator and pattern and bits.isdigit()):
        raise ConfigError(f"--layer {text}: must be REGEX=BITS, as 'down_proj=4'")
    return pattern, int(bits)


def default_output(model: str, recipe: Recipe) -> Path:
    """NAME-BITSbit.qtm in the working directory, after the model's own name; NAME-SIZE.qtm for a target size."""
    path = Path(model).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    if "ternary" in (recipe.linears.format, recipe.experts and recipe.experts.format):
        return Path(f"{name}-ternary.qtm")
    if recipe.target is None:
        return Path(f"{name}-{recipe.linears.bits}bit.qtm")
    size, bits = recipe.target.size_bytes, recipe.target.bits
    return Path(f"{name}-{size / 1e6:g}MB.qtm" if size else f"{name}-{bits:g}bit.qtm")
