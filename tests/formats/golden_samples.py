"""What the golden files hold: functions of nothing, so that the writer has to give the same bytes for ever."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from format_samples import MEMBERS, NO_MEMBERS, add_layer, f16, make_layer
from golden_samples_1_1 import CONTENTS as SECOND
from golden_samples_1_2 import CONTENTS as THIRD
from golden_samples_1_3 import CONTENTS as FOURTH

from formats.encoding import Dense
from formats.layer import QuantizedLinear
from formats.writer import Writer

FOLDER = Path(__file__).with_name("golden")

# -0, the smallest and largest subnormal, the smallest normal and largest finite number, infinities, a quiet NaN with
# a payload; F32 and BF16, whose bits a reader keeps, also a signalling one.
F16_BITS = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xFBFF, 0x7C00, 0xFC00, 0x7E2A, 0xFE01]
BF16_BITS = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x3F80, 0xFF7F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81]
F32_BITS = [
    *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000),
    *(0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFF812345),
]


def write_golden(name: str, path: Path) -> bytes:
    """The golden file `name` as the writer makes it today."""
    with Writer(path) as writer:
        CONTENTS[name](writer)
    return path.read_bytes()


def everything(writer: Writer) -> None:
    """A file as a model makes it: every encoding of 1.0, embedded files, all four objects."""
    for bits in range(2, 9):
        layer = make_layer(5, 70, bits, group_size=32, symmetric=bits % 2 == 0, scaled=bits in (3, 4))
        add_layer(writer, f"blocks.{bits}.weight", layer, transposed=bits == 8, relative_error=bits / 64)
    writer.add_file("tokenizer.json", '{"é":1}'.encode())
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    writer.add_tensor("norm", (2, 3, 2), Dense("F32"), values)
    writer.add_tensor("embed", (6, 2), Dense("F16"), (row for row in values.astype(np.float16)))
    writer.add_tensor("bias", (12,), Dense("BF16"), (values.view(np.uint32) >> 16).astype(np.uint16))
    writer.add_tensor("scalar", (), Dense("F32"), np.float32(0.5).tobytes())
    writer.add_file("empty.txt", b"")
    writer.finish(**MEMBERS)


def nothing(writer: Writer) -> None:
    """No section at all."""
    writer.finish(**NO_MEMBERS)


def dense(writer: Writer) -> None:
    """Every stored type, with the numbers that are easily lost, in every number of dimensions from 0 to 8."""
    writer.add_tensor("f16", (11,), Dense("F16"), np.array(F16_BITS, "<u2"))
    writer.add_tensor("bf16", (11, 1), Dense("BF16"), np.array(BF16_BITS, "<u2"))
    writer.add_tensor("f32", (11,), Dense("F32"), np.array(F32_BITS, "<u4"))
    writer.add_tensor("scalar", (), Dense("BF16"), b"\x49\x40")
    writer.add_tensor("transposed", (2, 3), Dense("F16"), np.arange(6, dtype="<f2"), transposed=True)
    writer.add_tensor("3-d", (2, 1, 3), Dense("F16"), np.arange(6, dtype="<f2"))
    writer.add_tensor("8-d", (1, 2, 1, 1, 1, 1, 1, 3), Dense("F32"), np.arange(6, dtype="<f4"))
    writer.finish(**NO_MEMBERS)


def embedded_files(writer: Writer) -> None:
    """Lengths around the alignment of 256, two empty files at one offset, names beyond ASCII, objects with content."""
    for n_bytes in (0, 1, 255, 256, 257):
        writer.add_file(f"{n_bytes}.bin", bytes(i % 251 for i in range(n_bytes)))
    writer.add_file("empty too", b"")
    writer.add_file("größe.日本", "Größe\n".encode())
    model = {"config": {"b": [1, -2, 0.1, 1e-05, 1e300, True, None], "a": {"": '\u2028"\\/\t é'}}}
    writer.finish(**NO_MEMBERS | {"model": model})


def uniform(writer: Writer, bits: int) -> None:
    """With and without zeros and input scales; 37 inputs end inside a word of every width, and inside a group."""
    for symmetric in (False, True):
        for scaled in (False, True):
            layer = make_layer(3, 37, bits, group_size=16, symmetric=symmetric, scaled=scaled)
            add_layer(writer, f"symmetric={symmetric:d}.input_scales={scaled:d}", layer)
    writer.finish(**NO_MEMBERS)


def uniform_groups(writer: Writer) -> None:
    """Groups of one input, of a whole row, with and without a short last one; rows that fill their words exactly."""
    for shape, group_size in [((1, 1), 1), ((2, 5), 1), ((3, 33), 33), ((5, 70), 32), ((1, 64), 32), ((7, 3), 2)]:
        add_layer(writer, f"{shape[0]}x{shape[1]}.group={group_size}", make_layer(*shape, 5, group_size))
    writer.finish(**NO_MEMBERS)


def uniform_values(writer: Writer) -> None:
    """Scales of every kind, products with input scales that have to be rounded, and the optional fields."""
    # 0, -0, the smallest subnormal with either sign, -1, 0.1, and the largest with either sign: one row each.
    scales = f16([0x0000, 0x8000, 0x0001, 0x8001, 0xBC00, 0x2E66, 0x7BFF, 0xFBFF]).reshape(8, 1)
    codes = np.tile(np.array([0, 127, 128, 129, 255], np.uint8), (8, 1))
    signs = QuantizedLinear(codes=codes, scales=scales, zeros=None, bits=8, group_size=5)
    add_layer(writer, "signs", signs, relative_error=0)
    rounded = QuantizedLinear(
        codes=np.tile(np.array([0, 0, 0, 254, 255, 127], np.uint8), (2, 1)),
        scales=f16([0x7BFF, 0xAE66]).reshape(2, 1),
        zeros=np.full((2, 1), 127, np.uint8),
        bits=8,
        group_size=6,
        # 65/64, 67/64, 1/3 twice, the largest and the smallest
        input_scales=f16([0x3C10, 0x3C30, 0x3555, 0x3555, 0x7BFF, 0x0001]),
    )
    add_layer(writer, "rounded", rounded, relative_error=1e-05, transposed=True)
    writer.finish(**NO_MEMBERS)


FIRST: dict[str, Callable[[Writer], None]] = {
    "v1": everything,
    "empty": nothing,
    "dense": dense,
    "embedded_files": embedded_files,
    **{f"uniform_{bits}bit": lambda writer, bits=bits: uniform(writer, bits) for bits in range(2, 9)},
    "uniform_groups": uniform_groups,
    "uniform_values": uniform_values,
}
CONTENTS = FIRST | SECOND | THIRD | FOURTH
