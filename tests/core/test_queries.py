"""Several queries of a row in one forward are single steps: the same attention, the same reads, the same meter."""

import pytest
import torch
from heads import geometry
from kvoffload_storage import TracingStore
from layers import PAGE, PAIRS, new_layer, step, take_in, tokens
from torch.testing import assert_close

from kvoffload.config import VARIANTS

N_PROMPT, N_NEW = 61, 23


def stepped(layer, longest, padding=None, n_prompt=N_PROMPT, n_new=N_NEW):
    """Outputs and log-sum-exps of the new tokens, [rows, R, n_new, ...], in forwards of up to ``longest`` tokens; the
    lengths of those forwards."""
    query, keys, values = tokens(layer.geometry, n_prompt + n_new)
    take_in(layer, query[:, :, :n_prompt], keys[:, :n_prompt], values[:, :n_prompt], padding)
    outputs, lengths = [], []
    while sum(lengths) < n_new:
        start = n_prompt + sum(lengths)
        lengths.append(layer.run_length(min(longest, n_new - sum(lengths))))
        outputs.append(step(layer, query, keys, values, slice(start, start + lengths[-1])))
    return torch.cat(outputs, dim=2), lengths


def check_same(build, **options):
    many, single = build(), build()
    (given, lengths), (expected, ones) = stepped(many, 64, **options), stepped(single, 1, **options)
    assert len(lengths) < len(ones) == sum(lengths)
    assert_close(given, expected, atol=1e-5, rtol=1e-5)
    for name in ("steps", "context_tokens", "index_bytes_read", "state_bytes_touched", "written"):
        assert getattr(many.meter, name) == getattr(single.meter, name), name
    assert_close(many.meter.completion_mass, single.meter.completion_mass, atol=1e-4, rtol=1e-4)
    assert many.fetch.decode.total() == single.fetch.decode.total()
    assert many.fetch.refresh.total() == single.fetch.refresh.total()
    assert many.fetch.n_asked == single.fetch.n_asked
    return many, lengths


def spread():
    """Every selector with every completion, and each of them with every way to share the budget out."""
    shares = [("layer", 1), ("layer", 2), ("none", 2)]
    selectors = list(dict.fromkeys(selector for selector, _ in PAIRS))
    completions = list(dict.fromkeys(completion for _, completion in PAIRS))
    for selector, completion in PAIRS:
        yield selector, completion, *shares[(selectors.index(selector) + completions.index(completion)) % 3]


@pytest.mark.parametrize(("selector", "completion", "pool", "n_sequences"), list(spread()))
def test_several_tokens_a_forward_are_single_steps(selector, completion, pool, n_sequences):
    shape = geometry(n_sequences=n_sequences)
    check_same(lambda: new_layer(shape, selector=selector, completion=completion, pool=pool))


@pytest.mark.parametrize("completion", ["anchored", "phi+pages", "+".join(VARIANTS["completion"])])
def test_several_tokens_a_forward_are_single_steps_under_the_gate(completion):
    shape = geometry(n_sequences=2)
    check_same(lambda: new_layer(shape, completion=completion, gate=True))


@pytest.mark.parametrize("fields", [{"selector": "anchored"}, {"gate": True, "gate_recheck": 16, "gate_queries": 5}])
def test_several_tokens_a_forward_are_single_steps_around_upkeep(fields):
    """Summaries that change between two tokens change there too when several are fed at once."""
    check_same(lambda: new_layer(geometry(), completion="pages", reanchor=16, **fields), n_new=50)


@pytest.mark.parametrize("completion", VARIANTS["completion"])
def test_several_tokens_of_padded_sequences_are_single_steps(completion):
    shape = geometry(n_sequences=2)
    padding = torch.tensor([0, 0, 9, 9])
    check_same(lambda: new_layer(shape, completion=completion), padding=padding)


@pytest.mark.parametrize("gpu_cache", ["off", "1MiB"])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "nvme"])
def test_reads_of_several_tokens_are_those_of_single_steps(tier, gpu_cache):
    """With a page cache, which several queries pass by, they are those of single steps without it."""
    built = []

    def build():
        built.append(new_layer(geometry(), tier, TracingStore, gpu_cache=gpu_cache if not built else "off"))
        return built[-1]

    check_same(build)
    for layer in built:
        layer.store.close()


def test_a_prompt_shorter_than_the_anchors_is_followed_by_one_long_run():
    _, lengths = check_short(2)
    assert lengths[0] == 4 + 8 + 4 - 1 - 2  # up to the token that seals the first page


def check_short(n_prompt):
    many, single = (new_layer(geometry(), budget="100%", completion="none") for _ in range(2))
    (given, lengths), (expected, _) = stepped(many, 64, n_prompt=n_prompt), stepped(single, 1, n_prompt=n_prompt)
    assert_close(given, expected, atol=1e-5, rtol=1e-5)
    assert many.meter.steps == single.meter.steps
    return many, lengths


def test_only_the_first_token_of_a_run_seals_a_page():
    layer, lengths = check_short(61)
    sealing = [61 + sum(lengths[:i]) for i in range(1, len(lengths))]
    assert [n % PAGE for n in sealing] == [3] * len(sealing)  # 4 sinks and 8 recent: a page at every multiple of 4
    assert max(lengths) == PAGE
    assert layer.n_pages == (61 + N_NEW - 4 - 8) // PAGE


def test_a_run_ends_where_the_budget_buys_another_slice():
    layer = new_layer(geometry(), budget="20%", completion="none")
    _, lengths = stepped(layer, 64)
    slices = [layer.budget(n) for n in range(N_PROMPT + 1, N_PROMPT + N_NEW + 1)]
    assert len(set(slices)) > 2
    for i, length in enumerate(lengths):
        start = sum(lengths[:i])
        assert len(set(slices[start : start + length])) == 1


def test_a_later_token_of_a_run_changes_nothing_for_an_earlier_one():
    outputs = []
    for last in (0.0, 50.0):
        layer = new_layer(geometry(), completion="pages")
        query, keys, values = tokens(layer.geometry, N_PROMPT + 2)
        keys[:, -1], values[:, -1] = last, last
        take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT])
        assert layer.run_length(2) == 2
        outputs.append(step(layer, query, keys, values, slice(N_PROMPT, None)))
    first, second = outputs
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert not torch.allclose(first[:, :, 1], second[:, :, 1])
