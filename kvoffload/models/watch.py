"""A dense forward that shows what attention sees: queries, keys and values with rotary applied, layer by layer."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from kvoffload_kernels.dispatch import attend
from torch import Tensor
from transformers import PreTrainedConfig

from kvoffload.config import RuntimeConfig
from kvoffload.geometry import Geometry
from kvoffload.models.cache import OffloadCache
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.self_test import switch_attention
from kvoffload.values import Partial


@dataclass(frozen=True)
class Seen:
    """One layer's attention over one sequence: queries [rows, R, N, D] (not scaled), keys [rows, N, D] and values
    [rows, N, Dv] on the model's device; ``layer`` counts the model's layers."""

    layer: int
    geometry: Geometry
    queries: Tensor
    keys: Tensor
    values: Tensor


OnLayer = Callable[[Seen], None]


class _WatchedLayer(OffloadLayer):
    """Keeps nothing: attends densely within the one forward and shows what it was given."""

    def __init__(self, cache: OffloadCache, index: int, on_layer: OnLayer | None) -> None:
        super().__init__(cache, index, index)
        self._on_layer = on_layer

    def is_open(self) -> bool:
        return False

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None
    ) -> Partial:
        n_sequences, n_heads = key.shape[:2]
        q = query.reshape(n_sequences * n_heads, -1, *query.shape[2:])
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        if self._on_layer is not None:
            sizes = (n_sequences, n_heads, q.shape[1], k.shape[-1], v.shape[-1])
            geometry = Geometry(*sizes, self._cache.config.page_size, k.dtype, scale, softcap)
            self._on_layer(Seen(self._index, geometry, q, k, v))
        return Partial(*attend(q, k, v, scale=scale, causal=True, softcap=softcap))


def offloaded_layers(model_config: PreTrainedConfig) -> list[int]:
    """The model's layers whose KV grows with the context."""
    layers = OffloadCache(model_config, RuntimeConfig()).layers
    return [i for i, layer in enumerate(layers) if isinstance(layer, OffloadLayer)]


@torch.no_grad()
def watch(model: Any, token_ids: Tensor, layers: Collection[int], config: RuntimeConfig, on_layer: OnLayer) -> None:
    """One dense forward over int64 [N]; ``on_layer`` hears of each of ``layers`` in order. The model is left with our
    attention."""
    switch_attention(model)
    cache = OffloadCache(model.config, config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, OffloadLayer):
            cache.layers[i] = _WatchedLayer(cache, i, on_layer if i in layers else None)
    model(token_ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
