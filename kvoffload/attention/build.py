"""From a configuration to the parts of a layer's cache."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from kvoffload_storage.store import Store
from torch import Tensor

from kvoffload.attention.gate import GateRecheck
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.prefetch import Prefetch
from kvoffload.attention.reading import SelectedPages
from kvoffload.attention.refresh import Reanchoring, Rebuild
from kvoffload.attention.upkeep import Upkeep
from kvoffload.cache.anchors import Anchors
from kvoffload.cache.fetch import MappedFetch, SubmittedFetch
from kvoffload.cache.slots import PageCache, Slots, Staging
from kvoffload.completion.base import Completion
from kvoffload.completion.gated import GatedCompletion
from kvoffload.config import RuntimeConfig
from kvoffload.geometry import Geometry
from kvoffload.index.base import KeyIndex
from kvoffload.policies.accuracy import Audit, BoundedMass, Margin
from kvoffload.policies.base import Depth, Policy
from kvoffload.selection.base import Selector
from kvoffload.selection.topk import HeadBounds
from kvoffload.units import Budget


@dataclass(frozen=True)
class SliceBudget:
    """The budget as a number of slices: it bounds the bytes that selected pages can move.

    ``slice_cost_bytes`` is what the tier moves for one slice at most; where reads are aligned to more than a slice,
    fewer slices fit into the budget. ``share`` is this layer's part, as a multiple of the mean; a budget for everything
    is for everything in each layer.
    """

    budget: Budget
    geometry: Geometry
    n_layers: int
    slice_cost_bytes: int
    share: float = 1.0

    def tokens(self, n_tokens: int) -> float:
        """Token-equivalents per layer and kv head at a context of ``n_tokens``."""
        n_heads = self.n_layers * self.geometry.rows
        mean = self.budget.tokens(n_tokens, token_bytes=self.geometry.token_bytes, n_heads_total=n_heads)
        return mean if mean >= n_tokens else mean * self.share

    def spending(self, budget: Budget) -> "SliceBudget":
        return replace(self, budget=budget)

    def __call__(self, n_tokens: int) -> int:
        tokens = self.tokens(n_tokens)
        if tokens >= n_tokens:
            return self.geometry.n_kv_heads * -(-n_tokens // self.geometry.page_size)
        n_bytes = tokens * self.geometry.n_kv_heads * self.geometry.token_bytes
        return math.floor(n_bytes / self.slice_cost_bytes + 1e-9)


def build_layer(
    config: RuntimeConfig,
    geometry: Geometry,
    store: Store,
    layer: int,
    *,
    model_layer: int,
    staging: Staging,
    keys: Tensor,
    values: Tensor,
    policies: Iterable[Policy] | None = None,
    prefetch: Prefetch | None = None,
) -> LayerCache:
    """An empty cache for layer ``layer`` of the store; ``keys`` and ``values`` [rows, n, D] tell dtype and device of
    what is to come, ``model_layer`` is the layer's number in the model. ``policies`` are those of the whole cache, made
    for this layer alone where they are not given."""
    n_layers = store.shape.n_layers
    device = keys.device

    def build_selector() -> Selector:
        return _selector(config, geometry, device)

    selector = build_selector()

    def build_completion() -> tuple[Completion, GatedCompletion | None]:
        return _completion(config, geometry, model_layer, device, selector.index)

    completion, gate = build_completion()
    slots = _slots(config, geometry, n_layers, staging)
    fetch = MappedFetch if store.mapped(layer) is not None else SubmittedFetch
    budget = SliceBudget(config.effective_budget, geometry, n_layers, store.slice_cost_bytes, config.share(layer))
    cache = LayerCache(
        geometry,
        store,
        layer,
        anchors=Anchors(geometry.rows, config.sinks, config.recent, config.page_size, keys, values),
        fetch=fetch(store, layer, slots, geometry),
        selector=selector,
        completion=completion,
        budget=budget,
        pool=config.pool,
        index_is_read=config.selector.reads_slow_tier,
        index_on_host=config.index == "cpu" or config.selector.reads_slow_tier,
    )
    cache.gate, cache.reading = gate, SelectedPages()
    cache.head_bounds = HeadBounds(config.head_floor, config.head_cap)
    cache.prefetch = prefetch or cache.prefetch
    cache.fetch.patience_s = config.fetch_ms / 1000 if config.fetch == "deadline" else None
    rebuild = Rebuild(
        selector=build_selector if selector.uses_anchor else None,
        completion=build_completion if completion.uses_anchor else None,
    )
    cache.upkeep = tuple(_upkeep(config, gate, rebuild))
    margin = None
    if config.max_dropped_mass is not None:
        if config.dropped_mass_misses is not None:
            margin = Margin(config.max_dropped_mass, config.dropped_mass_misses)
        cap = budget.spending(config.dropped_mass_cap)
        cache.reading = BoundedMass(cache.reading, config.max_dropped_mass, cap, margin)
    given = [policy.build() for policy in config.policy] if policies is None else policies
    for policy in sorted(given, key=lambda policy: not policy.replaces_chooser):
        policy.attach(cache, Depth(layer, n_layers))
    if config.audit is not None:
        cache.reading = Audit(cache.reading, config.audit, margin)
    return cache


def _selector(config: RuntimeConfig, geometry: Geometry, device: torch.device) -> Selector:
    """With ``index = "cpu"`` a GPU streams codes of single tokens from host memory; all else the host scores where it
    lies."""
    streamed = config.index == "cpu" and config.selector.has_index and device.type != "cpu"
    selector = config.selector.build(geometry, device if streamed or config.index == "device" else torch.device("cpu"))
    if streamed and selector.index is not None:
        selector.index.stream()
    return selector


def _upkeep(config: RuntimeConfig, gate: GatedCompletion | None, rebuild: Rebuild) -> Iterator[Upkeep]:
    if config.reanchor is not None and (rebuild.selector or rebuild.completion):
        yield Reanchoring(config.reanchor, rebuild)
    if config.gate_recheck is not None and gate is not None:
        yield GateRecheck(config.gate_recheck, gate.n_queries)


def _completion(
    config: RuntimeConfig, geometry: Geometry, layer: int, device: torch.device, index: KeyIndex | None
) -> tuple[Completion, GatedCompletion | None]:
    built = [c.build(geometry, layer, device) for c in config.completion]
    for completion in built:
        completion.index = index
    if not config.gate:
        return built[0], None
    gate = GatedCompletion(built, geometry.value_dim, n_queries=config.gate_queries, margin=config.gate_margin)
    return gate, gate


def _slots(config: RuntimeConfig, geometry: Geometry, n_layers: int, staging: Staging) -> Slots:
    if config.gpu_cache is None:
        return staging
    n_slots = max(config.gpu_cache // (n_layers * geometry.slice_bytes), 1)
    return PageCache(n_slots, geometry.slice_bytes, staging.data.device, staging)
