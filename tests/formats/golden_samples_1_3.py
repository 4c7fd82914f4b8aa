"""What the golden files of version 1.3 hold."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from format_samples import NO_MEMBERS, add_layer, f16, make_layer
from layer_samples import make_affine, make_spqr, with_order, with_outliers

from formats.layer import AffineLinear, Products, QuantizedLinear
from formats.writer import Writer


def by_hand() -> AffineLinear:
    """Codes 0 to 3 in groups of two, with scales 1 and 0.5, minima -2 and 0.25."""
    return AffineLinear(
        codes=np.array([[0, 1, 2, 3]], np.uint8),
        scales=f16([0x3C00, 0x3800]).reshape(1, 2),
        minima=f16([0xC000, 0x3400]).reshape(1, 2),
        bits=2,
        group_size=2,
    )


def products_by_hand(symmetric: bool) -> AffineLinear:
    """The same codes; scales 3 and 1 times a half, or with signs; minima 2 and 0 times a quarter."""
    scales = Products(
        codes=np.array([[3, 1]], np.uint8), units=f16([0x3800]).reshape(1, 1), bits=2, groups=2, symmetric=symmetric
    )
    minima = replace(scales, codes=np.array([[2, 0]], np.uint8), units=f16([0x3400]).reshape(1, 1))
    return replace(by_hand(), scales=scales, minima=None if symmetric else minima)


def affine(writer: Writer) -> None:
    """In one level and in two; every number of bits; short last groups and sets; sums and products that round."""
    add_layer(writer, "by hand", by_hand())
    for symmetric in (False, True):
        add_layer(writer, f"products by hand.symmetric={symmetric:d}", products_by_hand(symmetric))
    for bits in range(2, 9):
        add_layer(writer, f"{bits} bits", make_affine(3, 37, bits, 16), transposed=bits == 3)
        for symmetric in (False, True):
            layer = make_affine(2, 70, bits, 8, symmetric, stat_bits=10 - bits, stat_groups=bits)
            add_layer(writer, f"{bits} bits, two levels.symmetric={symmetric:d}", layer, relative_error=0.5)
    # 0.1 and -1/3 as 16 bits have them, and the largest: what is added rounds.
    rounded = AffineLinear(
        codes=np.tile(np.array([0, 1, 127, 254, 255], np.uint8), (4, 1)),
        scales=f16([0x2E66, 0xB555, 0x0001, 0x7BFF]).reshape(4, 1),
        minima=f16([0xB555, 0x7BFF, 0x8000, 0xFBFF]).reshape(4, 1),
        bits=8,
        group_size=5,
    )
    add_layer(writer, "rounded", rounded)
    writer.finish(**NO_MEMBERS)


def ordered_by_hand() -> QuantizedLinear:
    """Codes 0 to 3 with a zero of 2; inputs 0 and 3 have a scale of 1, 1 and 2 one of 0.5."""
    return QuantizedLinear(
        codes=np.array([[0, 1, 2, 3]], np.uint8),
        scales=f16([0x3C00, 0x3800]).reshape(1, 2),
        zeros=None,
        bits=2,
        group_size=2,
        input_order=np.array([1, 3, 2, 0], np.uint32),
    )


def input_order(writer: Writer) -> None:
    """Alone and with all else that `uniform` can have; a short last group."""
    add_layer(writer, "by hand", ordered_by_hand())
    for bits in range(2, 9):
        layer = with_order(make_layer(3, 37, bits, 16, symmetric=bits % 2 == 0, scaled=bits > 6), step=bits)
        add_layer(writer, f"{bits} bits", layer, transposed=bits == 3)
    add_layer(writer, "all", with_order(with_outliers(make_spqr(scaled=True))), relative_error=0.5)
    add_layer(writer, "one group", with_order(make_layer(2, 9, group_size=9), step=2))
    writer.finish(**NO_MEMBERS)


CONTENTS: dict[str, Callable[[Writer], None]] = {"affine": affine, "input_order": input_order}
