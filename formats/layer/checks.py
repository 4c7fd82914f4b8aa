"""What the arrays of a layer, and the parts of a section, may be (SPEC 7)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError

# By the bytes of a float: the unsigned type of its bits, a mask without the sign, the largest magnitude it may have.
_MAGNITUDES: dict[int, tuple[Any, int, int, str]] = {
    2: (np.uint16, 0x7FFF, 0x7BFF, "NaN or infinite"),
    4: (np.uint32, 0x7FFFFFFF, 0x5F800000, "NaN, infinite or beyond 2**64"),  # so that no weight overflows
}


def check_bits(bits: int, bit_range: tuple[int, int], name: str = "bits", paragraph: str = "7.3, 7.14") -> None:
    """SPEC 7.3."""
    least, most = bit_range
    if not least <= bits <= most:
        raise FormatError(f"{name}={bits}: must be {least} to {most} (SPEC {paragraph})")


def check_array(
    name: str, array: npt.NDArray[np.generic], dtype: npt.DTypeLike, shape: tuple[int, ...], paragraph: str = "7.3"
) -> None:
    """Type and shape."""
    if array.dtype != dtype or array.shape != shape:
        want = f"{np.dtype(dtype)}{list(shape)}"
        raise FormatError(f"{name} are {array.dtype}{list(array.shape)}: must be {want} (SPEC {paragraph})")


def check_range(name: str, integers: npt.NDArray[np.uint8], bits: int) -> None:
    """SPEC 7.4.1: every integer fits its bits."""
    largest = int(integers.max())
    if largest >= 1 << bits:
        raise FormatError(f"{name} reach {largest}: does not fit {bits} bits (SPEC 7.4.1)")


def check_permutation(name: str, places: npt.NDArray[Any]) -> None:
    """SPEC 7.8."""
    n = len(places)
    found = np.zeros(n, bool)
    found[places[places < n]] = True
    if not found.all():
        raise FormatError(f"{name} has no {int(found.argmin())}: must have each number below {n} once (SPEC 7.8)")


def check_finite(what: str, values: npt.NDArray[Any]) -> None:
    """SPEC 7.6 for f16 or f32. On the bits, since np.isfinite widens every f16 and takes twenty times as long."""
    kind, magnitude, largest, wrong = _MAGNITUDES[values.dtype.itemsize]
    if int((values.view(kind) & kind(magnitude)).max()) > largest:
        raise FormatError(f"{what} is {wrong} (SPEC 7.6)")


def check_input_scales(values: npt.NDArray[np.float16]) -> None:
    """SPEC 7.6: above 0 besides; as numbers, since a negative one has the sign bit."""
    bits = values.view(np.uint16)
    if not ((bits > 0) & (bits <= 0x7BFF)).all():
        raise FormatError("an input scale is NaN, infinite or not above 0 (SPEC 7.6)")
