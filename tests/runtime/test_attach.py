"""``Runtime``: models of its own, and a cache for the stock ``generate`` of someone else's."""

import pytest
import torch
from tiny import SMALL, load
from torch.testing import assert_close

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError, UsageError
from kvoffload.models.hf import NAME
from kvoffload.runtime.engine import Runtime


@pytest.fixture(scope="module")
def model():
    return load().model


def attach(model, **fields):
    return Runtime(None, RuntimeConfig(**(SMALL | {"budget": "100%"} | fields))).attach(model)


def batch(ids, *padding, n=100):
    inputs = torch.tensor([ids(n, seed) for seed in range(len(padding))])
    mask = torch.arange(n) >= torch.tensor(padding)[:, None]
    return {"input_ids": inputs.masked_fill(~mask, 256), "attention_mask": mask.long()}


@torch.no_grad()
def generate(model, inputs, n_new=12, **options):
    fixed = {"do_sample": False, "pad_token_id": 256, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, max_new_tokens=n_new, **(fixed | options))
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("padding", [(0,), (0, 0), (37, 0), (3, 90)])
def test_stock_generate_at_full_budget_gives_the_same(model, stock, ids, padding):
    inputs = batch(ids, *padding)
    expected = generate(stock.model, inputs)
    with attach(model) as cache:
        sequences, logits = generate(model, inputs, past_key_values=cache)
    assert torch.equal(sequences, expected[0])
    assert (logits - expected[1]).abs().max() < 1e-4 * expected[1].abs().max()


def test_a_second_turn_goes_on_with_the_same_cache(model, stock, ids):
    with attach(model) as cache:
        first, _ = generate(model, batch(ids, 0), past_key_values=cache)
        turn = {"input_ids": torch.cat([first, torch.tensor([ids(20, 5)])], 1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        second, _ = generate(model, turn, past_key_values=cache)
    assert torch.equal(second, generate(stock.model, turn)[0])


def test_a_padded_sequence_gives_what_it_gives_alone(model, ids):
    """Also where most of it is completed; its pages are cut elsewhere, so the completion has to be the exact one."""
    padded = batch(ids, 40, 0)
    single = {name: tensor[:1, 40:] for name, tensor in padded.items()}
    fields = {"budget": "10%", "completion": "exact"}
    with attach(model, **fields) as cache:
        _, both = generate(model, padded, past_key_values=cache)
    with attach(model, **fields) as cache:
        _, one = generate(model, single, past_key_values=cache)
    assert_close(both[:, 0], one[:, 0], atol=1e-3, rtol=1e-4)


def test_the_anchor_of_a_padded_row_is_the_mean_of_its_own_queries(model, ids):
    """Heads 0 and 1 belong to the first sequence; its real tokens have the same positions in both runs."""
    anchors = []
    for padding in (60, 0):
        inputs = batch(ids, 60, 0) if padding else {"input_ids": torch.tensor([ids(100)[60:]])}
        n = 100 - 60 + padding
        positions = (torch.arange(n) - padding).clamp_min(0).expand(len(inputs["input_ids"]), -1)
        with attach(model) as cache, torch.no_grad():
            model(**inputs, position_ids=positions, past_key_values=cache)
            layer = cache.offloaded[0]
            seen = []
            layer.completion.reset = lambda anchor, n_pages, seen=seen: seen.append(anchor)
            layer.completion.absorb = lambda pages: None
            prepare(layer)
            anchors.append(seen[0][:2])
    assert_close(anchors[0], anchors[1], atol=1e-4, rtol=1e-4)


def test_beams_are_refused(model, ids):
    with attach(model) as cache, pytest.raises(UsageError, match="num_beams > 1 is not supported"):
        generate(model, batch(ids, 0), num_beams=2, past_key_values=cache)


def test_right_padding_is_refused(model, ids):
    inputs = batch(ids, 0, 0)
    inputs["attention_mask"][0, -5:] = 0
    with attach(model) as cache, pytest.raises(UsageError, match="attention_mask must be left padding"):
        model(**inputs, past_key_values=cache)


def test_holes_in_the_mask_are_refused(model, ids):
    inputs = batch(ids, 0)
    inputs["attention_mask"][0, 50] = 0
    with attach(model) as cache, pytest.raises(UsageError, match="zeros, then ones"):
        model(**inputs, past_key_values=cache)


def test_a_cache_cannot_be_reset(model, ids):
    with attach(model) as cache:
        generate(model, batch(ids, 0), past_key_values=cache)
        with pytest.raises(UsageError, match="cannot be reset"):
            cache.reset()


def test_the_model_gives_the_same_with_other_caches(model, stock, ids):
    attach(model).close()
    assert model.config._attn_implementation == NAME
    for padding in ((0,), (20, 0)):
        given, expected = (generate(m, batch(ids, *padding)) for m in (model, stock.model))
        assert torch.equal(given[0], expected[0])
        assert_close(given[1], expected[1], atol=1e-4, rtol=1e-4)


def test_the_model_gives_the_same_without_a_cache(model, stock, ids):
    attach(model).close()
    inputs = torch.tensor([ids(40)])
    with torch.no_grad():
        assert_close(
            model(inputs, use_cache=False).logits, stock.model(inputs, use_cache=False).logits, atol=1e-4, rtol=1e-4
        )


def test_lengths_are_those_that_transformers_asks_for(model, ids):
    with attach(model) as cache:
        assert cache.get_seq_length() == 0
        generate(model, batch(ids, 0), n_new=5, past_key_values=cache)
        assert cache.get_seq_length() == 104  # the fifth token is not in it
        assert cache.get_mask_sizes(3, 0) == (107, 0)
        assert cache.get_max_length() == -1


def test_a_runtime_without_a_model_has_no_sessions():
    with pytest.raises(UsageError, match="use attach"):
        Runtime(None).session()


def test_a_runtime_makes_its_model_from_a_name(ids):
    runtime = Runtime.from_pretrained("tiny", budget="10%", completion="none", sinks=4, recent=8)
    with runtime.session() as session:
        session.prefill(ids(200))
        session.generate()
        assert session.stats().read_share <= 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selector": "best"}, "selector: 'best' is unknown; accepted: .*quantized"),
        ({"budgett": "5%"}, "budgett: unknown name; accepted: .*budget"),
        ({"budget": "lots"}, "budget: 'lots' is not a budget"),
    ],
)
def test_what_cannot_be_configured_is_refused_before_a_model_loads(fields, message, monkeypatch):
    monkeypatch.setattr("kvoffload.runtime.engine.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        Runtime.from_pretrained("tiny", **fields)


def test_an_unknown_model_is_refused():
    with pytest.raises(UsageError, match=r"model 'tinny' is unknown; accepted: .*tiny"):
        Runtime.from_pretrained("tinny")


def test_files_are_gone_when_the_cache_is_closed(model, ids, tmp_path):
    with attach(model, offload="nvme", nvme_dir=tmp_path) as cache:
        generate(model, batch(ids, 0), past_key_values=cache)
        assert any(path.is_file() for path in tmp_path.rglob("*"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_cap_on_host_memory_holds(model, ids):
    with attach(model, cpu_max="64KiB") as cache, pytest.raises(OutOfRoomError, match="65,536"):
        generate(model, batch(ids, 0), past_key_values=cache)
