"""transformers loads what `export --to transformers` wrote: `quant_method: qtool`, sections as tensors of bytes.

transformers' own reading, devices, tying and saving; here is what its quantizers are asked for. A folder may be as
hostile as a file: what its config says of a section is checked, and the section against it, before it is loaded.

Nothing heavy is imported here: transformers is itself being imported when `formats.plugin_hook` registers these.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "qtool"


class QtoolConfig(QuantizationConfigMixin):
    """What `config.json` says: the encoding and shape of each packed weight, by its name."""

    def __init__(self, weights: Any = None, **others: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.weights = weights


class QtoolQuantizer(HfQuantizer):
    """Puts sections where weights were, once what will be loaded into them has been checked."""

    quantization_config: QtoolConfig
    requires_calibration = True  # a model becomes one by `qtool compress`, not on the way in

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """KernelError where a device cannot run it."""
        from formats.device import ready_device

        for device in set(device_map.values()) if isinstance(device_map, dict) else ():
            if device != "disk":
                ready_device(f"cuda:{device}" if isinstance(device, int) else str(device))

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        from formats.experts import separate_experts
        from formats.listed_experts import separate_listed_experts
        from formats.packed_model import check_sections, make_room, stored_names

        separate_experts(model, stored_names(checkpoint_files or ()))
        separate_listed_experts(model)
        names = make_room(model, self.quantization_config.weights, model.config.dtype)
        check_sections(model, names, checkpoint_files or ())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """None: the folder has the names of the model, and its experts apart."""
        return []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Let transformers know; again has no effect."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, QtoolConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, QtoolQuantizer)
