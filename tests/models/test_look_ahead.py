"""Pages chosen by a guess of a layer's queries, made from what the layer before it is given."""

from itertools import pairwise

import pytest
import torch
from families import FAMILIES, dense, family_model, offloaded, prompt, relative_error
from pydantic import ValidationError
from recorded import record
from test_step_graph import ROOM, assert_same, decoded, prefilled
from torch.testing import assert_close

from kvoffload.attention import decode
from kvoffload.config import RuntimeConfig
from kvoffload.models.cache import OffloadCache
from kvoffload.models.feed import feed
from kvoffload.models.self_test import switch_attention
from kvoffload.models.step_graph import StepGraph

SIZES = {"sinks": 4, "recent": 8, "page_size": 4}
NOT_ADJACENT = {"gemma2", "gemma3_text", "gpt_oss"}  # a layer with a sliding window comes between


@pytest.fixture
def guesses(monkeypatch):
    """Layers that were chosen for early, with the guessed queries."""
    made = []

    def noted(layer, query, **more):
        made.append((layer, query))
        choose_early(layer, query, **more)

    choose_early = decode.choose_early
    monkeypatch.setattr("kvoffload.models.offload_layer.choose_early", noted)
    return made


def queries_seen(monkeypatch):
    """The scaled queries that layers attend with, by layer."""
    seen = {}

    def noted(layer, query, anchors):
        seen.setdefault(layer.layer, []).append(query)
        return attend(layer, query, anchors)

    attend = decode.attend_selected
    monkeypatch.setattr("kvoffload.attention.reading.attend_selected", noted)
    return seen


@pytest.mark.parametrize(
    ("family", "tier"), [*((family, "cpu") for family in FAMILIES), ("llama", "none"), ("llama", "nvme")]
)
def test_full_budget_equals_dense(family, tier, guesses):
    model, inputs = family_model(family), prompt(2, 61, 5)
    config = RuntimeConfig(offload=tier, budget="100%", look_ahead=True, **SIZES)
    expected = dense(model, inputs, 12)
    given, _ = offloaded(model, inputs, 12, config)
    assert relative_error(given, expected) < 1e-4
    assert bool(guesses) == (family not in NOT_ADJACENT)


def test_all_layers_but_the_first_look_ahead_in_every_step(guesses):
    offloaded(family_model("llama"), prompt(1, 61, 0), 6, RuntimeConfig(budget="20%", look_ahead=True, **SIZES))
    steps = [layer.layer for layer, _ in guesses]
    assert steps == [1, 2, 3] * (len(steps) // 3)
    assert len(steps) // 3 >= 4  # the first steps behind a prompt make layers ready


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "olmo2", "phi3"])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_where_mlps_add_nothing_the_guess_is_the_query(family, n_tokens, guesses, monkeypatch):
    """Rotation, norms and biases are in it, for one step and for several in one forward."""
    model = family_model(family)
    nothing = ("down_proj", "o_proj") if family == "olmo2" else ("down_proj",)  # it adds what is normed first
    for name, parameter in model.named_parameters():
        if any(part in name for part in nothing):
            torch.nn.init.zeros_(parameter)
    seen = queries_seen(monkeypatch)
    switch_attention(model)
    ids = torch.randint(2, 90, (1, 62), generator=torch.Generator().manual_seed(1))
    with (
        torch.inference_mode(),
        OffloadCache(model.config, RuntimeConfig(budget="16", look_ahead=True, **SIZES)) as cache,
    ):
        with cache.prefilling():
            model(ids, past_key_values=cache, use_cache=True)
        feed(model, cache, ids[:, :1])
        assert cache.run_length(3) == 3
        seen.clear()
        guesses.clear()
        feed(model, cache, ids[:, 1 : 1 + n_tokens])
    assert [layer.layer for layer, _ in guesses] == [1, 2, 3]
    for layer, guess in guesses:
        assert_close(guess, seen[layer.layer][0])


@pytest.mark.parametrize(
    ("n_sequences", "fields"),
    [(1, {}), (2, {"completion": "regression"}), (1, {"gpu_cache": "64KiB"}), (2, {"offload": "none"}),
     (1, {"reanchor": 17}), (1, {"offload": "nvme"}),
     (1, {"offload": "nvme", "gpu_cache": "64KiB", "cpu_max": "64KiB"}), (2, {"gpu_cache": "64KiB"})],
    ids=str,
)  # fmt: skip
def test_replayed_steps_are_ordinary_steps(n_sequences, fields, guesses):
    """Across seals and an end of the room, the first of two sequences padded; equal tokens, equal reads."""
    model = family_model("llama")
    switch_attention(model)
    fields = {"selector": "quantized:group=16", "completion": "anchored:segments=5", "budget": "15%"} | fields
    given = [made(model, n_sequences, capture, look_ahead=True, **fields) for capture in (record, None)]
    assert guesses
    assert_same(*given)


def made(model, n_sequences, capture, **fields):
    cache, token, position = prefilled(model, 140, n_sequences, **fields)
    if capture is None:
        return decoded(cache, lambda ids, first: feed(model, cache, ids, first=first)[:, -1], token, position)
    graph = StepGraph(model, cache, capture, room_tokens=ROOM)
    result = decoded(cache, lambda ids, first: graph.step(ids, first).logits.clone(), token, position)
    assert graph.refusal == ""
    return result


def test_slices_of_two_layers_in_a_row_land_apart():
    config = RuntimeConfig(budget="20%", look_ahead=True, **SIZES)
    _, cache = offloaded(family_model("llama"), prompt(1, 61, 0), 6, config)
    places = [layer.fetch.slots.staging for layer in cache.offloaded]
    assert all(a is not b for a, b in pairwise(places))
    assert len(set(places)) == 2


@pytest.mark.parametrize(
    "fields",
    [{"policy": "prhs"}, {"max_dropped_mass": 0.1}, {"offload": "nvme", "cpu_max": "1MiB", "prefetch": 0.5}],
    ids=str,
)
def test_what_chooses_otherwise_is_refused(fields):
    with pytest.raises(ValidationError, match="look_ahead: chooses pages itself"):
        RuntimeConfig(look_ahead=True, **fields)


@pytest.mark.parametrize("replayed", [False, True])
def test_an_index_that_is_scored_twice_is_charged_twice(replayed):
    """By the guess, and by the completion for the true queries; the first layer does not look ahead."""
    model = family_model("llama")
    switch_attention(model)
    fields = {"selector": "quantized:group=16", "completion": "regression", "budget": "32", "look_ahead": True}
    cache, token, position = prefilled(model, 140, 1, **fields)
    before = [layer.meter.state_bytes_touched for layer in cache.offloaded]
    graph, index_bytes = StepGraph(model, cache, record, room_tokens=ROOM), 0
    for i in range(6):
        graph.step(token, position + i) if replayed else feed(model, cache, token, first=position + i)
        index_bytes += cache.offloaded[0].selector.index_bytes
    touched = [layer.meter.state_bytes_touched - n for layer, n in zip(cache.offloaded, before, strict=True)]
    cache.close()
    assert (graph.n_replays > 3) == replayed
    assert [n - touched[0] for n in touched] == [0, *[index_bytes] * 3]
