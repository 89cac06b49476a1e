"""Captures and examples against the runtime itself: what is learned from is what decode steps see."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from kvoffload.attention.decode import attend_anchors, attend_selected
from kvoffload.calibration.capture import capture, query_runs
from kvoffload.calibration.examples import make_examples, n_pages_at
from kvoffload.config import RuntimeConfig
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.watch import offloaded_layers
from kvoffload.runtime.engine import Runtime
from kvoffload.units import Budget
from kvoffload.values import merge

CONFIG = RuntimeConfig(sinks=4, recent=8, page_size=4, self_test=False, budget="10%", completion="exact")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded():
    return load_model(resolve("tiny"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (161,), generator=torch.Generator().manual_seed(5))


def test_runs_are_spread_over_the_second_half_and_end_with_the_last_token():
    runs = query_runs(4096, 64)
    assert runs[:, 0].tolist() == [4096 - 8 - 256 * i for i in range(7, -1, -1)]
    assert runs[-1].tolist() == list(range(4088, 4096))
    assert query_runs(100, 1).tolist() == [[99]]
    assert query_runs(100, 24).flatten().tolist() == [*range(59, 67), *range(76, 84), *range(92, 100)]


@torch.inference_mode()
def test_one_query_reads_and_leaves_what_a_decode_step_does(loaded, ids):
    """The runtime prefills all tokens but one and decodes that one; the example has it as its only late query."""
    runtime = Runtime(loaded, CONFIG)
    with runtime.session() as session:
        session.prefill(ids[:-1])
        kv = session.cache.offloaded[2]
        found = capture(loaded.model, [ids], [2], CONFIG, n_queries=1)[2][0]
        [example] = make_examples(found, CONFIG, [Budget.parse("10%")], CPU)
        assert_close(found.anchors[0], session.cache.offloaded[2].tail_queries.float().mean((1, 2)) * kv.geometry.scale)
        kv.append(found.keys[:, -1:], found.values[:, -1:])
        anchors = attend_anchors(kv, example.query, kv.anchors.seen(1))
        read, fetched, scores = attend_selected(kv, example.query, anchors)
        assert kv.n_pages == n_pages_at(161, CONFIG) == example.pages.n_pages
        pairs = set(zip(fetched.row_ids.tolist(), fetched.page_ids.tolist(), strict=True))
        assert pairs == set(zip(example.selection.row_ids.tolist(), example.selection.page_ids.tolist(), strict=True))
        rest = kv.completion.estimate(example.query, fetched, scores)
    for mine, theirs in ((example.read, read), (example.rest, rest)):
        assert_close(mine.lse, theirs.lse, atol=1e-4, rtol=1e-4)
        assert_close(mine.output, theirs.output, atol=1e-4, rtol=1e-4)
    assert_close(example.dense, merge([read, rest]).output, atol=1e-4, rtol=1e-4)


def test_every_late_query_has_its_own_causal_dense_output(loaded, ids):
    found = capture(loaded.model, [ids], [1], CONFIG, n_queries=16)[1][0]
    examples = list(make_examples(found, CONFIG, [Budget.parse("5%")], CPU))
    assert [example.pages.n_pages for example in examples] == [(161 - 40 - 8 + 1 - 12) // 4, (161 - 8 + 1 - 12) // 4]
    for run, t in itertools.product(range(2), range(8)):
        position = int(found.positions[run, t])
        keys, values = found.keys[:, : position + 1], found.values[:, : position + 1]
        expected = (found.queries[:, :, run, t] @ keys.transpose(-1, -2)).softmax(-1) @ values
        assert_close(examples[run].dense.view(2, 8, 2, -1)[:, t], expected, atol=1e-4, rtol=1e-4)


def test_the_dense_forward_leaves_the_models_logits_alone(loaded, ids):
    layers = offloaded_layers(loaded.model.config)
    assert layers == [0, 1, 2, 3]
    before = loaded.model(ids[None], use_cache=False).logits
    capture(loaded.model, [ids], layers, CONFIG, n_queries=4)
    assert torch.equal(loaded.model(ids[None], use_cache=False).logits, before)
