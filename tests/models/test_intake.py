"""How a forward's tokens enter the layers: everything is in its place between two forwards, whatever happened."""

import gc
import weakref

import pytest
import torch
from families import family_model, prompt
from kvoffload_kernels.dense_attention import fused
from torch.testing import assert_close

from kvoffload.attention.behind import Behind
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention
from kvoffload.runtime.chunks import activation_bytes, chunk_tokens, fitting_tokens

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "budget": "20%"}


@pytest.fixture(scope="module")
def model():
    made = family_model("llama")
    switch_attention(made)
    return made


def open_cache(model, **fields):
    return OffloadCache(model.config, RuntimeConfig(**(SMALL | fields)))


@pytest.mark.parametrize("cuts", [(), (20,), (1, 2, 50)])
def test_every_layer_has_every_token_between_two_forwards(model, cuts):
    ids = prompt(1, 60, 0)["input_ids"]
    with open_cache(model) as cache, torch.inference_mode():
        for part in ids.tensor_split(cuts, dim=1):
            model(part, past_key_values=cache, use_cache=True)
            assert {layer.n_tokens for layer in cache.offloaded} == {cache.get_seq_length()}


def test_a_forward_that_breaks_off_leaves_whole_layers(model):
    """Those that attended have all tokens, the others none of them."""
    ids = prompt(1, 60, 0)["input_ids"]

    def broken(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[2].mlp.register_forward_pre_hook(broken)
    try:
        with open_cache(model) as cache, torch.inference_mode():
            with pytest.raises(RuntimeError, match="stop"), cache.prefilling(whole=True):
                model(ids, past_key_values=cache, use_cache=True)
            assert [layer.n_tokens for layer in cache.offloaded] == [60, 60, 60]
            assert [layer.ready for layer in cache.offloaded] == [True] * 3
    finally:
        hook.remove()


def test_a_tier_that_is_full_is_told_though_the_next_layer_finds_it_out(model):
    ids = prompt(1, 60, 0)["input_ids"]
    with open_cache(model, cpu_max=4096) as cache, torch.inference_mode(), pytest.raises(OutOfRoomError):
        model(ids, past_key_values=cache, use_cache=True)


def test_only_two_layers_keys_are_held_at_once(model, monkeypatch):
    alive, most, follow = [], [], Behind.follow

    def counted(self, work, made):
        follow(self, work, made)
        alive.append(weakref.ref(made[1]))
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(Behind, "follow", counted)
    ids = prompt(1, 60, 0)["input_ids"]
    with open_cache(model) as cache, torch.inference_mode(), cache.prefilling(whole=True):
        model(ids, past_key_values=cache, use_cache=True)
    assert len(most) == 4
    assert max(most) <= 2


def test_a_whole_prompt_is_ready_after_its_forward_and_another_is_not(model):
    ids = prompt(1, 60, 0)["input_ids"]
    with open_cache(model) as cache, torch.inference_mode():
        with cache.prefilling(whole=True):
            model(ids, past_key_values=cache, use_cache=True)
        assert all(layer.ready for layer in cache.offloaded)
        with cache.prefilling(whole=True):  # tokens came before: summaries are made anew from all pages
            model(ids, past_key_values=cache, use_cache=True)
        assert not any(layer.ready for layer in cache.offloaded)


def test_the_first_tokens_attend_without_a_partial(model, monkeypatch):
    """Without padding, soft cap and sinks the fused kernel's output goes on as it is."""
    shapes, fast = [], fused.attend_causal

    def counted(query, keys, values, *, scale):
        shapes.append(tuple(query.shape))
        return fast(query, keys, values, scale=scale)

    monkeypatch.setattr(fused, "attend_causal", counted)
    ids = prompt(1, 60, 0)["input_ids"]
    with open_cache(model) as cache, torch.inference_mode():
        model(ids[:, :40], past_key_values=cache, use_cache=True)
        assert shapes == [(1, 4, 40, 16)] * 4
        model(ids[:, 40:], past_key_values=cache, use_cache=True)
    with open_cache(model) as cache, torch.inference_mode():
        model(**prompt(2, 40, 3), past_key_values=cache, use_cache=True)
    assert len(shapes) == 4


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_fused_causal_attention_is_the_same_whichever_kernel_is_preferred(heads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, n, 33, 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
    first = fused.attend_causal(query, keys, values, scale=0.3)
    monkeypatch.setattr(fused, "_prefers_cudnn", lambda query: True)
    assert_close(fused.attend_causal(query, keys, values, scale=0.3), first)
    group = heads[0] // heads[1]
    rows = query.reshape(2 * heads[1], group, 33, 16), keys.flatten(0, 1), values.flatten(0, 1)
    expected = fused.attend(*rows, scale=0.3, causal=True)[0]
    assert_close(first, expected.reshape(first.shape))


def test_a_chunk_is_what_fits_with_its_activations(model):
    config = model.config
    per_token = activation_bytes(config, 2)
    attention, hidden, kv = 4 * 16 * (4 * 2 + 16), 4 * 64 * 2, 16 * 2 * 16 * 2
    assert per_token == attention + hidden + kv + 12 * 64
    assert fitting_tokens(100_000 * per_token, per_token) == 80_000 // 256 * 256
    assert fitting_tokens(100_000 * per_token, per_token, most=8192) == 8192
    assert fitting_tokens(per_token, per_token) == 1024
    assert chunk_tokens(model, saved=False) == 1024  # a CPU
