"""What a checkpoint's `quantization_config` says of its linears: GPTQ, AWQ or compressed-tensors, checked once."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from formats.layouts import awq, gptq, pack_quantized
from formats.layouts.affine import Affine, Arrays
from formats.strict_json import brief
from qtool.errors import CheckpointError, either

KNOWN_ORIGIN = re.compile(r"qtool:|gptqmodel:(?!0\.[0-8]\.)", re.IGNORECASE)
"""Who wrote version 1 of GPTQ with zeros that can be told: GPTQModel before 0.9 stored some as they were."""

MAX_PATTERN = 1 << 16
_REPEATED_REPEAT = re.compile(r"[*+}][^()]*\)[*+{]|\)[*+}?]*\)[*+{]")
"""A repeat of a group that ends with, or has, a repeat: the time that it takes can double with every character."""


class Scheme(ABC):
    """How linears are stored."""

    parts: ClassVar[frozenset[str]]
    """What stands behind the name of a linear."""
    main: ClassVar[str]
    """The one of them that makes a linear quantized."""

    @abstractmethod
    def unpack(self, module: str, arrays: Arrays) -> Affine:
        """The weight of a linear; FormatError for arrays that cannot be."""


def scheme_of(values: Any, label: str, *, assume_v1_zeros: bool = False) -> Scheme:
    """The scheme of a `quantization_config`; CheckpointError that names what is not known."""
    method = values.get("quant_method") if isinstance(values, dict) else None
    kinds = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _pack_quantized}
    if not isinstance(method, str) or method not in kinds:
        raise CheckpointError(
            f"{label}: quant_method {brief(method)}: import knows {', '.join(kinds)}, and .gguf files"
        )
    if method == "gptq":
        return _gptq(_Fields(values, label), assume_v1_zeros)
    return _awq(_Fields(values, label)) if method == "awq" else _pack_quantized(_Fields(values, label))


class _Fields:
    """The members of a JSON object, each with its type when it is asked for."""

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.values, self.label = values, label

    def refuse(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: {name} {brief(value)}: {wanted}")

    def integer(self, name: str, allowed: range | tuple[int, ...], default: int | None = None) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value not in allowed:
            shown = (
                f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else either(map(brief, allowed))
            )
            raise self.refuse(name, value, f"must be {shown}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "must be True or False")
        return value

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.values.get(name, default)
        if not any(value is own or (value == own and isinstance(value, str)) for own in allowed):
            raise self.refuse(name, value, f"import knows {either(map(brief, allowed))}")
        return value

    def members(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, value, "must be an object")
        return value or {}

    def group_size(self, name: str = "group_size") -> int:
        value = self.values.get(name)
        if type(value) is not int or not (value == -1 or 1 <= value < 1 << 31):
            raise self.refuse(name, value, "must be -1 or above 0")
        return value

    def pattern(self, text: str) -> re.Pattern[str]:
        if len(text) > MAX_PATTERN or _REPEATED_REPEAT.search(text):
            raise self.refuse("pattern", text, "could take forever to match; name the modules")
        try:
            return re.compile(text)
        except re.error as error:
            raise self.refuse("pattern", text, f"is no regular expression: {error}") from error


class _GptqScheme(Scheme):
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    main = "qweight"

    def __init__(
        self, fields: _Fields, version: int, rules: list[tuple[re.Pattern[str], _Fields]], is_doubtful: bool
    ) -> None:
        """is_doubtful: zeros are of version 1, by a program that may have stored them otherwise."""
        self._fields, self._version, self._rules, self._is_doubtful = fields, version, rules, is_doubtful

    def unpack(self, module: str, arrays: Arrays) -> Affine:
        own = next((fields for pattern, fields in self._rules if pattern.match(module)), self._fields)
        bits = own.integer("bits", gptq.BITS)
        n_words, out_features = _matrix(arrays, "qweight")
        shape = (out_features, n_words * 32 // bits)
        found = gptq.unpack_gptq(arrays, shape, bits, own.group_size(), self._version)
        if self._is_doubtful and (found.zeros != 1 << bits - 1).any():  # whatever the config calls symmetric
            raise _doubtful_zeros(self._fields)
        return found


def _gptq(fields: _Fields, assume_v1_zeros: bool) -> Scheme:
    written = "checkpoint_format" if "checkpoint_format" in fields.values else "format"
    version = {name: number for number, name in gptq.FORMATS.items()}[
        fields.choice(written, tuple(gptq.FORMATS.values()), "gptq")
    ]
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.integer("bits", gptq.BITS)
    fields.group_size()
    rules = []
    for text, own in fields.members("dynamic").items():
        values = dict(fields.values) | (own if isinstance(own, dict) else {})
        rules.append((fields.pattern(text.removeprefix("+:").removeprefix("-:")), _Fields(values, fields.label)))
    symmetric = all(part.flag("sym", True) for part in (fields, *(own for _, own in rules)))
    is_doubtful = version == 1 and not assume_v1_zeros and not _has_known_origin(fields)
    if is_doubtful and not symmetric:
        raise _doubtful_zeros(fields)
    return _GptqScheme(fields, version, rules, is_doubtful)


def _doubtful_zeros(fields: _Fields) -> CheckpointError:
    return CheckpointError(
        f"{fields.label}: version 1 of gptq with zeros, by a program that may have stored them otherwise: what "
        "they stand for is not known; --assume-v1-zeros takes them as stored less one"
    )


def _has_known_origin(fields: _Fields) -> bool:
    names = fields.members("meta").get("quantizer")
    names = names if isinstance(names, list) else [names]
    return any(isinstance(name, str) and KNOWN_ORIGIN.match(name) for name in names)


class _AwqScheme(Scheme):
    parts = frozenset({"qweight", "qzeros", "scales"})
    main = "qweight"

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    def unpack(self, module: str, arrays: Arrays) -> Affine:
        in_features, n_words = _matrix(arrays, "qweight")
        return awq.unpack_awq(arrays, (n_words * len(awq.ORDER), in_features), self._group_size)


def _awq(fields: _Fields) -> Scheme:
    """AutoAWQ's own file has other names for bits and group size."""
    fields.integer("w_bit" if "w_bit" in fields.values else "bits", awq.BITS)
    version = fields.values.get("version")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.refuse("version", version, "import knows 'gemm'")
    if not fields.flag("zero_point", True):
        raise fields.refuse("zero_point", False, "import knows True")
    return _AwqScheme(fields.group_size("q_group_size" if "q_group_size" in fields.values else "group_size"))


class _PackQuantizedScheme(Scheme):
    parts = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})
    main = "weight_packed"

    def __init__(self, groups: list[tuple[list[str], _Fields]]) -> None:
        self._groups = groups

    def unpack(self, module: str, arrays: Arrays) -> Affine:
        fields = self._fields_of(module)
        bits, by_row = fields.integer("num_bits", pack_quantized.BITS), fields.values["strategy"] == "channel"
        group_size = -1 if by_row else fields.group_size()
        stated = arrays["weight_shape"].tolist() if "weight_shape" in arrays else None
        if (
            not isinstance(stated, list)
            or len(stated) != 2
            or not all(type(n) is int and 0 < n < 1 << 31 for n in stated)
        ):
            raise fields.refuse("weight_shape", stated, f"must be two sizes, of {module}")
        return pack_quantized.unpack_quantized(
            arrays, (stated[0], stated[1]), bits, group_size, fields.flag("symmetric", True)
        )

    def _fields_of(self, module: str) -> _Fields:
        """Those of the group that names the module, else of the one for all linears."""
        for targets, fields in self._groups:
            if any(_names(target, module, fields) for target in targets):
                return fields
        for targets, fields in self._groups:
            if "Linear" in targets:
                return fields
        raise CheckpointError(f"{self._groups[0][1].label}: no group of config_groups has {module}")


def _names(target: str, module: str, fields: _Fields) -> bool:
    return bool(fields.pattern(target[3:]).match(module)) if target.startswith("re:") else target == module


def _pack_quantized(fields: _Fields) -> Scheme:
    fields.choice("format", ("pack-quantized",))
    fields.choice("quantization_status", ("compressed",), "compressed")
    for name in ("transform_config", "sparsity_config"):  # what they do to weights and inputs would be left out
        if (value := fields.values.get(name)) and value != {"format": "dense"}:
            raise fields.refuse(name, value, "import knows none")
    groups = []
    for name, value in fields.members("config_groups").items():
        group = _Fields(value if isinstance(value, dict) else {}, f"{fields.label}: {name}")
        group.choice("format", ("pack-quantized", None))
        for quantized in ("input_activations", "output_activations"):
            group.choice(quantized, (None,))
        weights = _Fields(group.members("weights"), group.label)
        weights.choice("type", ("int",))
        weights.integer("num_bits", pack_quantized.BITS)
        if weights.choice("strategy", ("group", "channel")) == "group":
            weights.group_size()
        if weights.flag("dynamic", False):
            raise weights.refuse("dynamic", True, "import knows False")
        targets = group.values.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise group.refuse("targets", targets, "must be a list of names")
        groups.append((targets, weights))
    if not groups:
        raise fields.refuse("config_groups", fields.values.get("config_groups"), "must have a group")
    return _PackQuantizedScheme(groups)


def _matrix(arrays: Arrays, name: str) -> tuple[int, int]:
    """The shape of an array that has to have two dimensions, neither of them 0."""
    shape = arrays[name].shape
    if len(shape) != 2 or 0 in shape:
        from formats.errors import FormatError

        raise FormatError(f"{name} is {list(shape)}: must be a matrix")
    return shape
