"""Teacher forcing in runs: logits and statistics are those of single steps, for one sequence and for a batch."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL
from torch.testing import assert_close

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.evaluation.teacher import prefill, teacher_forced
from kvoffload.models import step_graph
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention
from kvoffload.runtime.stats import collect

sys.path.append(str(Path(__file__).parents[1] / "models"))
from recorded import record

N_PROMPT, N_NEW = 130, 21


@pytest.fixture(scope="module")
def model(loaded):
    switch_attention(loaded.model)
    return loaded.model


def token_ids(n_sequences, n_tokens=N_PROMPT + N_NEW):
    return torch.randint(0, 256, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(5))


def forced(model, ids, **options):
    """Logits of the new tokens, lengths of the forwards, statistics."""
    longest = options.pop("longest", 256)
    with OffloadCache(model.config, RuntimeConfig(**(SMALL | options))) as cache:
        first = prefill(model, cache, ids[:, :N_PROMPT])
        blocks = list(teacher_forced(model, cache, ids[:, N_PROMPT:], longest=longest))
        stats = collect(cache.offloaded, prompt_tokens=N_PROMPT, new_tokens=0, ttft_s=None, tpot_ms=None)
    return torch.cat([first[:, None], *blocks], dim=1), [b.shape[1] for b in blocks], stats


@pytest.mark.parametrize("n_sequences", [1, 2])
@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"pool": "none", "selector": "bounds", "completion": "pages"},
        {"gate": True, "completion": "anchored+phi+pages"},
        {"offload": "nvme", "index": "cpu", "selector": "exact", "completion": "exact"},
    ],
    ids=str,
)
def test_runs_equal_single_steps(model, policy, n_sequences):
    ids = token_ids(n_sequences)
    given, lengths, stats = forced(model, ids, **policy)
    expected, ones, single = forced(model, ids, longest=1, **policy)
    assert (sum(lengths), ones) == (N_NEW, [1] * N_NEW)
    assert len(lengths) < N_NEW / 2
    assert_close(given, expected, atol=1e-4, rtol=1e-4)
    same = ("read_tokens_per_step", "charged_tokens_per_step", "read_share", "charged_share", "decode_bytes_read")
    assert {name: getattr(stats, name) for name in same} == {name: getattr(single, name) for name in same}
    assert stats.completion_mass == pytest.approx(single.completion_mass, abs=1e-5)


@pytest.mark.parametrize("gpu_cache", [None, "64KiB"])
@pytest.mark.parametrize("completion", ["none", "anchored:segments=5"])
def test_where_all_are_single_steps_they_are_replays(model, completion, gpu_cache, monkeypatch):
    captures = []

    def capture(call, generators):
        captures.append(record(call, generators))
        return captures[-1]

    options = {"selector": "quantized:group=16", "completion": completion, "gpu_cache": gpu_cache, "longest": 1}
    ids = token_ids(2)
    expected, _, single = forced(model, ids, **options)
    monkeypatch.setattr(step_graph, "capture_of", lambda device: capture)
    given, lengths, stats = forced(model, ids, **options)
    assert captures
    assert lengths == [1] * N_NEW
    assert_close(given, expected, atol=1e-4, rtol=1e-4)
    same = ("read_tokens_per_step", "charged_tokens_per_step", "read_share", "charged_share", "decode_bytes_read")
    assert {name: getattr(stats, name) for name in same} == {name: getattr(single, name) for name in same}
    captures.clear()
    forced(model, ids, **(options | {"longest": 256, "gpu_cache": None}))
    assert captures == []


def test_sequences_of_a_batch_are_scored_as_if_alone(model):
    ids = token_ids(3)
    together, _, _ = forced(model, ids)
    for row in range(3):
        alone, _, _ = forced(model, ids[row : row + 1])
        assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_batch_at_full_budget_is_dense(model, stock):
    ids = token_ids(2)
    given, _, stats = forced(model, ids, budget="100%", completion="none")
    with torch.no_grad():
        expected = stock.model(ids, use_cache=False).logits[:, N_PROMPT - 1 :]
    assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert stats.read_share > 0.8


def test_several_tokens_outside_of_decoding_are_prefilled(model):
    ids = token_ids(1)
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        prefill(model, cache, ids[:, :N_PROMPT])
        with torch.inference_mode():
            model(ids[:, N_PROMPT:], past_key_values=cache, use_cache=True)
        assert all(layer.meter.steps == 0 and not layer.ready for layer in cache.offloaded)


def test_a_run_that_is_too_long_is_refused(model):
    ids = token_ids(1)
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        prefill(model, cache, ids[:, :N_PROMPT])
        longest = cache.run_length(N_NEW)
        with (
            pytest.raises(UsageError, match=f"{longest + 1} tokens in one forward: at most {longest}"),
            cache.decoding(),
            torch.inference_mode(),
        ):
            model(ids[:, N_PROMPT : N_PROMPT + longest + 1], past_key_values=cache, use_cache=True)


def test_nothing_to_feed_gives_nothing(model):
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        prefill(model, cache, token_ids(1, 40))
        assert list(teacher_forced(model, cache, token_ids(1, 0))) == []
