"""Bytes in the golden files of version 1.3 by hand."""

from test_golden_1_1 import part, weights


def test_spec_7_17_steps_from_a_minimum_by_hand():
    """Two bits a code, the first the lowest: 0b11100100."""
    assert part("affine", "by hand", "codes.2") == bytes([0xE4, 0, 0, 0])
    assert part("affine", "by hand", "scales") == bytes.fromhex("003c 0038")
    assert part("affine", "by hand", "minima") == bytes.fromhex("00c0 0034")
    assert weights("affine", "by hand").tolist() == [[-2, -1, 1.25, 1.75]]


def test_spec_7_17_1_statistics_in_two_levels_by_hand():
    """Scales 3 and 1 halves, minima 2 and 0 quarters, which are subtracted."""
    name = "products by hand.symmetric=0"
    assert part("affine", name, "scale_codes.2") == bytes([0b0111, 0, 0, 0])
    assert part("affine", name, "minimum_codes.2") == bytes([0b0010, 0, 0, 0])
    assert part("affine", name, "minimum_units") == bytes.fromhex("0034")
    assert weights("affine", name).tolist() == [[-0.5, 1, 1, 1.5]]


def test_spec_7_17_2_signs_by_hand():
    """Both codes less 2: scales 1 and -1 halves, integers -2 to 1."""
    assert weights("affine", "products by hand.symmetric=1").tolist() == [[-1, -0.5, 0, -0.5]]


def test_spec_7_8_an_order_of_the_inputs_by_hand():
    """Places 1, 3, 2, 0: inputs 3 and 0 are the first group, 2 and 1 the second."""
    assert part("input_order", "by hand", "input_order") == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
    assert weights("input_order", "by hand").tolist() == [[-2, -0.5, 0, 1]]
