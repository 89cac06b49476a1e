"""Transformers' own caches and attention, and dense attention at its best: what benchmarks measure beside ours."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvoffload.buffers import tensor_bytes
from kvoffload.errors import UsageError
from kvoffload.models.compiled import Glue, fused
from kvoffload.models.self_test import own_attention, switch_attention

LayerKv = tuple[Tensor, Tensor]
"""Keys [B, G, N, D] and values [B, G, N, Dv] of one layer."""


@contextmanager
def stock_attention(model: Any, *, eager: bool = False) -> Iterator[None]:
    """Inside this block the model attends as transformers would, or without fused operators; afterwards as it did
    before."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else own_attention(model, before))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def prefill_stock(model: Any, ids: Tensor, *, chunk: int | None = None, eager: bool = False) -> tuple[Tensor, Any]:
    """Logits [B, vocabulary] after int64 [B, N] by the library's attention, fused or eager, and its cache."""
    cache = DynamicCache(config=model.config)
    with stock_attention(model, eager=eager):
        for part in ids.split(chunk or ids.shape[1], dim=1):
            logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1], cache


def prompt_layers(model: Any, ids: Tensor, *, chunk: int) -> list[LayerKv]:
    """What every layer keeps of int64 [B, N]; raises UsageError where a layer does not keep everything."""
    cache = prefill_stock(model, ids, chunk=chunk)[1]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UsageError(
            f"{model.config.model_type}: layers with bounded KV (sliding windows) cannot be filled directly"
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_tensors(cache: Cache) -> list[Tensor]:
    """Keys and values of all layers, wherever they lie now."""
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def stock_cache(model: Any, layers: Iterable[LayerKv], *, offloading: bool) -> DynamicCache:
    """transformers' cache with this KV; with ``offloading`` all but one layer of it lies in host memory."""
    cache = DynamicCache(config=model.config, offloading=offloading)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


class ResidentLayer(CacheLayerMixin):
    """KV of a fixed number of tokens, of which every step writes the last one anew and attends to all: one step's cost
    at one context, in memory that does not move."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (keys, values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.get_seq_length() + 1

    get_max_cache_shape = get_max_length


class ResidentStep:
    """Dense greedy decoding on the device without anything that waits for the host, so that it can be captured: every
    call is the step behind the given KV. ``ids`` int64 [B, 1] is the token fed, and then the one that follows. With
    ``glue`` the model's small operations are compiled."""

    def __init__(self, model: Any, layers: Iterable[LayerKv], n_sequences: int, *, glue: Glue | None = None) -> None:
        switch_attention(model)  # without a mask it is torch's fused attention, on kv heads that are not repeated
        self._model, self._glue = model, glue
        self._cache = Cache(layers=[ResidentLayer(*kv) for kv in layers])
        self.ids = torch.zeros(n_sequences, 1, dtype=torch.int64, device=model.device)
        self._position = torch.full_like(self.ids, self._cache.get_seq_length())
        self.logits: Tensor | None = None

    @torch.inference_mode()
    def __call__(self) -> None:
        with fused(self._glue):
            output = self._model(self.ids, position_ids=self._position, past_key_values=self._cache, use_cache=True)
        self.logits = output.logits[:, -1]
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))

    @property
    def kv_bytes(self) -> int:
        return tensor_bytes(*cache_tensors(self._cache))
