"""The packed key index against keys restored one by one."""

import pytest
import torch
from kvoffload_kernels.page_scores.reference import quantise, score_tokens, unpack
from torch.testing import assert_close

BITS = [1, 2, 4]


def group_of_keys(n_groups=3, n_tokens=13, dim=16, dtype=torch.float32):
    return torch.randn(2, n_groups, n_tokens, dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def restored(packed, zero, step, bits):
    """Channel by channel from the bytes, as the layout is told in the docstring: byte j holds j, j + D', j + 2 D'."""
    width, mask = packed.shape[-1], 2**bits - 1
    keys = torch.empty(*packed.shape[:-1], zero.shape[-1], dtype=torch.float64)
    for channel in range(keys.shape[-1]):
        plane, byte = divmod(channel, width)
        code = (packed[..., byte].int() >> (plane * bits)) & mask
        keys[..., channel] = zero[..., None, channel].double() + code.double() * step[..., None, channel].double()
    return keys


@pytest.mark.parametrize("bits", BITS)
def test_a_token_takes_its_bits_and_no_more(bits):
    packed, zero, step = quantise(group_of_keys(), None, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 3, 13, 16 * bits // 8))
    assert zero.shape == step.shape == (2, 3, 16)
    assert zero.dtype == step.dtype == torch.float16


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_follows_the_byte_layout(bits):
    packed = torch.randint(0, 256, (5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    zero, step = torch.zeros(24 // bits), torch.ones(24 // bits)
    assert torch.equal(unpack(packed, bits).double(), restored(packed, zero, step, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
def test_keys_come_back_within_half_a_step(bits, dtype):
    keys = group_of_keys(dtype=dtype)
    packed, zero, step = quantise(keys, None, bits)
    error = (restored(packed, zero, step, bits) - keys.double()).abs()
    rounding = 2e-3 * keys.double().abs().amax()  # zero points and steps are kept in fp16
    assert (error <= step[..., None, :].double() / 2 + rounding).all()


def test_more_bits_are_nearer():
    keys = group_of_keys()
    errors = [float((restored(*quantise(keys, None, bits), bits) - keys).square().mean()) for bits in BITS]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]


def test_one_bit_is_the_mean_and_the_mean_deviation_with_the_sign():
    keys = torch.tensor([[1.0], [3.0], [5.0], [7.0]]).expand(4, 8)  # mean 4, mean absolute deviation 2
    expected = torch.tensor([[2.0], [2.0], [6.0], [6.0]]).expand(4, 8)
    assert_close(restored(*quantise(keys, None, 1), 1), expected.double())


def test_two_bits_are_the_centres_of_quarters_of_the_range():
    keys = torch.tensor([[0.0], [3.0], [5.0], [8.0]]).expand(4, 8)
    expected = torch.tensor([[1.0], [3.0], [5.0], [7.0]]).expand(4, 8)
    assert_close(restored(*quantise(keys, None, 2), 2), expected.double())


def test_four_bits_hit_both_ends_of_the_range():
    keys = torch.tensor([[-1.0], [14.0], [4.0]]).expand(3, 8)
    assert_close(restored(*quantise(keys, None, 4), 4), keys.double())


@pytest.mark.parametrize("bits", BITS)
def test_tokens_that_do_not_count_stay_out_of_the_statistics(bits):
    keys = group_of_keys(n_tokens=12)
    valid = torch.ones(2, 3, 12, dtype=torch.bool)
    valid[0, :, :5] = False
    wild = keys.masked_fill(~valid[..., None], 1e4)
    packed, zero, step = quantise(wild, valid, bits)
    only, zero_only, step_only = quantise(keys[0, :, 5:], None, bits)
    assert torch.equal(zero[0], zero_only)
    assert torch.equal(step[0], step_only)
    assert torch.equal(packed[0, :, 5:], only)


@pytest.mark.parametrize("bits", BITS)
def test_a_group_without_a_valid_token_is_finite(bits):
    packed, zero, step = quantise(torch.full((1, 4, 8), 7.0), torch.zeros(1, 4, dtype=torch.bool), bits)
    assert restored(packed, zero, step, bits).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_equal_keys_come_back_as_they_are(bits):
    keys = torch.full((1, 6, 8), 3.5)
    assert_close(restored(*quantise(keys, None, bits), bits).float(), keys, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_score_is_the_query_times_the_restored_key(bits):
    keys = group_of_keys()
    query = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    packed, zero, step = quantise(keys, None, bits)
    expected = query.double() @ restored(packed, zero, step, bits).flatten(1, 2).transpose(-1, -2)
    assert_close(score_tokens(query, packed, zero, step, bits), expected.float(), atol=1e-5, rtol=1e-5)
