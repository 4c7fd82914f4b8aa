"""What an export wrote, and what it could not carry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A tensor whose values are not those of the file.

    `error` is the energy of the difference over the energy of the decoded weight.
    """

    name: str
    reason: str
    error: float

    @classmethod
    def of(cls, name: str, reason: str, weight: npt.NDArray[Any], stored: npt.NDArray[Any]) -> Loss:
        """From a tensor's values and those that are stored instead, both f32."""
        energy = float(np.square(weight, dtype=np.float64).sum())
        lost = float(np.square(weight - stored, dtype=np.float64).sum())
        return cls(name=name, reason=reason, error=lost / energy if energy else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Names of the files written, and what was lost; nothing was if `losses` is empty."""

    files: list[str]
    losses: list[Loss]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
