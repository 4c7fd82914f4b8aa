"""What an export wrote, and what it could not carry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A tensor whose values are not those of the file.

    `error` is the energy of the difference over the energy of the decoded weight.
    """

    name: str
    reason: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """Names of the files written, and what was lost; nothing was if `losses` is empty."""

    files: list[str]
    losses: list[Loss]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
