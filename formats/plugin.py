"""transformers loads what `export --to transformers` wrote: `quant_method: qtool`, sections as tensors of bytes.

transformers' own reading, devices, tying and saving; here is what its quantizers are asked for. A folder may be as
hostile as a file: what its config says of a section is checked, and the section against it, before a kernel runs.

Nothing heavy is imported here: transformers is itself being imported when `formats.plugin_hook` registers these.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "qtool"


@register_quantization_config(METHOD)
class QtoolConfig(QuantizationConfigMixin):
    """What `config.json` says: the encoding and shape of each packed weight, by its name."""

    def __init__(self, weights: dict[str, Any], **others: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.weights = weights


@register_quantizer(METHOD)
class QtoolQuantizer(HfQuantizer):
    """Puts sections where weights were, and checks what was loaded into them."""

    quantization_config: QtoolConfig

    requires_calibration = True  # a model becomes one by `qtool compress`, not on the way in

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """KernelError where a device cannot run it."""
        from formats.device import ready_device

        for device in set(device_map.values()) if isinstance(device_map, dict) else ():
            if device != "disk":
                ready_device(f"cuda:{device}" if isinstance(device, int) else str(device))

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        from formats.packed_model import make_room

        self._sections = make_room(model, self.quantization_config.weights, dtype or model.config.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from formats.packed_model import check_sections

        check_sections(model, self._sections)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
