"""``regression``: what its fit is, and when its remainder is exact."""

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, indexed, masses, random_pages, random_query, softmax_over
from pydantic import ValidationError
from torch.testing import assert_close

from kvoffload.completion.regression import RegressionCompletionConfig
from kvoffload.config import RuntimeConfig
from kvoffload.values import Pages


def built(pages, shape, anchor=None, **options):
    completion = indexed(RegressionCompletionConfig(**options).build(shape, 0, CPU))
    completion.reset(torch.zeros(shape.rows, shape.key_dim) if anchor is None else anchor)
    completion.absorb(pages)
    return completion


def affine_pages(shape, n_pages, *, padded=False):
    """Values are an affine map of the keys, another one in each row."""
    pages = random_pages(shape, n_pages, padded=padded)
    generator = torch.Generator().manual_seed(5)
    slope = torch.randn(shape.rows, shape.key_dim, shape.value_dim, generator=generator)
    offset = torch.randn(shape.rows, 1, 1, shape.value_dim, generator=generator)
    return Pages(pages.keys + 5, torch.einsum("gpsd,gde->gpse", pages.keys, slope) + offset, pages.valid)


@pytest.mark.parametrize("padded", [False, True])
def test_values_affine_in_the_keys_are_completed_exactly(padded):
    shape = geometry()
    pages, query = affine_pages(shape, 30, padded=padded), random_query(shape)
    read = [(0, 1), (0, 7), (1, 29)]
    rest = [pair for pair in all_pairs(pages) if pair not in read]
    completion = built(pages, shape, ridge=1e-7)
    given = completion.estimate(query, fetch(pages, read), masses(query, pages))
    expected = softmax_over(query, pages, rest)
    assert_close(given.lse, expected.lse, atol=1e-4, rtol=0)
    assert_close(given.output, expected.output, atol=2e-3, rtol=1e-3)


def test_the_fit_is_least_squares_with_half_the_weight_on_the_anchors_attention():
    shape = geometry()
    pages, anchor = random_pages(shape, 40), random_query(shape, 3)[:, 0]
    completion = built(pages, shape, anchor, ridge=1e-9)
    query = random_query(shape)
    given = completion.estimate(query, fetch(pages, []), masses(query, pages)).output
    for row in range(shape.rows):
        keys, values = pages.keys[row].flatten(0, 1).double(), pages.values[row].flatten(0, 1).double()
        weight = 0.5 * (keys @ anchor[row].double()).softmax(0) + 0.5 / len(keys)
        x = torch.cat([torch.ones(len(keys), 1), keys], 1)
        root = weight.sqrt()[:, None]
        fitted = torch.linalg.lstsq(root * x, root * values).solution
        mean_key = (query[row].double() @ keys.T).softmax(-1) @ keys
        expected = torch.cat([torch.ones(len(mean_key), 1), mean_key], 1) @ fitted
        assert_close(given[row], expected.float(), atol=1e-3, rtol=1e-3)


def test_far_off_keys_do_not_spoil_the_fit():
    """Keys with a bias far larger than their spread, as models with biased projections have."""
    shape = geometry()
    pages, query = affine_pages(shape, 60), random_query(shape) * 0.3
    far = Pages(pages.keys + 100, pages.values, None)
    given = built(far, shape, ridge=1e-7).estimate(query, fetch(far, []), masses(query, far))
    assert_close(given.output, softmax_over(query, far, all_pairs(far)).output, atol=0.02, rtol=0.01)


def test_pages_in_runs_give_the_fit_of_all_pages_once_it_is_due():
    shape = geometry()
    pages, query = random_pages(shape, 64), random_query(shape)
    at_once, in_runs = built(pages, shape), built(pages.run(0, 9), shape)
    in_runs.estimate(query, fetch(pages, []), masses(query, pages.run(0, 9)))
    for page in range(9, 64):
        in_runs.absorb(pages.run(page, page + 1))
    given, expected = (c.estimate(query, fetch(pages, []), masses(query, pages)) for c in (in_runs, at_once))
    assert_close(given.output, expected.output, atol=1e-3, rtol=1e-3)


def test_a_selector_without_an_index_is_refused():
    with pytest.raises(
        ValidationError, match=r"'regression' reads a token-level index.*'bounds'.*quantized, transform"
    ):
        RuntimeConfig(selector="bounds", completion="regression")


def test_a_first_run_of_padding_does_not_fix_the_centre():
    """Keys with a large bias, in a row whose first run of pages has no token that counts."""
    shape = geometry()
    pages, query = affine_pages(shape, 60), random_query(shape) * 0.3
    valid = torch.ones(pages.keys.shape[:3], dtype=torch.bool)
    valid[0, :10] = False
    far = Pages(pages.keys + 1000, pages.values, valid)
    completion = built(far.run(0, 10), shape, ridge=1e-7)
    completion.absorb(far.run(10, 60))
    given = completion.estimate(query, fetch(far, []), masses(query, far))
    pairs = [(row, page) for row, page in all_pairs(far) if row == 1 or page >= 10]
    assert_close(given.output[0], softmax_over(query, far, pairs).output[0], atol=0.3, rtol=0.05)
