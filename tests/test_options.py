"""From options to a recipe: what presets stand for, what is filled in, and every refusal."""

import dataclasses
from pathlib import Path

import pytest
from correlated import make_layer

from formats.section import pack
from qtool.errors import ConfigError
from qtool.factor import factorize
from qtool.gptq import gptq_quantize
from qtool.options import build_recipe, default_output, parse_share
from qtool.recipe import QuantSpec, Recipe

NOTHING_CHOSEN = {
    "calibration": "builtin",
    "text_field": "text",
    "samples": 128,
    "seq_len": 2048,
    "seed": 0,
    "embeddings": None,
    "method": "gptq",
    "number_format": None,
    "effort": "default",
    "bits": None,
    "group_size": None,
    "stat_bits": None,
    "outliers": None,
    "outlier_threshold": None,
}


def recipe(**options) -> Recipe:
    """What `qtool compress` with these options, and no others, asks for."""
    return build_recipe(**NOTHING_CHOSEN | options)


def linears(**options) -> QuantSpec:
    return recipe(**options).linears


def refusal(**options) -> str:
    with pytest.raises(ConfigError) as found:
        recipe(**options)
    return str(found.value)


# ---- what is filled in


def test_without_options_it_is_gptq_in_4_bits():
    assert linears() == QuantSpec(method="gptq", format="int", bits=4, group_size=128)
    assert recipe().embeddings == 8


@pytest.mark.parametrize(
    ("number_format", "group_size"), [("int", 128), ("nf4", 64), ("fp4", 64), ("fitted", 64), ("trellis", -1)]
)
def test_each_format_has_its_own_group_size(number_format, group_size):
    assert linears(number_format=number_format).group_size == group_size
    assert linears(number_format=number_format, group_size=32).group_size == 32
    assert linears(number_format=number_format).format == number_format


def test_spqr_is_gptq_with_small_groups_rounded_statistics_and_outliers():
    assert linears(method="spqr") == QuantSpec(
        method="gptq", format="int", bits=4, group_size=16, stat_bits=3, stat_rows=16, outlier_threshold=0.2
    )


def test_spqr_leaves_to_the_user_what_the_user_chose():
    assert linears(method="spqr", bits=3, group_size=32, stat_bits=4, outlier_threshold=0.4) == QuantSpec(
        bits=3, group_size=32, stat_bits=4, outlier_threshold=0.4
    )
    by_rate = linears(method="spqr", outliers="0.5%")
    assert (by_rate.outliers, by_rate.outlier_threshold) == (0.005, 0.0)
    assert linears(method="spqr", number_format="nf4").format == "nf4"
    assert linears(method="spqr", number_format="nf4", double_quant=True).stat_bits == 0


def test_spqr_without_outliers_is_gptq_with_its_grid_to_the_byte():
    without, same = linears(method="spqr", outliers="0"), linears(group_size=16, stat_bits=3, outliers="0%")
    assert without == same and not without.keeps_outliers
    weight, stats = make_layer()
    sections = [
        bytes(pack(gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec).layer))
        for spec in (without, dataclasses.replace(QuantSpec(), group_size=16, stat_bits=3))
    ]
    assert sections[0] == sections[1]


TRELLIS = QuantSpec(format="trellis", group_size=-1, outliers_pay=True)


def test_a_trellis_keeps_what_is_out_of_its_reach():
    assert linears(number_format="trellis") == TRELLIS
    assert [linears(number_format="trellis", bits=bits).threshold for bits in (2, 3, 4)] == [4.0, 1.0, 0.25]
    assert linears(number_format="trellis", outliers="0").threshold == 0
    assert linears(number_format="trellis", outlier_threshold=0.0).threshold == 0
    by_share = linears(number_format="trellis", outliers="1%")
    assert (by_share.outliers, by_share.threshold) == (0.01, 0)
    assert linears(number_format="trellis", outlier_threshold=2.0).threshold == 2.0
    assert not linears(number_format="trellis", method="rtn").keeps_outliers


def test_effort_fast_searches_no_ranges_and_fewer_states():
    assert linears(effort="fast") == QuantSpec(scale_search=False)
    assert linears(effort="fast", number_format="trellis") == dataclasses.replace(TRELLIS, memory=6)


def test_a_search_that_is_asked_for_is_made_even_in_haste():
    assert linears(effort="fast", scale_search=True).scale_search


def test_effort_best_is_the_trellis_with_its_largest_memory():
    assert linears(effort="best") == dataclasses.replace(TRELLIS, memory=9)
    assert linears(effort="best", number_format="trellis").memory == 9
    assert linears(effort="best", number_format="nf4").format == "nf4"
    assert linears(effort="best", method="rtn").format == "int"


def test_a_target_brings_the_trellis_and_may_choose_the_embeddings():
    by_size, by_bits = recipe(target_size="90MB"), recipe(target_bits=3.5)
    assert (by_size.linears.format, by_size.linears.memory, by_size.embeddings) == ("trellis", 8, 0)
    assert (by_size.target.size_bytes, by_size.target.bits) == (90_000_000, 0.0)
    assert (by_bits.linears.format, by_bits.embeddings, by_bits.target.bits) == ("trellis", 8, 3.5)
    assert recipe(target_size="90MB", number_format="int", embeddings=6).embeddings == 6
    assert linears(target_bits=3.5, number_format="int").format == "int"


def test_rounding_to_nearest_claims_no_solver():
    spec = linears(method="rtn")
    assert not (spec.act_order or spec.scale_search or spec.input_scales or spec.is_calibrated)
    assert recipe(method="rtn").n_windows == 0
    assert recipe(method="rtn", target_bits=4).n_windows == 128  # their losses have to be measured


def test_int8_is_rows_of_8_bits_however_it_is_spelt():
    spec = linears(method="int8")
    assert (spec.format, spec.bits, spec.group_size, spec.symmetric) == ("int", 8, -1, True)
    assert spec.is_calibrated and recipe(method="int8").n_windows == 128
    assert linears(method="int8", bits=8, number_format="int", stat_bits=0) == spec


@pytest.mark.parametrize(("bits", "group_size", "number_format", "want"), [
    (4, 128, "int", 128), (4, -1, "int", 64), (4, 32, "nf4", 64), (3, 256, "trellis", 64)
])  # fmt: skip
def test_embeddings_are_symmetric_groups_of_their_own(bits, group_size, number_format, want):
    spec = recipe(bits=bits, group_size=group_size, number_format=number_format, embeddings=6).embedding_spec
    assert spec == QuantSpec(method="rtn", bits=6, group_size=want, symmetric=True)
    assert recipe(embeddings=16).embedding_spec is None


def test_layers_take_their_bits_and_a_pattern_may_hold_an_equals_sign():
    assert recipe(layers=("down_proj=3", "a=b=8")).layers == (("down_proj", 3), ("a=b", 8))


@pytest.mark.parametrize(
    ("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), ("0", 0.0), ("0%", 0.0), ("12 %", 0.12)]
)
def test_a_share_is_a_number_or_percent(text, share):
    assert parse_share(text) == pytest.approx(share)


def test_the_output_is_named_for_the_model_and_its_bits(tmp_path):
    model = tmp_path / "llama"
    model.mkdir()
    gguf = tmp_path / "small.v2.gguf"
    gguf.touch()
    assert default_output(str(model), recipe(bits=3)) == Path("llama-3bit.qtm")
    assert default_output(str(gguf), recipe()) == Path("small.v2-4bit.qtm")
    assert default_output("org/name", recipe(target_size="1.5GB")) == Path("name-1500MB.qtm")
    assert default_output(str(model), recipe(target_bits=3.5)) == Path("llama-3.5bit.qtm")


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "method='awq': must be one of gptq, rtn, int8, spqr, ternary"),
        ({"effort": "more"}, "effort='more': must be one of fast, default, best"),
        (
            {"number_format": "fp8"},
            "format='fp8': must be one of int, nf4, fp4, fitted, trellis, ternary, q_0, q_1, q_k",
        ),
        ({"bits": 9}, "bits=9: must be 2 to 8"),
        ({"bits": 3, "number_format": "nf4"}, "bits=3: must be 4 for nf4"),
        ({"bits": 8, "number_format": "fp4"}, "bits=8: must be 4 for fp4"),
        ({"bits": 1, "number_format": "fitted"}, "bits=1: must be 2 to 8 for fitted"),
        ({"bits": 7, "number_format": "trellis"}, "bits=7: must be 1 to 6 for trellis"),
        ({"group_size": 7}, "group_size=7: must be -1 (one group per row) or at least 8"),
        ({"percdamp": 10.0}, "percdamp=10.0: must be above 0 and below 10"),
        ({"stat_bits": 1}, "stat_bits=1: must be 2 to 8, or 0 for fp16"),
        ({"stat_bits": 9}, "stat_bits=9: must be 2 to 8, or 0 for fp16"),
        ({"stat_bits": 3, "stat_rows": 0}, "stat_rows=0: must be at least 1"),
        ({"stat_rows": 8}, "--stat-rows 8: are for statistics that are rounded; give --stat-bits too"),
        (
            {"method": "rtn", "act_order": False},
            "--no-act-order: is the solver's, --method rtn has none; leave it out",
        ),
        ({"method": "rtn", "percdamp": 0.1}, "--percdamp 0.1: is the solver's, --method rtn has none; leave it out"),
        (
            {"method": "int8", "input_scales": True},
            "--input-scales: is the solver's, --method int8 has none; leave it out",
        ),
        (
            {"double_quant": True},
            "double_quant: is for nf4, fp4 and fitted, not for int; --stat-bits 3 is for it",
        ),
        (
            {"double_quant": True, "number_format": "trellis"},
            "double_quant: is for nf4, fp4 and fitted, not for trellis; --stat-bits 3 is for it",
        ),
        (
            {"double_quant": True, "number_format": "nf4", "stat_bits": 3},
            "double_quant and stat_bits: choose one of the two",
        ),
        ({"memory": 1}, "memory=1: must be 2 to 9"),
        ({"memory": 10}, "memory=10: must be 2 to 9"),
        ({"outliers": "50%"}, "outliers=0.5: must be a share of the weights, 0 to 0.5 (50%)"),
        ({"outliers": "-1%"}, "outliers=-0.01: must be a share of the weights, 0 to 0.5 (50%)"),
        ({"outliers": "nan"}, "outliers=nan: must be a share of the weights, 0 to 0.5 (50%)"),
        ({"outliers": "few"}, "--outliers few: must be a share of the weights, as 0.5% or 0.005"),
        ({"outliers": "%"}, "--outliers %: must be a share of the weights, as 0.5% or 0.005"),
        ({"outlier_threshold": -1.0}, "outlier_threshold=-1: must be 0 (off) or more, and finite"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold=nan: must be 0 (off) or more, and finite"),
        ({"outlier_threshold": float("inf")}, "outlier_threshold=inf: must be 0 (off) or more, and finite"),
        ({"method": "rtn", "outliers": "1%"}, "outliers: are found by the solver; --method rtn has none"),
        ({"method": "int8", "outlier_threshold": 1.0}, "outliers: are found by the solver; --method int8 has none"),
        ({"method": "int8", "outlier_features": -1}, "outlier_features=-1: must be 0 (by the threshold) or more"),
        ({"method": "int8", "activation_threshold": 0.0}, "activation_threshold=0: must be above 0, and finite"),
        (
            {"method": "int8", "activation_threshold": float("nan")},
            "activation_threshold=nan: must be above 0, and finite",
        ),
        ({"outlier_features": 2}, "--outlier-features 2: is for --method int8; give it, or leave this out"),
        ({"activation_threshold": 5.0}, "--activation-threshold 5.0: is for --method int8; give it, or leave this out"),
        ({"method": "int8", "group_size": 64}, "--group-size 64: --method int8 has 8 bits in rows; leave it out"),
        (
            {"method": "int8", "double_quant": True},
            "--double-quant: --method int8 has 8 bits in rows; leave it out",
        ),
        ({"number_format": "nf4", "symmetric": True}, "--sym: nf4 has no zeros; give --format int, or leave it out"),
        (
            {"number_format": "trellis", "scale_search": False},
            "--no-scale-search: a trellis has no search; leave it out",
        ),
        ({"effort": "best", "scale_search": True}, "--scale-search: a trellis has no search; leave it out"),
        ({"target_bits": 4.0, "symmetric": True}, "--sym: trellis has no zeros; give --format int, or leave it out"),
        (
            {"number_format": "ternary", "symmetric": True},
            "--sym: ternary has no zeros to choose; leave it out",
        ),
        (
            {"number_format": "ternary", "effort": "best"},
            "--effort best: ternary is solved in one way; leave it out",
        ),
        ({"fused": True}, "--fused: holds what a target spreads together; give --target-size or --target-bits"),
        ({"method": "int8", "bits": 4}, "--bits 4: --method int8 has 8 bits in rows; leave it out"),
        ({"method": "int8", "number_format": "nf4"}, "--format nf4: --method int8 has 8 bits in rows; leave it out"),
        ({"method": "int8", "stat_bits": 3}, "--stat-bits 3: --method int8 has 8 bits in rows; leave it out"),
        (
            {"method": "int8", "target_bits": 4.0},
            "--method int8 has 8 bits in every layer: leave out --layer and targets, or take gptq",
        ),
        (
            {"method": "int8", "layers": ("down=4",)},
            "--method int8 has 8 bits in every layer: leave out --layer and targets, or take gptq",
        ),
        ({"target_bits": 9.0}, "target_bits=9: must be 1 to 8"),
        ({"target_bits": 0.0}, "target_bits=0: must be 1 to 8"),
        ({"target_bits": float("nan")}, "target_bits=nan: must be 1 to 8"),
        ({"target_bits": 0.5}, "target_bits=0.5: must be 1 to 8"),
        ({"target_bits": 4.0, "target_size": "1GB"}, "target_size and target_bits: choose one of the two"),
        ({"target_bits": 4.0, "bits": 4}, "--bits 4: a target chooses the bits itself; give one of the two"),
        ({"target_size": "1GB", "bits": 3}, "--bits 3: a target chooses the bits itself; give one of the two"),
        ({"layers": ("down_proj",)}, "--layer down_proj: must be REGEX=BITS, as 'down_proj=4'"),
        ({"layers": ("=4",)}, "--layer =4: must be REGEX=BITS, as 'down_proj=4'"),
        ({"layers": ("down_proj=four",)}, "--layer down_proj=four: must be REGEX=BITS, as 'down_proj=4'"),
        ({"ignore": ("(",)}, "'(': not a regular expression: missing ), unterminated subpattern at position 0"),
        ({"layers": ("*=4",)}, "'*': not a regular expression: nothing to repeat at position 0"),
        ({"embeddings": 1}, "embeddings=1: must be 2 to 8 bits, or 16 to leave them as they are"),
        ({"embeddings": 0}, "embeddings=0: must be 2 to 8 bits, or 16 to leave them as they are"),
        (
            {"embeddings": 0, "target_bits": 4.0},
            "embeddings=0: must be 2 to 8 bits, or 16 to leave them as they are",
        ),
    ],
)
def test_a_refusal_names_the_value_and_the_way_out(options, message):
    assert refusal(**options) == message
