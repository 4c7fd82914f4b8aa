"""Where a value lies between the ends of an axis, linear or logarithmic, and where its ticks are."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_MARGIN = 0.08  # of the axis, kept free at both ends, so that no marker touches the frame
_EXPONENTS = (-307.0, 308.0)  # of 10, that a float64 holds in full precision
_FEW_DECADES = 3  # up to here 2 and 5 get a tick too


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis from `low` to `high`, finite and rising; above 0 when logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def spanning(cls, values: Iterable[float], *, log: bool = False, margin: float = 0.0, least: float = 0.0) -> Axis:
        """The axis from the least to the greatest value, widened when they are the same.

        `values` are finite, at least one, all above 0 when `log`. A `margin`, as a share of the span, is added at both
        ends; the span is at least `least`, in decades when `log`.
        """
        ends = [_exponent(value) if log else value for value in values]
        low, high = min(ends), max(ends)
        span = high / 2 - low / 2  # halved: the difference of two finite values can be infinite
        is_one_value = span <= max(1e-9 * max(abs(low), abs(high)), 1e-300)
        pad = _pad_around(low, log) if is_one_value else 2 * margin * span
        pad = max(pad, least / 2 - span)
        bottom, top = _EXPONENTS if log else (-sys.float_info.max, sys.float_info.max)
        low, high = max(low - pad, bottom), min(high + pad, top)
        return cls(low=10**low, high=10**high, log=True) if log else cls(low=low, high=high)

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False) -> Axis:
        """As `spanning`, with room for markers at both ends."""
        return cls.spanning(values, log=log, margin=_MARGIN)

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what lies outside is put on the end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value / 2 - low / 2) / (high / 2 - low / 2)

    def ticks(self) -> list[float]:
        """Round values on the axis, rising, about five."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def tick_label(value: float) -> str:
    """As short as it is exact to three digits: 0.05, 20, 30,000, 5e-5."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _exponent(value: float) -> float:
    return min(max(math.log10(value), _EXPONENTS[0]), _EXPONENTS[1])


def _pad_around(value: float, log: bool) -> float:
    """For an axis that has a single value to show."""
    return 0.2 if log else max(abs(value) / 10, 0.5)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = high / 5 - low / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [multiple * step for multiple in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= _FEW_DECADES else (1,)
    stride = max(1, (last - first) // 6)
    ticks = [
        digit * 10.0**power for power in range(first, last + 1, stride) if power <= _EXPONENTS[1] for digit in digits
    ]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return ticks if len(ticks) > 2 else _linear_ticks(low, high)
