"""A cache between two forwards as tensors and numbers, without the pages, and back."""

from collections.abc import Mapping, Sequence

import torch
from kvoffload_storage.errors import IntegrityError
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvoffload.attention.layer import Anchored, LayerCache
from kvoffload.attention.prefill import prepare_again
from kvoffload.errors import KvoffloadError, UnsupportedModelError
from kvoffload.geometry import Geometry
from kvoffload.models.cache import OffloadCache
from kvoffload.models.offload_layer import OffloadLayer


class LayerState(BaseModel):
    """One layer of the model. ``n_prefilled`` is None where a prefill is not finished; ``n_anchored`` where summaries
    were not rebuilt since. A layer outside the tiers (sliding window) has tokens only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n_tokens: int
    offloaded: bool = False
    n_kv_heads: int = 0
    group_size: int = 0
    key_dim: int = 0
    value_dim: int = 0
    scale: float = 0.0
    softcap: float | None = None
    n_window: int = 0
    n_prefilled: int | None = None
    n_estimated: int | None = None
    n_anchored: int | None = None


def dump_cache(cache: OffloadCache) -> tuple[dict[str, Tensor], list[LayerState]]:
    """Copies in host memory, named by layer. Raises UnsupportedModelError for layers that are no plain KV, and
    KvoffloadError when a forward was broken off in the middle."""
    if cache.freezing is not None:
        raise UnsupportedModelError("a session whose policy freezes early tokens cannot be saved")
    tensors, states = dump_layers(cache)
    if cache.broken_off or len({state.n_tokens for state in states}) > 1:
        raise KvoffloadError("a forward was broken off: not all layers have its tokens")
    return tensors, states


def dump_layers(cache: OffloadCache) -> tuple[dict[str, Tensor], list[LayerState]]:
    """As ``dump_cache``, also where layers have different numbers of tokens."""
    tensors: dict[str, Tensor] = {}
    return tensors, [_dump_layer(i, layer, tensors) for i, layer in enumerate(cache.layers)]


def rewind_cache(
    cache: OffloadCache, tensors: Mapping[str, Tensor], states: Sequence[LayerState], device: torch.device, *,
    n_pages: int,
) -> int:  # fmt: skip
    """Fill a new cache with the sinks and the first ``n_pages`` pages (``begin_with``) of a saved or broken one; how
    many tokens that are. The rest has to be prefilled. With layers outside the tiers, which cannot go back, there are
    none."""
    if not all(state.offloaded for state in states):
        cache.begin_with(())
        return 0
    n_tokens = cache.config.sinks + n_pages * cache.config.page_size
    for i, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        assert isinstance(layer, OffloadLayer), "only these are offloaded"
        part = {name: tensors[f"{i}.{name}"] for name in ("keys", "values")}
        layer.kv = cache.build(i, layer.place, _geometry(cache, state, part), *_buffers(part, device))
        anchors, n_sinks = layer.kv.anchors, cache.config.sinks
        anchors.keys[:, :n_sinks], anchors.values[:, :n_sinks] = part["keys"][:, :n_sinks], part["values"][:, :n_sinks]
        anchors.n_tokens, layer.n_seen, layer.kv.ready = n_tokens, n_tokens, False
    return n_tokens


def load_cache(
    cache: OffloadCache, tensors: Mapping[str, Tensor], states: Sequence[LayerState], device: torch.device,
    *, same_policy: bool,
) -> None:  # fmt: skip
    """Fill a new cache, whose pages are there (``begin_with``), and summarise them; a gate's choice is taken over under
    the same policy and made anew under another."""
    for i, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        part = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
        if isinstance(layer, OffloadLayer):
            layer.n_seen = state.n_tokens
            if part:
                layer.kv = cache.build(i, layer.place, _geometry(cache, state, part), *_buffers(part, device))
                _fill(layer.kv, part, state, device, same_policy=same_policy)
        elif part and isinstance(layer, DynamicSlidingWindowLayer):
            layer.update(part["keys"].to(device), part["values"].to(device))
            layer.cumulative_length = state.n_tokens


def _dump_layer(i: int, layer: object, tensors: dict[str, Tensor]) -> LayerState:
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.keys is not None and layer.values is not None:
            tensors[f"{i}.keys"], tensors[f"{i}.values"] = _host(layer.keys), _host(layer.values)
        return LayerState(n_tokens=layer.cumulative_length)
    if not isinstance(layer, OffloadLayer):
        raise UnsupportedModelError(f"layer {i} is a {type(layer).__name__}, which cannot be saved in a session")
    if layer.kv is None:
        return LayerState(n_tokens=layer.n_seen)
    kv, geometry = layer.kv, layer.kv.geometry
    if geometry.n_sequences > 1 or kv.anchors.padding is not None:
        raise UnsupportedModelError("a session is one sequence without padding: a batch cannot be saved")
    tensors[f"{i}.keys"], tensors[f"{i}.values"] = _host(kv.anchors.keys), _host(kv.anchors.values)
    if kv.tail_queries is not None:
        tensors[f"{i}.tail"] = _host(kv.tail_queries)
    if kv.anchored is not None:
        tensors[f"{i}.anchor"] = _host(kv.anchored.query)
    if kv.gate is not None and kv.gate.choice is not None:
        tensors[f"{i}.choice"] = _host(kv.gate.choice)
    return LayerState(
        n_tokens=kv.n_tokens,
        offloaded=True,
        n_kv_heads=geometry.n_kv_heads,
        group_size=geometry.group_size,
        key_dim=geometry.key_dim,
        value_dim=geometry.value_dim,
        scale=geometry.scale,
        softcap=geometry.softcap,
        n_window=kv.anchors.n_window,
        n_prefilled=kv.n_prefilled if kv.ready else None,
        n_estimated=kv.n_estimated,
        n_anchored=None if kv.anchored is None else kv.anchored.n_pages,
    )


def _geometry(cache: OffloadCache, state: LayerState, part: Mapping[str, Tensor]) -> Geometry:
    sizes = (1, state.n_kv_heads, state.group_size, state.key_dim, state.value_dim)
    return Geometry(*sizes, cache.config.page_size, part["keys"].dtype, state.scale, state.softcap)


def _buffers(part: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return part["keys"].to(device), part["values"].to(device)


def _fill(
    kv: LayerCache, part: Mapping[str, Tensor], state: LayerState, device: torch.device, *, same_policy: bool
) -> None:
    anchors = kv.anchors
    anchors.keys.copy_(part["keys"])
    anchors.values.copy_(part["values"])
    anchors.n_tokens, anchors.n_window = state.n_tokens, state.n_window
    if kv.n_pages != anchors.n_sealed:
        raise IntegrityError(f"layer {kv.layer} has {kv.n_pages} pages, its {state.n_tokens} tokens {anchors.n_sealed}")
    kv.tail_queries = part.get("tail")
    kv.ready = False
    if state.n_prefilled is None:
        return
    anchored = Anchored(part["anchor"].to(device), state.n_anchored) if state.n_anchored is not None else None
    choice = part["choice"].to(device) if same_policy and "choice" in part else None
    prepare_again(kv, state.n_prefilled, state.n_estimated, anchored, choice)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
