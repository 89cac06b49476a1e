"""transformers' own ``generate`` with our cache or with ``custom_generate``: what a session gives, dense at a full
budget, and what is refused by name."""

import pytest
import torch
from tiny import SMALL, load

import kvoffload
from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.runtime.engine import Runtime

N_NEW = 12
MODES = {
    "greedy": ({}, {"do_sample": False}),
    "sampled": ({"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 5},
                {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load().model


def with_cache(model, inputs, fields, **options):
    with Runtime(None, RuntimeConfig(**(SMALL | fields))).attach(model) as cache:
        return run(model, inputs, past_key_values=cache, **options)


def with_callable(model, inputs, fields, **options):
    return run(model, inputs, custom_generate=kvoffload.generate, kvoffload=SMALL | fields, **options)


def run(model, inputs, **options):
    torch.manual_seed(5)
    return model.generate(inputs, max_new_tokens=N_NEW, pad_token_id=256, **({"do_sample": False} | options))


WAYS = pytest.mark.parametrize("way", [with_cache, with_callable], ids=["cache", "custom_generate"])


@WAYS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["10%", "100%"])
def test_tokens_are_those_of_a_session_with_the_same_seed(model, open_session, ids, way, mode, budget):
    sampling, options = MODES[mode]
    session = open_session(budget=budget)
    session.prefill(ids(200))
    expected = [event.token for event in session.stream(SamplingConfig(max_new_tokens=N_NEW, **sampling))]
    given = way(model, torch.tensor([ids(200)]), {"budget": budget}, **options)
    assert given[0, 200:].tolist() == expected


@WAYS
@pytest.mark.parametrize("mode", MODES)
def test_a_full_budget_is_dense_with_the_same_seed(model, stock, ids, way, mode):
    inputs, (_, options) = torch.tensor([ids(100), ids(100, 1)]), MODES[mode]
    assert torch.equal(way(model, inputs, {"budget": "100%"}, **options), run(stock.model, inputs, **options))


@WAYS
def test_several_sequences_of_a_prompt_are_rows_of_their_own(model, stock, ids, way):
    inputs, options = torch.tensor([ids(60)]), {"do_sample": True, "num_return_sequences": 3}
    given = way(model, inputs, {"budget": "100%"}, **options)
    assert torch.equal(given, run(stock.model, inputs, **options))
    assert len({tuple(row) for row in given.tolist()}) == 3


@WAYS
def test_a_sparse_budget_gives_other_tokens_than_dense(model, stock, ids, way):
    """Which the others could not tell from a call that never came to us."""
    inputs = torch.tensor([ids(400)])
    fields = {"budget": "2%", "completion": "none"}
    assert not torch.equal(way(model, inputs, fields), run(stock.model, inputs))


@WAYS
@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 2}, "num_beams"), ({"prompt_lookup_num_tokens": 3}, "prompt lookup")],
    ids=["beams", "lookup"],
)
def test_what_takes_tokens_back_is_refused_by_name(model, ids, way, options, message):
    with pytest.raises(UsageError, match=message):
        way(model, torch.tensor([ids(60)]), {}, **options)


def test_an_assistant_model_is_refused_by_the_cache(model, stock, ids):
    with pytest.raises(UsageError, match="assisted decoding"):
        with_cache(model, torch.tensor([ids(60)]), {}, assistant_model=stock.model)


def test_policies_that_compute_tokens_anew_are_refused(model, ids):
    with pytest.raises(UsageError, match="use a session"):
        with_callable(model, torch.tensor([ids(60)]), {"policy": "retro:window=4"})


def test_a_cache_with_tokens_beside_the_callable_is_refused(model, ids):
    with Runtime(None, RuntimeConfig(**SMALL)).attach(model) as cache:
        first = run(model, torch.tensor([ids(60)]), past_key_values=cache)
        with pytest.raises(UsageError, match="one or the other"):
            with_callable(model, torch.cat([first, first[:, :5]], 1), {}, past_key_values=cache)


def test_fields_are_checked_by_name(model, ids):
    with pytest.raises(UsageError, match="budgett: unknown name"):
        with_callable(model, torch.tensor([ids(20)]), {"budgett": "5%"})


def test_the_cache_of_the_callable_is_gone_after_the_call(model, ids, tmp_path):
    fields = {"offload": "nvme", "nvme_dir": tmp_path}
    found = with_callable(model, torch.tensor([ids(100)]), fields, return_dict_in_generate=True)
    assert found.past_key_values is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
