"""Layers that cannot be: what their constructors say (SPEC 7.3, 7.6.1, 7.9 to 7.14)."""

import re
from dataclasses import replace

import numpy as np
import pytest
from format_samples import make_layer
from layer_samples import (
    make_affine,
    make_codebook,
    make_double_quant,
    make_int8,
    make_outliers,
    make_products,
    make_spqr,
    make_trellis,
    make_two_level,
    with_outliers,
)

from formats.errors import FormatError
from formats.layer import CodebookLinear, Int8Linear, QuantizedLinear, TrellisLinear

F16, F32, U8, U16, U32 = np.float16, np.float32, np.uint8, np.uint16, np.uint32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(make_two_level(3, 2), bits=1), "stat_bits=1: must be 2 to 8 (SPEC 7.9)"),
        (lambda: replace(make_two_level(3, 2), rows=0), "stat_rows=0: must be 1 or more (SPEC 7.9)"),
        (
            lambda: replace(make_two_level(3, 2), rows=3),
            "scales of a statistic are float16[2, 2]: must be float16[1, 2]",
        ),
        (lambda: replace(make_two_level(3, 2), codes=np.full((3, 2), 8, U8)), "codes of a statistic reach 8: does not"),
        (lambda: replace(make_two_level(3, 2), codes=np.zeros(3, U8)), "codes of a statistic [3]: must be [out, G]"),
        (lambda: replace(make_two_level(3, 2), zeros=np.full((2, 2), np.inf, F16)), "a zero of a statistic is NaN or"),
        (lambda: replace(make_double_quant(3, 2), codes=np.zeros((3, 0), U8)), "must be [out, G], not empty"),
        (lambda: replace(make_double_quant(3, 2), absmax=np.ones(2, F32)), "absmax of the scales are float32[2]: must"),
        (lambda: replace(make_double_quant(3, 2), mean=np.ones(1, F16)), "mean of the scales are float16[1]: must be"),
        (lambda: replace(make_double_quant(3, 2), mean=np.full(1, 2.0**65, F32)), "the mean of the scales is NaN, inf"),
        (lambda: replace(make_outliers(3, 5), values=np.zeros(0, F16)), "outliers: 0 in 3 rows: must be 1 or more, or"),
        (
            lambda: replace(make_outliers(3, 5), values=np.zeros(3, F32)),
            "outlier_values are float32[3]: must be float16",
        ),
        (
            lambda: replace(make_outliers(3, 5), columns=np.zeros(2, U16)),
            "outlier_columns are uint16[2]: must be uint16",
        ),
        (lambda: with_outliers(make_layer(2, 5), 2).outliers.check_fits((3, 5)), "outlier_rows are uint32[3]: must be"),
        (lambda: make_outliers(3, 5).check_fits((3, 70000)), "outlier_columns are uint16[3]: must be uint32[3]"),
        (
            lambda: replace(make_layer(2, 5), outliers=make_outliers(2, 6, every=6)),
            "outlier_columns reach 5: must be below 5",
        ),
        (lambda: replace(make_spqr(), scales=make_two_level(5, 2)), "scales are [5, 2]: must be [5, 3] (SPEC 7.3)"),
        (lambda: replace(make_spqr(), zeros=make_two_level(4, 3)), "zeros are [4, 3]: must be [5, 3] (SPEC 7.3)"),
        (
            lambda: replace(make_spqr(), zeros=np.zeros((5, 3), U8)),
            "scales are in two levels of 3 bits over 2 rows, zero",
        ),
        (
            lambda: replace(make_spqr(), zeros=make_two_level(5, 3, 4)),
            "zeros in two levels of 4 bits over 2 rows: must",
        ),
        (lambda: replace(make_layer(), scales=make_double_quant(3, 3)), "scales are quantized twice: uniform has them"),
        (lambda: replace(make_codebook(), levels="af4"), "levels='af4': must be nf4, fp4 or fitted (SPEC 7.11)"),
        (lambda: replace(make_codebook(), levels=np.zeros(8, F16)), "levels are float16[8]: must be float16[16]"),
        (lambda: replace(make_codebook(), levels=np.full(16, np.nan, F16)), "a level is NaN or infinite (SPEC 7.6)"),
        (lambda: replace(make_codebook(), bits=5), "bits=5: must be 4 with levels nf4 (SPEC 7.11)"),
        (lambda: replace(make_trellis(), bits=7), "bits=7: must be 1 to 6 (SPEC 7.3, 7.14)"),
        (lambda: replace(make_trellis(), bits=2), "codes reach 7: does not fit 2 bits (SPEC 7.4.1)"),
        (lambda: replace(make_trellis(), bits=4), "levels are float16[16]: must be float16[32] (SPEC 7.14)"),
        (lambda: replace(make_trellis(), memory=10), "memory=10: must be 2 to 9 (SPEC 7.14)"),
        (lambda: replace(make_trellis(), run=33), "run=33: must be a multiple of 32, above 0 (SPEC 7.14)"),
        (lambda: replace(make_trellis(), levels=np.full(16, np.inf, F16)), "a level is NaN or infinite (SPEC 7.6)"),
        (lambda: replace(make_trellis(), scales=make_double_quant(70, 3)), "scales are quantized twice: trellis has"),
        (lambda: replace(make_affine(), bits=9), "bits=9: must be 2 to 8 (SPEC 7.17)"),
        (lambda: replace(make_affine(), bits=3), "codes reach 15: does not fit 3 bits (SPEC 7.4.1)"),
        (lambda: replace(make_affine(), group_size=38), "group_size=38: must be 1 to 37 (SPEC 7.17)"),
        (lambda: replace(make_affine(), codes=np.zeros(3, U8)), "codes [3]: must be [out, in], not empty (SPEC 7.17)"),
        (lambda: replace(make_affine(), minima=None), "symmetric without stat_bits: that is uniform (SPEC 7.17)"),
        (
            lambda: replace(make_affine(), minima=np.zeros((5, 9), F16)),
            "minima are float16[5, 9]: must be float16[5, 10]",
        ),
        (
            lambda: replace(make_affine(), minima=np.full((5, 10), np.nan, F16)),
            "a minimum is NaN or infinite (SPEC 7.6)",
        ),
        (
            lambda: replace(make_affine(), minima=make_products(5, 10, 6, 8, False)),
            "scales and minima: must be stored alike (SPEC 7.17)",
        ),
        (
            lambda: replace(
                make_affine(), scales=make_products(5, 10, 6, 8, True), minima=make_products(5, 10, 6, 8, True)
            ),
            "scales: must have signs if and only if codes have (SPEC 7.17)",
        ),
        (
            lambda: replace(make_affine(), scales=make_products(5, 9, 6, 8, True), minima=None),
            "codes of scales are uint8[5, 9]: must be uint8[5, 10] (SPEC 7.17)",
        ),
        (
            lambda: replace(make_affine(), scales=replace(make_products(5, 10, 6, 8, True), bits=5), minima=None),
            "codes of scales reach 63: does not fit 5 bits (SPEC 7.4.1)",
        ),
        (
            lambda: replace(make_affine(), scales=replace(make_products(5, 10, 6, 8, True), groups=0), minima=None),
            "stat_groups=0: must be 1 or more with stat_bits (SPEC 7.17)",
        ),
        (
            lambda: replace(make_int8(), codes=np.zeros(3, np.int8)),
            "codes [3]: must be [out, in], not empty (SPEC 7.13)",
        ),
        (lambda: replace(make_int8(), codes=np.zeros((3, 11), U8)), "codes are uint8[3, 11]: must be int8[3, 11]"),
        (lambda: replace(make_int8(), scales=np.ones(3, F16)), "scales are float16[3]: must be float32[3] (SPEC 7.13)"),
        (lambda: replace(make_int8(), columns=None), "columns and values: must be both given or both None (SPEC 7.13)"),
        (
            lambda: replace(make_int8(), columns=np.zeros(0, U32)),
            "columns are uint32[0]: must be uint32[1] (SPEC 7.13)",
        ),
        (lambda: replace(make_int8(), columns=np.array([2], U32)), "values are float16[3, 2]: must be float16[3, 1]"),
    ],
)
def test_spec_7_6_1_a_layer_that_cannot_be_is_refused(make, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        make()


def test_the_layers_above_are_good():
    """So that each refusal is for what was changed."""
    kinds = {type(layer) for layer in (make_layer(), make_spqr(), make_codebook(), make_int8(), make_trellis())}
    assert kinds == {QuantizedLinear, CodebookLinear, Int8Linear, TrellisLinear}
    make_outliers(3, 5).check_fits((3, 5))
    assert make_two_level(3, 2).shape == make_double_quant(3, 2).shape == (3, 2)
