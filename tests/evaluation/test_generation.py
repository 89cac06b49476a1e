"""Answers of a batch: at full budget those of the stock model, row by row, whatever the lengths beside them."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.generation import answer, prefill_prompt
from kvoffload.models import step_graph
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.self_test import switch_attention

sys.path.append(str(Path(__file__).parents[1] / "models"))
from recorded import record

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "self_test": False}
LENGTHS = [150, 97, 3, 131]


@pytest.fixture(scope="module")
def loaded():
    model = load_model(resolve("tiny"), dtype="float32", device="cpu")
    switch_attention(model.model)
    return model


def draw(n, seed):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def policy(**fields):
    return RuntimeConfig(**(SMALL | fields))


@pytest.fixture
def prefilled(loaded):
    """Prefills of the given lengths, closed at the end."""
    opened = []

    def build(lengths, n_new=12, **fields):
        fields = {"offload": "none", "selector": "uniform", "completion": "none"} | fields
        new = [prefill_prompt(loaded, draw(n, seed=n), policy(**fields), max_new_tokens=n_new) for n in lengths]
        opened.extend(new)
        return new

    yield build
    for prompt in opened:
        prompt.cache.close()


def stock_answer(loaded, ids, n_new):
    stock = load_model(resolve("tiny"), dtype="float32", device="cpu").model
    new = stock.generate(torch.tensor([ids]), max_new_tokens=n_new, do_sample=False)[0, len(ids) :]
    return loaded.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_a_full_budget_gives_every_rows_dense_answer(loaded, prefilled, offload, tmp_path):
    found = answer(loaded, prefilled(LENGTHS), policy(offload=offload, budget="100%", nvme_dir=tmp_path))
    assert list(found.texts) == [stock_answer(loaded, draw(n, seed=n), 12) for n in LENGTHS]


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_prefills_of_any_tier_can_be_joined(loaded, prefilled, offload, tmp_path):
    sources = prefilled(LENGTHS, offload=offload, nvme_dir=tmp_path)
    found = answer(loaded, sources, policy(budget="100%"))
    assert found.texts == answer(loaded, prefilled(LENGTHS), policy(budget="100%")).texts


def test_rows_of_one_length_answer_as_they_do_alone(loaded, prefilled):
    """Without padding the pages are the same, so a tiny budget reads the same too."""
    sources = prefilled([120, 120]) + prefilled([120])
    sparse = policy(budget="20%", selector="bounds", completion="none", pool="none")
    together, alone = answer(loaded, sources, sparse), answer(loaded, sources[:1], sparse)
    assert together.texts == alone.texts * 3
    assert together.cost.read_share == pytest.approx(alone.cost.read_share)


def test_cells_leave_the_prefill_as_it_was(loaded, prefilled):
    sources = prefilled(LENGTHS)
    first = answer(loaded, sources, policy(budget="100%"))
    answer(loaded, sources, policy(budget="5%", selector="uniform", completion="none"))
    assert answer(loaded, sources, policy(budget="100%")).texts == first.texts


def test_a_tiny_budget_reads_less_and_answers_otherwise(loaded, prefilled):
    sources = prefilled([150, 131], n_new=24)
    full = answer(loaded, sources, policy(budget="100%", completion="none"))
    sparse = answer(loaded, sources, policy(budget="3%", selector="uniform", completion="none"))
    assert sparse.cost.read_share < 0.05 * full.cost.read_share
    assert sparse.texts != full.texts


def test_a_row_ends_at_its_end_token_and_the_others_go_on(loaded, prefilled, monkeypatch):
    sources = prefilled([97, 131])
    whole = answer(loaded, sources, policy(budget="100%")).texts
    ids = [loaded.tokenizer(text).input_ids for text in whole]
    end = next(token for token in ids[0][1:] if token not in ids[1])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", end)
    cut = answer(loaded, sources, policy(budget="100%")).texts
    assert cut == (loaded.tokenizer.decode(ids[0][: ids[0].index(end)]), whole[1])


def test_rows_may_have_different_numbers_of_new_tokens(loaded, prefilled):
    long, short = prefilled([97], n_new=9), prefilled([97], n_new=1)
    found = answer(loaded, [*long, *short], policy(budget="100%"))
    assert found.texts[0].startswith(found.texts[1])
    assert found.texts == (stock_answer(loaded, draw(97, seed=97), 9), stock_answer(loaded, draw(97, seed=97), 1))
    assert answer(loaded, short, policy()).cost.read_share == 0  # the first token is the prefill's


@pytest.fixture
def captures(loaded, monkeypatch):
    """Steps are captured, by a recorder; for each capture how often it was replayed. No token has a query of zeros, to
    which all pages are equal."""
    counts = []

    def counting(call, generators):
        stepped, replay = record(call, generators)
        if not isinstance(stepped, step_graph.Stepped):  # it seals a page
            return stepped, replay
        counts.append(0)

        def replay_counted():
            counts[-1] += 1
            replay()

        return stepped, replay_counted

    monkeypatch.setattr(step_graph, "capture_of", lambda device: counting)
    embedding = loaded.model.get_input_embeddings().weight.data
    kept = embedding[256].clone()
    embedding[256] = -embedding[0]
    yield counts
    embedding[256] = kept


@pytest.mark.parametrize(
    ("lengths", "fields"),
    [
        ([150, 97, 131], {"selector": "bounds", "completion": "none", "pool": "none"}),
        ([150, 97, 131], {"selector": "bounds", "completion": "none", "pool": "none", "gpu_cache": "64KiB"}),
        ([150, 97, 131], {"selector": "quantized:group=16", "completion": "anchored:segments=5"}),
        ([150, 150], {"selector": "quantized:group=16", "completion": "regression"}),
        ([150, 97, 131], {"selector": "transform", "completion": "none"}),
        ([150, 97, 131], {"selector": "transform", "completion": "regression"}),
        ([150, 97, 131], {"selector": "transform", "completion": "sketch:bits=0.5"}),
        ([150, 97, 131], {"selector": "uniform", "completion": "none", "offload": "none", "budget": "100%"}),
    ],
    ids=str,
)
def test_answers_by_replays_are_those_of_ordinary_steps(loaded, prefilled, captures, short_fits, lengths, fields):
    """The same words, and the same costs, whatever the padding."""
    sources, config = prefilled(lengths, n_new=24), policy(**({"budget": "15%"} | fields))
    plain = answer(loaded, sources, config.model_copy(update={"cuda_graph": "off"}))
    assert captures == []
    assert answer(loaded, sources, config) == plain
    assert sum(captures) > 15


def test_until_every_row_has_its_sinks_steps_are_ordinary(loaded, prefilled, captures):
    sources, config = prefilled(LENGTHS), policy(budget="20%", selector="bounds", completion="none")
    found = answer(loaded, sources, config)
    assert found == answer(loaded, sources, config.model_copy(update={"cuda_graph": "off"}))
    assert 0 < sum(captures) < 10


def test_a_captured_graph_is_gone_when_the_answers_are_there(loaded, prefilled, monkeypatch):
    held = []

    def capture(call, generators):
        stepped, replay = record(call, generators)
        held.append(weakref.ref(stepped))
        return stepped, replay

    monkeypatch.setattr(step_graph, "capture_of", lambda device: capture)
    gc.disable()
    try:
        answer(loaded, prefilled([150, 97]), policy(budget="20%", selector="bounds", completion="none"))
    finally:
        gc.enable()
    assert held
    assert all(ref() is None for ref in held)
