"""The start-up self-test: models whose attention is not ours, or is not the same, are refused by name."""

import pytest
import torch
from families import family_model
from transformers import AutoConfig, AutoModelForCausalLM

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UnsupportedModelError
from kvoffload.models import hf, self_test
from kvoffload.models.self_test import check_parity, own_attention, switch_attention
from kvoffload.runtime.engine import Runtime

OUTSIDERS = {
    "gptj": ("GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}),
    "falcon": ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
}


def outsider(name):
    torch.manual_seed(0)
    special = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **special, **OUTSIDERS[name][1])).eval()


@pytest.mark.parametrize("name", OUTSIDERS)
def test_a_model_with_attention_of_its_own_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=rf"{OUTSIDERS[name][0]} \({name}\) cannot be run: "):
        Runtime(None).attach(outsider(name))


def test_a_model_that_switches_and_then_never_calls_is_refused(monkeypatch):
    model = family_model("llama")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(UnsupportedModelError, match="it never calls transformers' attention interface"):
        check_parity(model, RuntimeConfig())


def sabotage(monkeypatch, **changed):
    right = hf.attention

    def wrong(module, query, key, value, attention_mask, scaling=None, **kwargs):
        factor = changed.get("scaling", 1.0)
        output, weights = right(module, query, key, value, attention_mask, scaling=scaling * factor, **kwargs)
        return output + changed.get("added", 0.0), weights

    monkeypatch.setattr(hf, "attention", wrong)


@pytest.mark.parametrize("changed", [{"scaling": 1.05}, {"added": 0.01}, {"added": float("nan")}])
def test_attention_that_differs_is_refused(monkeypatch, changed):
    sabotage(monkeypatch, **changed)
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) .* its logits differ by .* at full budget"
    ):
        check_parity(family_model("llama"), RuntimeConfig())


def test_attention_that_is_right_passes_within_the_tolerance():
    assert 0 < check_parity(family_model("llama"), RuntimeConfig()) < 1e-4


@pytest.mark.parametrize(
    "fields", [{"offload": "nvme"}, {"gate": True, "completion": "phi+pages"}, {"gpu_cache": "1MiB"}]
)
def test_the_self_test_runs_under_the_users_policies(fields):
    assert check_parity(family_model("qwen3"), RuntimeConfig(**fields)) < 1e-4


def test_a_failure_under_our_cache_is_told_as_a_refusal(monkeypatch):
    model = family_model("llama")
    forward = model.forward

    def no_cache(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise TypeError("forward() got an unexpected keyword argument")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", no_cache)
    with pytest.raises(UnsupportedModelError, match="it fails under our cache: forward"):
        check_parity(model, RuntimeConfig())


def test_a_model_is_tested_once(monkeypatch):
    model, runs = family_model("llama"), []
    monkeypatch.setattr("kvoffload.runtime.engine.check_parity", lambda *args: runs.append(args))
    for _ in range(2):
        Runtime(None).attach(model).close()
    assert len(runs) == 1


def test_the_self_test_can_be_turned_off(monkeypatch):
    sabotage(monkeypatch, scaling=1.05)
    Runtime(None, RuntimeConfig(self_test=False)).attach(family_model("llama")).close()


def test_a_model_whose_layers_are_all_bounded_is_refused():
    config = AutoConfig.for_model(
        "mistral", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(
        UnsupportedModelError, match="no layer of this mistral model has KV that grows with the context"
    ):
        Runtime(None).attach(AutoModelForCausalLM.from_config(config).eval())


def test_switching_says_what_was_there_before():
    model = family_model("llama")
    before = model.config._attn_implementation
    assert (switch_attention(model), switch_attention(model)) == (before, hf.NAME)


@pytest.mark.parametrize(("family", "expected"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")])
def test_a_model_is_compared_with_attention_that_leaves_nothing_out(family, expected):
    assert own_attention(family_model(family), "sdpa") == expected


def test_the_tolerance_of_every_dtype_is_known():
    assert set(self_test._TOLERANCE) == {torch.float32, torch.float16, torch.bfloat16}


def test_a_dense_reference_is_fused_also_where_our_attention_is_in_place():
    model = family_model("llama")
    switch_attention(model)
    assert own_attention(model, switch_attention(model)) == "sdpa"


def test_rounding_that_the_librarys_own_attentions_show_is_no_reason_to_refuse(monkeypatch):
    model = family_model("llama").to(torch.bfloat16)
    monkeypatch.setitem(self_test._TOLERANCE, torch.bfloat16, 1e-7)
    monkeypatch.setattr(
        self_test, "_own_logits", lambda model, ids, attention: torch.tensor([1.0, 1.03][attention == "eager"])
    )
    monkeypatch.setattr(self_test, "_through_cache", lambda model, ids, config: torch.tensor(1.05))
    assert check_parity(model, RuntimeConfig()) == pytest.approx(0.05)
    monkeypatch.setattr(self_test, "_through_cache", lambda model, ids, config: torch.tensor(1.07))
    with pytest.raises(UnsupportedModelError, match=r"allowed: 6e-02"):
        check_parity(model, RuntimeConfig())
