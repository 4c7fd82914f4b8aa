"""Keys and values in 4 and 8 bits: what a row becomes, and that a model with it is the same however it is run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import qtool
from formats.errors import KernelError
from formats.kv_cache import PackedCache, group_of, pack_rows, rotate, unpack_rows


def round_trip(states, bits):
    return unpack_rows(pack_rows(states, bits), bits, states)


def test_a_row_by_hand():
    """Rotated: -8, 7, 0, 1. Step (7 - -8) / 15 = 1, so codes are values + 8; fp16 1.0 is 0x3c00, -8.0 is 0xc800."""
    row = torch.tensor([[0.0, -8.0, -1.0, -7.0]])
    assert pack_rows(row, 4).tolist() == [[0xF0, 0x98, 0x00, 0x3C, 0x00, 0xC8]]
    assert torch.equal(round_trip(row, 4), row)


@pytest.mark.parametrize("n", [1, 8, 40, 64, 80, 96, 128])
def test_a_rotation_is_its_own_inverse_and_keeps_lengths(n):
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(rotate(rotate(rows)), rows, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotate(rows).norm(dim=1), rows.norm(dim=1))


def test_a_channel_that_is_far_larger_than_others_costs_them_less():
    """64 channels, one of them 100: its share in each rotated one is 12.5, and no step is of its size."""
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    rows[:, 7] += 100
    error = (round_trip(rows, 4) - rows)[:, :7].square().mean().item()
    spread = rows.amax(1) - rows.amin(1)
    assert error < 0.1 * (spread / 15).square().mean().item() / 12


def test_groups_divide_the_head():
    assert [group_of(n) for n in (8, 64, 80, 96, 128, 192, 256)] == [8, 64, 40, 48, 64, 64, 64]


@pytest.mark.parametrize(("bits", "per_value"), [(4, 4.5), (8, 8.5)])
def test_bits_of_a_value(bits, per_value):
    assert pack_rows(torch.randn(1, 2, 3, 128), bits).nbytes * 8 == per_value * 2 * 3 * 128


@given(
    st.integers(1, 130), st.sampled_from([4, 8]), st.sampled_from([torch.float32, torch.float16]), st.floats(-3, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_no_group_is_off_by_more_than_half_a_step(n, bits, dtype, magnitude, seed):
    """In root mean square over a group, which a rotation keeps: half a step, and what rounding it and the smallest
    value to fp16 moves all of them by."""
    states = (torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    groups = rotate(states.float()).unflatten(-1, (-1, group_of(n)))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    spread, largest = high - low, torch.maximum(low.abs(), high.abs())
    error = (round_trip(states, bits).float() - states.float()).unflatten(-1, (-1, group_of(n)))
    error = error.square().mean(-1, keepdim=True).sqrt()
    in_fp16 = 2.0**-9 * (spread + largest) + 2**bits * 2.0**-24
    assert (error <= spread / (2**bits - 1) / 2 + in_fp16).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30, math.inf])
def test_a_group_of_equal_values_is_kept_as_far_as_fp16_reaches(value):
    assert (round_trip(torch.full((1, 70), value), 4) == max(min(value, 65504.0), -65504.0)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gptj"])
def test_token_by_token_is_as_all_at_once(tiny_files, family, bits):
    """Windows of 16 slide (mistral, gemma2) over 40 tokens."""
    model = qtool.load(tiny_files.compressed(family))
    ids = torch.arange(80).view(2, 40) * 3 % 250
    with torch.no_grad():
        plain = model(ids).logits
        whole = model(ids, cache=PackedCache(model.config, bits)).logits
        cache = PackedCache(model.config, bits)
        steps = torch.cat([model(part, cache=cache).logits for part in ids.split([7, *[1] * 33], 1)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-3, atol=1e-3)
    apart = ((whole - plain).norm() / plain.norm()).item()
    assert 0 < apart < {4: 0.3, 8: 0.02}[bits]


def test_beams_are_reordered(tiny_files):
    model = qtool.load(tiny_files.compressed("llama"))
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(5)[None]
    by_cache = model.generate(ids, cache=PackedCache(model.config, 8), **options)
    assert torch.equal(by_cache, model.generate(ids, **options))


def test_what_it_takes_is_counted(tiny_files):
    model = qtool.load(tiny_files.compressed("llama"))
    cache = PackedCache(model.config, 4)
    with torch.no_grad():
        model(torch.arange(10)[None], cache=cache)
    n_values = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 10 * 8
    assert cache.n_bytes == n_values // 8 * (4 + 4)  # heads of 8: 4 bytes of codes, a step and a smallest value


def test_other_bits_are_refused(tiny_files):
    config = qtool.load(tiny_files.compressed("llama")).config
    with pytest.raises(KernelError, match=r"^kv_bits=3: must be 4 or 8$"):
        PackedCache(config, 3)


def test_a_model_whose_layers_hold_more_than_keys_and_values_is_refused():
    config = AutoConfig.for_model("falcon_h1", num_hidden_layers=2)
    with pytest.raises(
        KernelError, match=r"^kv_bits=4: falcon_h1 has layers whose keys and values are not packed: Lin"
    ):
        PackedCache(config, 4)
    config = AutoConfig.for_model("mamba", num_hidden_layers=2)
    with pytest.raises(KernelError, match=r"^kv_bits=4: mamba has no cache of keys and values to round$"):
        PackedCache(config, 4)
