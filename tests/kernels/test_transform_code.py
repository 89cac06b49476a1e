"""Transform-coded keys: the fit against its definition, the codes against a plain quantiser."""

import pytest
import torch
from kvoffload_kernels.transform_code.reference import (
    BITS,
    code_bytes,
    decode,
    encode,
    fit,
    fit_levels,
    n_levels,
    tier_widths,
)
from torch.testing import assert_close


def keys_and_queries(rows=2, n=4000, size=16, seed=0):
    """Correlated keys around a mean far from zero, and queries that ask some directions far more than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, size, size, generator=generator)
    keys = torch.randn(rows, n, size, generator=generator) @ mix + 20 * torch.randn(rows, 1, size, generator=generator)
    queries = torch.randn(rows, 500, size, generator=generator) * torch.logspace(1, -2, size)
    return keys, queries


def moments(keys, queries):
    mean = keys.mean(1)
    centred = keys - mean[:, None]
    return mean, centred.mT @ centred / keys.shape[1], queries.mT @ queries / queries.shape[1]


def coded(keys, queries, bits, moment=None):
    """Restored keys; of a transform that knows the queries, or another ``moment``."""
    mean, covariance, known = moments(keys, queries)
    widths = tier_widths(bits, keys.shape[-1])
    analysis, synthesis = (t[..., : sum(widths)] for t in fit(covariance, known if moment is None else moment))
    levels = fit_levels((keys - mean[:, None]) @ analysis, torch.ones(keys.shape[:2]), widths)
    return decode(encode(keys, mean, analysis, levels), levels) @ synthesis.mT + mean[:, None]


def score_error(keys, restored, queries):
    return float((queries @ (restored - keys).mT).square().mean())


def test_synthesis_undoes_analysis():
    keys, queries = keys_and_queries()
    mean, covariance, moment = moments(keys, queries)
    analysis, synthesis = fit(covariance, moment)
    centred = keys - mean[:, None]
    assert_close(centred @ analysis @ synthesis.mT, centred, atol=2e-3, rtol=1e-3)


def test_channels_are_uncorrelated_with_unit_variance_and_fall_in_what_they_cost():
    keys, queries = keys_and_queries()
    mean, covariance, moment = moments(keys, queries)
    analysis, synthesis = fit(covariance, moment)
    channels = (keys - mean[:, None]) @ analysis
    covariance = channels.mT @ channels / keys.shape[1]
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert_close(covariance, torch.diag_embed(variance), atol=0.02, rtol=0)
    assert_close(variance[:, :8], torch.ones(2, 8), atol=0.02, rtol=0)
    assert (variance < 1.02).all()  # the least ones are below: a share of the mean variance was added for the fit
    cost = torch.einsum("gdc,gde,gec->gc", synthesis, moment, synthesis)  # of an error of one in each channel
    assert (cost[:, 0] > 10 * cost[:, -1]).all()


@pytest.mark.parametrize("size", [6, 13, 16, 64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_give_the_nearest_level_of_each_channel(bits, size):
    generator = torch.Generator().manual_seed(size)
    widths, channels = tier_widths(bits, size), torch.randn(3, 50, size, generator=generator)
    levels = fit_levels(channels, torch.ones(3, 50), widths)
    assert sum(level[0].numel() for level in levels) == n_levels(widths)
    identity = torch.eye(size)[None].expand(3, -1, -1)[..., : sum(widths)]
    codes = encode(channels, torch.zeros(3, size), identity, levels)
    assert codes.shape == (3, 50, code_bytes(widths))
    given = decode(codes, levels)
    choices = [level[:, i] for level in levels for i in range(level.shape[1])]
    for i, choice in enumerate(choices):
        nearest = (channels[..., i, None] - choice[:, None].float()).abs().argmin(-1)
        assert_close(given[..., i], choice.float().gather(1, nearest))
    assert given.shape[-1] == sum(widths)


@pytest.mark.parametrize(("widths", "expected"), [((0, 0, 1), 0.3634), ((0, 1, 0), 0.1175), ((1, 0, 0), 0.009497)])
def test_a_normal_variable_has_the_distortion_of_its_best_quantiser(widths, expected):
    """Max 1960, table I: 0.3634, 0.1175 and 0.009497 at 1, 2 and 4 bits; levels begin there and stay."""
    normal = 3 * torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(1))
    levels = fit_levels(normal, torch.ones(1, 200_000), widths)
    restored = decode(encode(normal, torch.zeros(1, 1), torch.ones(1, 1, 1), levels), levels)
    assert float((restored - normal).square().mean()) / 9 == pytest.approx(expected, rel=0.02)


def test_levels_follow_a_variable_with_tails():
    """A few values far out get a level: a normal variable's levels would clip them."""
    generator = torch.Generator().manual_seed(2)
    tails = torch.randn(1, 4000, 1, generator=generator)
    tails[:, ::100] = 60 + tails[:, ::100]
    levels = fit_levels(tails, torch.ones(1, 4000), (1, 0, 0))
    restored = decode(encode(tails, torch.zeros(1, 1), torch.ones(1, 1, 1), levels), levels)
    assert float((restored - tails)[:, ::100].abs().mean()) < 2


def test_values_of_no_weight_move_no_level():
    values = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(3))
    weights = torch.ones(1, 500)
    weights[:, :100] = 0
    wild = values.clone()
    wild[:, :100] = 1e4
    for given, expected in zip(
        fit_levels(wild, weights, (2, 4, 2)), fit_levels(values[:, 100:], weights[:, 100:], (2, 4, 2)), strict=True
    ):
        assert_close(given, expected)


def test_more_bits_score_better():
    keys, queries = keys_and_queries()
    errors = [score_error(keys, coded(keys, queries, bits), queries) for bits in BITS]
    assert errors == sorted(errors, reverse=True)


def test_a_fit_to_the_queries_scores_better_than_one_that_does_not_know_them():
    keys, queries = keys_and_queries()
    blind = coded(keys, queries, 2.0, torch.eye(16).expand(2, -1, -1))
    assert score_error(keys, coded(keys, queries, 2.0), queries) < 0.7 * score_error(keys, blind, queries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keys_are_coded_as_their_fp32_values(dtype):
    keys, queries = keys_and_queries(n=100)
    mean, covariance, moment = moments(keys, queries)
    analysis = fit(covariance, moment)[0]
    levels = fit_levels((keys - mean[:, None]) @ analysis, torch.ones(keys.shape[:2]), (4, 8, 4))
    low = keys.to(dtype)
    assert torch.equal(encode(low, mean, analysis, levels), encode(low.float(), mean, analysis, levels))


def test_keys_that_do_not_vary_are_restored():
    keys = torch.full((1, 64, 8), 3.0)
    restored = coded(keys, torch.randn(1, 10, 8, generator=torch.Generator().manual_seed(0)), 2.0)
    assert_close(restored, keys, atol=1e-4, rtol=0)


def test_an_unknown_number_of_bits_is_refused():
    with pytest.raises(ValueError, match=r"bits must be one of 0\.25, 0\.5, 1\.0, 1\.5, 2\.0, 2\.25, 2\.5, not 3"):
        tier_widths(3, 64)
