"""Full budget equals dense attention: every family, tier, selector and completion, in covering pairs.

``scripts/full-product`` runs all combinations.
"""

import math

import pytest
from families import FAMILIES, dense, family_model, offloaded, prompt, relative_error

from kvoffload.config import RuntimeConfig, pairs

PAIRS = pairs()
TIERS = ["none", "cpu", "nvme"]


def covering_cases():
    """Each family with each tier; selector and completion pairs, chunking, padding and page cache rotate beside."""
    n, stride = 0, next(k for k in range(7, len(PAIRS)) if math.gcd(k, len(PAIRS)) == 1)
    for family in FAMILIES:
        for tier in TIERS:
            yield (
                family,
                tier,
                *PAIRS[n * stride % len(PAIRS)],
                (None, 7, 16)[n // 2 % 3],
                (0, 5, 23)[n % 3],
                ("off", "64KiB")[n // 3 % 2],
            )
            n += 1


def config(tier, selector, completion, **fields):
    sizes = {"sinks": 4, "recent": 8, "page_size": 4, "budget": "100%"}
    return RuntimeConfig(offload=tier, selector=selector, completion=completion, **(sizes | fields))


CASE = ("family", "tier", "selector", "completion", "chunk", "padding", "page_cache")


@pytest.mark.parametrize(CASE, list(covering_cases()))
def test_full_budget_equals_dense(family, tier, selector, completion, chunk, padding, page_cache):
    model = family_model(family)
    inputs = prompt(2 if padding else 1, 61, padding)
    expected = dense(model, inputs, 12)
    given, cache = offloaded(model, inputs, 12, config(tier, selector, completion, gpu_cache=page_cache), chunk)
    assert cache.offloaded[0].anchors.n_sealed > 10
    assert relative_error(given, expected) < 1e-4
    assert (given.tokens == expected.tokens).all()


@pytest.mark.parametrize(("selector", "completion"), PAIRS)
def test_full_budget_equals_dense_for_every_selector_and_completion(selector, completion):
    model = family_model("llama")
    inputs = prompt(2, 53, 9)
    expected = dense(model, inputs, 8)
    given, _ = offloaded(model, inputs, 8, config("cpu", selector, completion))
    assert relative_error(given, expected) < 1e-4
    assert (given.tokens == expected.tokens).all()


@pytest.mark.parametrize("tier", TIERS)
def test_a_small_budget_with_the_exact_completion_equals_dense(tier):
    """Fetched pages plus the exact remainder, merged once, are dense attention: nothing is lost or counted twice."""
    model = family_model("llama")
    inputs = prompt(2, 61, 9)
    expected = dense(model, inputs, 12)
    given, cache = offloaded(model, inputs, 12, config(tier, "bounds", "exact", budget="10%"))
    assert cache.offloaded[0].fetch.n_asked < cache.offloaded[0].anchors.n_sealed * 4 * 11
    assert relative_error(given, expected) < 1e-4
    assert (given.tokens == expected.tokens).all()


def test_a_small_budget_without_completion_is_not_dense():
    model = family_model("llama")
    inputs = prompt(1, 61, 0)
    expected = dense(model, inputs, 12)
    given, _ = offloaded(model, inputs, 12, config("cpu", "bounds", "none", budget="10%"))
    assert relative_error(given, expected) > 1e-3
