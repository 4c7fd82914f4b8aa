"""What the golden files of version 1.2 hold."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from format_samples import MEMBERS, NO_MEMBERS, add_layer, f16, make_layer
from layer_samples import LAYERS, make_ternary

from formats.encoding import Dense
from formats.layer import TernaryLinear
from formats.writer import Writer


def everything(writer: Writer) -> None:
    """Both encodings that 1.2 brought, beside what was there."""
    for name, layer in LAYERS.items():
        if isinstance(layer, TernaryLinear):
            add_layer(writer, name, layer, transposed=name == "ternary", relative_error=0.125 if "," in name else None)
    for name in ("two levels and outliers", "trellis"):
        add_layer(writer, name, LAYERS[name])
    add_layer(writer, "1.0", make_layer())
    writer.add_tensor("norm", (3,), Dense("F16"), np.array([1, 2, 3], "<f2"))
    writer.add_file("tokenizer.json", b"{}")
    writer.finish(**MEMBERS)


def by_hand() -> TernaryLinear:
    """Two rows of five values; half of all values are zero."""
    codes = np.array([[0, -1, 1, 1, 0], [1, 0, 0, 0, -1]], np.int8)
    return TernaryLinear(codes=codes, scales=f16([0xBC00, 0x3800, 0x4000, 0x8000]).reshape(2, 2))


def dictionary(writer: Writer) -> None:
    """Many zeros and few, in rows of one value, of a few and of many; signs of all kinds, and input scales."""
    add_layer(writer, "by hand", by_hand())
    add_layer(writer, "one value", make_ternary(1, 1, 2))
    for every in (2, 3, 5, 20, 300):
        for shape in ((4, 27), (3, 200)):
            layer = make_ternary(*shape, every, scaled=every == 5)
            add_layer(writer, f"{shape[0]}x{shape[1]}.every={every}", layer)
    layer = make_ternary(3, 64)
    add_layer(writer, "zeros", replace(layer, codes=np.zeros_like(layer.codes)))
    add_layer(writer, "no zeros", replace(layer, codes=layer.codes | 1))
    add_layer(writer, "no -1", replace(layer, codes=np.abs(layer.codes)))
    # +0 and -0, the least subnormals and the largest: what a value stands for is taken as it is.
    scales = f16([0x0000, 0x8000, 0x0001, 0x8001, 0x7BFF, 0xFBFF]).reshape(3, 2)
    add_layer(writer, "scales", replace(layer, scales=scales), relative_error=0.5)
    writer.finish(**NO_MEMBERS)


def numeral_systems(writer: Writer) -> None:
    """Rows around a block of 32 and around a symbol of 5; segments; one symbol alone, and many."""
    add_layer(writer, "by hand", replace(by_hand(), coding="ternary_rans"))
    for n_out, n_in, every in ((1, 1, 2), (31, 9, 3), (32, 10, 5), (33, 11, 9), (3, 204, 30), (2, 9001, 3)):
        layer = make_ternary(n_out, n_in, every, "ternary_rans", scaled=every == 5)
        add_layer(writer, f"{n_out}x{n_in}.every={every}", layer)
    layer = make_ternary(3, 64, coding="ternary_rans")
    add_layer(writer, "zeros", replace(layer, codes=np.zeros_like(layer.codes)))
    add_layer(writer, "no zeros", replace(layer, codes=layer.codes | 1))
    writer.finish(**NO_MEMBERS)


CONTENTS: dict[str, Callable[[Writer], None]] = {
    "v1_2": everything,
    "ternary_dict": dictionary,
    "ternary_rans": numeral_systems,
}
