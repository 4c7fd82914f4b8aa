import numpy as np
import pytest
from format_samples import make_layer, same_layer
from hypothesis import given
from hypothesis import strategies as st

from formats.encoding import Dense, Uniform, encoding_from_fields, encoding_of
from formats.errors import FormatError
from formats.layer import QuantizedLinear
from formats.section import check_section, dense_to_float32, pack, part_arrays, unpack


def test_spec_7_1_parts_of_three_bits_by_hand():
    """[3, 100] in groups of 32: 7 + 4 words a row, 4 scales; the 12 zeros fit one word a plane."""
    parts = Uniform(bits=3, group_size=32, symmetric=False).parts((3, 100))
    assert [(part.name, part.dtype, part.shape, part.offset_bytes) for part in parts] == [
        ("codes.2", "<u4", (3, 7), 0),  # 84 bytes
        ("codes.1", "<u4", (3, 4), 128),  # 48 bytes
        ("scales", "<f2", (3, 4), 192),  # 24 bytes
        ("zeros.2", "<u4", (1, 1), 256),
        ("zeros.1", "<u4", (1, 1), 320),
    ]
    assert Uniform(bits=3, group_size=32, symmetric=False).section_bytes((3, 100)) == 324
    assert Uniform(bits=3, group_size=32, symmetric=True).section_bytes((3, 100)) == 216


def test_spec_7_2_dense_sections():
    assert Dense("F32").section_bytes((2, 3)) == 24
    assert Dense("BF16").section_bytes((2, 3)) == 12
    assert Dense("F16").section_bytes(()) == 2


@pytest.mark.parametrize("encoding", [Dense("BF16"), Uniform(bits=4, group_size=128, symmetric=True)])
def test_fields_are_read_back(encoding):
    assert encoding_from_fields(encoding.fields() | {"name": "w"}) == encoding


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"encoding": "ternary"},
            "unknown encoding 'ternary'; this reader knows affine, codebook, dense, int8_rows, ternary_dict,",
        ),
        ({"encoding": []}, r"unknown encoding \[\]"),
        ({}, "unknown encoding None"),
        ({"encoding": "dense"}, "dtype=None: must be str"),
        ({"encoding": "dense", "dtype": "F64"}, "dtype 'F64': must be one of F16, BF16, F32"),
        ({"encoding": "uniform", "bits": 4.0, "group_size": 4, "symmetric": True}, "bits=4.0: must be int"),
        ({"encoding": "uniform", "bits": 4, "group_size": True, "symmetric": True}, "group_size=True: must"),
        ({"encoding": "uniform", "bits": 4, "group_size": 4, "symmetric": 1}, "symmetric=1: must be bool"),
        ({"encoding": "uniform", "bits": 4, "group_size": 0, "symmetric": True}, "group_size=0: must be 1"),
        ({"encoding": "uniform", "bits": 1, "group_size": 4, "symmetric": True}, "bits=1: must be 2 to 8"),
    ],
)
def test_spec_7_fields_that_cannot_be_are_refused(entry, message):
    with pytest.raises(FormatError, match=message):
        encoding_from_fields(entry)


@pytest.mark.parametrize(
    ("shape", "message"), [((4,), "two dimensions"), ((2, 3, 4), "two"), ((4, 3), "more than 3 inputs")]
)
def test_spec_7_3_uniform_needs_a_matrix_that_holds_a_group(shape, message):
    with pytest.raises(FormatError, match=message):
        Uniform(bits=4, group_size=4, symmetric=True).parts(shape)


def test_pack_by_hand():
    """Codes 1, 2, 3 of 4 bits, one scale of 1.0 (0x3c00), zero 5: each part starts on 64 bytes."""
    layer = QuantizedLinear(
        codes=np.array([[1, 2, 3]], np.uint8),
        scales=np.array([[1]], np.float16),
        zeros=np.array([[5]], np.uint8),
        bits=4,
        group_size=3,
    )
    words = bytes.fromhex("21030000"), bytes.fromhex("003c"), bytes.fromhex("05000000")
    assert pack(layer) == words[0].ljust(64, b"\0") + words[1].ljust(64, b"\0") + words[2]


@given(st.tuples(st.integers(1, 5), st.integers(1, 100)), st.integers(2, 8), st.integers(1, 100), st.booleans())
def test_unpack_inverts_pack(shape, bits, group_size, symmetric):
    layer = make_layer(*shape, bits, min(group_size, shape[1]), symmetric, scaled=bits % 2 == 0)
    section, encoding = pack(layer), encoding_of(layer)
    assert len(section) == encoding.section_bytes(shape)
    assert same_layer(unpack(section, shape, encoding), layer)
    check_section(section, shape, encoding)


def test_negative_zero_and_subnormal_scales_survive():
    layer = make_layer()
    scales = np.resize(np.array([-0.0, 2**-24, -65504], np.float16), layer.scales.shape)
    layer = QuantizedLinear(codes=layer.codes, scales=scales, zeros=None, bits=3, group_size=4)
    assert same_layer(unpack(pack(layer), (3, 11), encoding_of(layer)), layer)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, -1])
def test_spec_7_6_input_scales_are_finite_and_above_zero(value):
    layer = make_layer(scaled=True)
    section = bytearray(pack(layer))
    part_arrays(section, (3, 11), encoding_of(layer))["input_scales"][4] = value
    with pytest.raises(FormatError, match=r"an input scale is NaN, infinite or not above 0 \(SPEC 7.6\)"):
        check_section(section, (3, 11), encoding_of(layer))
    with pytest.raises(FormatError, match=r"an input scale is NaN, infinite or not above 0 \(SPEC 7.6\)"):
        unpack(section, (3, 11), encoding_of(layer))


def test_part_arrays_are_views():
    layer = make_layer()
    section = bytearray(pack(layer))
    scales = part_arrays(section, (3, 11), encoding_of(layer))["scales"]
    scales[0, 0] = 7
    assert unpack(section, (3, 11), encoding_of(layer)).scales[0, 0] == 7


def test_spec_5_4_a_section_of_another_length_is_refused():
    with pytest.raises(FormatError, match="7 bytes, must be 8"):
        part_arrays(bytes(7), (2,), Dense("F32"))


@pytest.mark.parametrize(("dtype", "data"), [("F32", "0000c03f"), ("F16", "003e"), ("BF16", "c03f")])
def test_spec_7_2_dense_values_by_hand(dtype, data):
    got = dense_to_float32(bytes.fromhex(data) * 2, (2,), dtype)
    assert got.dtype == np.float32
    assert got.tolist() == [1.5, 1.5]
    assert got.flags.writeable


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (30, 1, r"bytes before part 'codes.1' are not zero \(SPEC 4.3\)"),
        (3, 0x80, r"part 'codes.2': bits behind the last code are not zero \(SPEC 7.4.4\)"),
        (65, 0x08, r"part 'codes.1': bits behind the last code"),
        (129, 0x7E, r"a scale is NaN or infinite \(SPEC 7.6\)"),
        (194, 0x40, r"part 'zeros.2': bits behind the last code"),
    ],
)
def test_check_section_names_what_is_wrong(at, value, message):
    layer = make_layer()
    section = bytearray(pack(layer))
    section[at] |= value
    with pytest.raises(FormatError, match=message):
        check_section(section, (3, 11), encoding_of(layer))
