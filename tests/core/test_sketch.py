"""``sketch``: what the few bits of a value are worth, and what happens before they can be made."""

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, indexed, masses, random_pages, random_query, softmax_over
from torch.testing import assert_close

from kvoffload.completion.regression import RegressionCompletionConfig
from kvoffload.completion.sketch import SketchCompletionConfig
from kvoffload.values import Pages

N_PAGES = 600  # of 4 tokens: more than the fit waits for


def error(config, pages, shape, *runs):
    """Squared error of the remainder's output against the exact one, over a few queries."""
    completion = indexed(config.build(shape, 0, CPU))
    completion.reset(torch.zeros(shape.rows, shape.key_dim))
    for run in runs or (pages,):
        completion.absorb(run)
    total = 0.0
    for seed in range(8):
        query = random_query(shape, seed) * 0.5
        given = completion.estimate(query, fetch(pages, []), masses(query, pages))
        total += (given.output - softmax_over(query, pages, all_pairs(pages)).output).square().mean().item()
    return total


def test_more_bits_leave_less_error_and_any_less_than_the_keys_alone():
    shape = geometry()
    pages = random_pages(shape, N_PAGES)  # values have nothing to do with keys: regression can tell only their mean
    alone = error(RegressionCompletionConfig(), pages, shape)
    errors = [error(SketchCompletionConfig(bits=bits), pages, shape) for bits in (0.5, 1.0, 2.0)]
    assert alone > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.3 * alone  # two of eight channels have no bits, and all have the same variance


@pytest.mark.parametrize("padded", [False, True])
def test_while_values_wait_the_remainder_has_them_as_they_are(padded):
    shape = geometry()
    pages, query = random_pages(shape, 30, padded=padded), random_query(shape)
    read = [(0, 1), (1, 29)]
    completion = indexed(SketchCompletionConfig().build(shape, 0, CPU))
    completion.reset(torch.zeros(shape.rows, shape.key_dim))
    completion.absorb(pages)
    given = completion.estimate(query, fetch(pages, read), masses(query, pages))
    expected = softmax_over(query, pages, [pair for pair in all_pairs(pages) if pair not in read])
    assert_close(given.output, expected.output, atol=1e-5, rtol=1e-5)
    assert_close(given.lse, expected.lse, atol=1e-5, rtol=1e-5)


def test_pages_one_by_one_come_near_those_at_once():
    """The first fit sees fewer tokens then; the second fit makes up for it."""
    shape = geometry()
    pages = random_pages(shape, N_PAGES)
    at_once = error(SketchCompletionConfig(), pages, shape)
    one_by_one = error(SketchCompletionConfig(), pages, shape, *(pages.run(i, i + 1) for i in range(N_PAGES)))
    assert one_by_one < 1.3 * at_once


def test_padding_does_not_enter_the_fits():
    """Padded tokens with values that would spoil every fit."""
    shape = geometry()
    pages = random_pages(shape, N_PAGES, padded=True)
    assert pages.valid is not None
    spoilt = Pages(pages.keys, pages.values.masked_fill(~pages.valid[..., None], 1e4), pages.valid)
    clean = Pages(pages.keys, pages.values.masked_fill(~pages.valid[..., None], 0.0), pages.valid)
    assert_close(error(SketchCompletionConfig(), spoilt, shape), error(SketchCompletionConfig(), clean, shape))


def test_far_off_keys_do_not_spoil_the_fits():
    """Keys with a bias far larger than their spread, as models with biased projections have."""
    shape = geometry()
    pages = random_pages(shape, N_PAGES)
    far = Pages(pages.keys + 3000, pages.values, None)
    assert error(SketchCompletionConfig(), far, shape) < 1.5 * error(SketchCompletionConfig(), pages, shape)
