"""The seam's edges: arguments it does not know, masks, layers outside the offloaded cache."""

import pytest
import torch
from families import dense, family_model, offloaded, prompt
from torch.testing import assert_close
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UnsupportedModelError, UsageError
from kvoffload.models import hf
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "budget": "100%"}


def heads(n_queries=5, n_keys=9, n_heads=4, n_kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, n_heads, n_queries, dim), (2, n_kv_heads, n_keys, dim), (2, n_kv_heads, n_keys, dim)
    return [torch.randn(size, generator=generator) for size in sizes]


def by_hand(query, key, value, seen, softcap=None, sinks=None):
    """[B, Q, H, D]: softmax in fp64 over the keys that ``seen`` allows, sinks in the denominator."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * 0.3
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    mass = logits.exp() * seen
    total = mass.sum(-1, keepdim=True) + (0.0 if sinks is None else sinks.double().exp()[None, :, None, None])
    return (mass / total @ value).float().transpose(1, 2)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", ["none", "padding", "full"])
def test_layers_outside_our_cache_get_dense_attention(mask, softcap, sinks):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query, key, value = heads(9, 9)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    given = None
    if mask == "padding":
        given = (torch.arange(9) >= torch.tensor([0, 4])[:, None])[:, None, None]
        seen = seen & given
    elif mask == "full":
        given = seen = seen & ~torch.ones(9, 9, dtype=torch.bool).tril(-3)  # a window of three
    output, weights = hf.attention(module, query, key, value, given, scaling=0.3, softcap=softcap, s_aux=sinks)
    expected = by_hand(query, key, value, seen, softcap, sinks)
    # padding's own queries see nothing, and nobody reads what they get
    rows = slice(4, None) if mask == "padding" else slice(None)
    assert weights is None
    assert_close(output[:, rows], expected[:, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "sinks"])
def test_arguments_that_change_attention_and_are_not_known_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=rf"\['{name}'\] of Linear are not supported"):
        hf.attention(torch.nn.Linear(1, 1), *heads(), None, **{name: torch.ones(1)})


def mask(attention_mask, **options):
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 9, "q_offset": 4}
    return hf.mask(**(sizes | {"mask_function": causal_mask_function, "attention_mask": attention_mask} | options))


def test_plain_causal_layers_get_no_mask():
    assert mask(None) is None


def test_padding_stays_one_row_wide():
    padding = torch.arange(9) >= torch.tensor([0, 4])[:, None]
    given = mask(padding.long())
    assert given.dtype == torch.bool
    assert torch.equal(given[:, 0, 0], padding)


def test_a_padding_mask_shorter_than_the_keys_is_full_of_tokens_at_the_end():
    given = mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert given.shape == (2, 1, 1, 9)
    assert given[:, 0, 0].long().tolist() == [[0] + [1] * 8, [1] * 9]


def test_other_patterns_get_the_librarys_mask():
    given = mask(None, mask_function=sliding_window_causal_mask_function(3), local_size=3, allow_is_causal_skip=False)
    q, kv = torch.arange(4, 9)[:, None], torch.arange(9)
    assert torch.equal(given[0, 0], (kv <= q) & (kv > q - 3))


def test_a_mask_that_is_queries_by_keys_is_refused():
    model = family_model("llama")
    switch_attention(model)
    with (
        OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache,
        pytest.raises(UnsupportedModelError, match="mask of shape"),
    ):
        model(torch.ones(1, 6, dtype=torch.int64), attention_mask=torch.zeros(1, 1, 6, 6), past_key_values=cache)


def test_attending_twice_to_one_update_is_refused():
    model = family_model("llama")
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        query, key, value = heads(3, 3)
        key, value = cache.update(key, value, 0)
        hf.attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
        with pytest.raises(UnsupportedModelError, match="attends twice"):
            hf.attention(torch.nn.Module(), query, key, value, None, scaling=0.3)


def test_keys_that_the_model_rebuilt_still_find_their_layer():
    """As in multi-head latent attention: what ``update`` returned is expanded before it is attended to."""
    model = family_model("llama")
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        query, key, value = heads(6, 6)
        tagged, value = cache.update(key, value, 0)
        output, _ = hf.attention(torch.nn.Module(), query, tagged * 1.0, value, None, scaling=0.3)
        assert len(cache.offloaded) == 1
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        assert_close(output, by_hand(query, key, value, seen), atol=1e-5, rtol=1e-5)


def test_hybrid_layers_keep_their_own_cache():
    model = family_model("gemma3_text")
    _, cache = offloaded(model, prompt(1, 61, 0), 4, RuntimeConfig(**SMALL))
    types = model.config.layer_types
    assert cache.n_offloaded == types.count("full_attention") > 0
    assert len(cache.layers) == len(types)
    assert {i for i, layer in enumerate(cache.layers) if hasattr(layer, "kv")} == {
        i for i, kind in enumerate(types) if kind == "full_attention"
    }


def test_a_hybrid_prefill_is_not_copied():
    model = family_model("gemma3_text")
    a, b = (OffloadCache(model.config, RuntimeConfig(**SMALL)) for _ in range(2))
    with a, b, pytest.raises(UsageError, match="sliding-window or linear layers cannot be copied"):
        b.copy_prefill(a)


def test_a_model_in_bf16_stays_near_its_own_attention():
    model = family_model("llama").bfloat16()
    inputs = prompt(2, 61, 9)
    expected = dense(model, inputs, 6)
    given, _ = offloaded(model, inputs, 6, RuntimeConfig(**SMALL))
    same = (given.tokens == expected.tokens)[:, -6:].int().cumprod(1).bool()
    alike = torch.cat([torch.ones(2, 1, dtype=torch.bool), same[:, :-1]], 1)  # behind a near tie tokens may differ
    assert alike.sum() > 6
    error = (given.logits - expected.logits).abs().amax(-1)[alike.T]
    assert error.max() < 6e-2 * expected.logits.abs().max()


def test_beams_cannot_reorder_a_cache():
    model = family_model("llama")
    with OffloadCache(model.config, RuntimeConfig(**SMALL)) as cache:
        for call in (cache.reorder_cache, cache.batch_select_indices):
            with pytest.raises(UsageError, match="num_beams > 1"):
                call(torch.tensor([0, 0]))
        with pytest.raises(UsageError, match="num_beams > 1"):
            cache.batch_repeat_interleave(2)
