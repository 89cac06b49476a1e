"""Captured decode steps against ordinary ones, token by token, with a recorder in the place of CUDA."""

import pytest
import torch
from families import family_model
from recorded import record
from torch.testing import assert_close

from kvoffload.config import RuntimeConfig
from kvoffload.models.cache import OffloadCache
from kvoffload.models.feed import feed
from kvoffload.models.self_test import switch_attention
from kvoffload.models.step_graph import StepGraph
from kvoffload.runtime.stats import collect

SIZES = {"sinks": 4, "recent": 8, "page_size": 4}
N_PROMPT, N_STEPS, ROOM, PADDING = 140, 24, 16, 21


@pytest.fixture(scope="module")
def model():
    model = family_model("llama")
    switch_attention(model)
    return model


@torch.inference_mode()
def prefilled(model, n_prompt, n_sequences, **fields):
    """A cache with a prompt in it, and the next token of every sequence; the first sequence of several is padded."""
    ids = torch.randint(2, 90, (n_sequences, n_prompt), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if n_sequences > 1:
        mask[0, :PADDING] = 0
    cache = OffloadCache(model.config, RuntimeConfig(**(SIZES | fields)))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with cache.prefilling():
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
    feed(model, cache, ids[:, :1], first=positions[:, -1:] + 1)  # the first step prepares what follows
    return cache, logits[:, -1:].argmax(-1), positions[:, -1:] + 2


def decoded(cache, step, token, position):
    """Tokens, logits and counts of ``N_STEPS`` greedy steps; the cache is closed."""
    tokens, logits = [], []
    for i in range(N_STEPS):
        found = step(token, position + i)
        logits.append(found)
        token = found.argmax(-1)[:, None]
        tokens.append(token)
    stats = collect(cache.offloaded, prompt_tokens=0, new_tokens=0, ttft_s=None, tpot_ms=None)
    cache.close()
    return torch.cat(tokens, 1), torch.stack(logits), stats


def ordinary(model, *given, **fields):
    cache, token, position = prefilled(model, *given, **fields)
    return decoded(cache, lambda ids, first: feed(model, cache, ids, first=first)[:, -1], token, position)


def captured(model, *given, sampler=None, **fields):
    cache, token, position = prefilled(model, *given, **fields)
    graph = StepGraph(model, cache, record, room_tokens=ROOM)
    result = decoded(cache, lambda ids, first: graph.step(ids, first).logits.clone(), token, position)
    assert graph.refusal == ""
    assert graph.n_replays > N_STEPS // 2  # one step in each room, and one behind each new anchor, are none
    return result


def assert_same(given, expected):
    assert torch.equal(given[0], expected[0])
    assert_close(given[1], expected[1], atol=1e-3, rtol=1e-3)
    for name in ("read_tokens_per_step", "charged_tokens_per_step", "hit_rate", "decode_bytes_read", "scored_share"):
        assert getattr(given[2], name) == getattr(expected[2], name), name
    for name in ("bytes_written", "refresh_bytes_read", "budget_tokens"):
        assert getattr(given[2], name) == getattr(expected[2], name), name
    assert given[2].completion_mass == pytest.approx(expected[2].completion_mass, abs=1e-4)


@pytest.mark.parametrize(
    ("selector", "completion", "gpu_cache", "n_sequences"),
    [  # every two of them meet; the first of several sequences is padded
        (selector, completion, gpu_cache, 1 + (i + j + k) % 2)
        for i, selector in enumerate(("transform", "quantized:group=16", "bounds"))
        for j, completion in enumerate(("none", "anchored:segments=5", "regression"))
        for k, gpu_cache in enumerate(("off", "64KiB"))
        if (selector, completion) != ("bounds", "regression")  # it has no index
    ],
)
def test_replayed_steps_are_ordinary_steps(model, selector, completion, gpu_cache, n_sequences, short_fits):
    """Across seals and an end of the room; equal tokens, equal reads."""
    fields = {"selector": selector, "completion": completion, "gpu_cache": gpu_cache, "budget": "15%"}
    given, expected = (run(model, N_PROMPT, n_sequences, **fields) for run in (captured, ordinary))
    assert_same(given, expected)


@pytest.mark.parametrize("selector", ["transform", "quantized:group=16"])
def test_replayed_steps_of_sketched_values_are_ordinary_steps(model, selector, short_fits):
    fields = {"selector": selector, "completion": "sketch:bits=0.5", "budget": "5%"}
    given, expected = (run(model, N_PROMPT, 2, **fields) for run in (captured, ordinary))
    assert_same(given, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": "40"},
        {"offload": "none"},
        {"pool": "none"},
        {"reanchor": 17},
        {"offload": "nvme"},
        {"offload": "nvme", "pool": "none", "budget": "15%"},
        {"offload": "nvme", "gpu_cache": "64KiB", "cpu_max": "64KiB", "budget": "15%"},
        {"offload": "nvme", "verify": True},
    ],
    ids=str,
)
def test_replayed_steps_are_ordinary_steps_whatever_the_settings(model, fields):
    fields = {"selector": "quantized:group=16", "completion": "anchored:segments=5"} | fields
    given, expected = (run(model, N_PROMPT, 1, **fields) for run in (captured, ordinary))
    assert_same(given, expected)
