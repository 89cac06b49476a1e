"""One decode forward for several sequences of different lengths, each with a cache of its own.

Embeddings, projections, MLPs and the head run once for all; attention is each sequence's own, under its own budget, by
the layers of its own cache. A batch lasts for one forward, so sequences join and leave between any two.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvoffload_storage.errors import StorageError
from torch import Tensor
from transformers.cache_utils import Cache

from kvoffload.config import RuntimeConfig
from kvoffload.errors import KvoffloadError
from kvoffload.models.cache import OffloadCache
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.tagged import AttendingLayer
from kvoffload.values import Partial

FAILURES = (KvoffloadError, StorageError, OSError, MemoryError, RuntimeError)
"""What ends one sequence and lets the others go on; torch raises RuntimeError, also where memory is out."""

Failed = dict[int, BaseException]
"""What went wrong with which sequence of a batch."""


@dataclass(frozen=True)
class Fed:
    """What feeding a token gave: logits [1, vocabulary], and the likeliest token where the host has it already."""

    logits: Tensor
    picked: int | None = None


class BatchLayer(AttendingLayer):
    """The layers of several caches at one place of the model, which have KV already. A sequence that ``failed`` is left
    alone in all later layers; zeros stand for what it would have attended to. Without ``failed`` errors are raised."""

    def __init__(
        self, layers: Sequence[OffloadLayer], failed: Failed | None, branches: Sequence[torch.cuda.Stream] = ()
    ) -> None:
        super().__init__()
        self._branches = branches
        self._layers, self._failed = layers, {} if failed is None else failed
        self._kept_apart = () if failed is None else FAILURES

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self._layers):
            if i not in self._failed:
                layer.update(key_states[i : i + 1], value_states[i : i + 1])
        return self.tag(key_states), value_states

    def looks_ahead(self, n_tokens: int) -> bool:
        return any(layer.looks_ahead(n_tokens) for _, layer in self._sound())

    def look_ahead(self, guess: Callable[[], Tensor]) -> None:
        query = guess()
        for i, layer in self._sound():
            with _branch(self._branches, i):
                try:
                    if layer.looks_ahead(query.shape[2]):
                        layer.look_ahead(lambda i=i: query[i : i + 1])  # type: ignore[misc]
                except self._kept_apart as error:
                    self._failed[i] = error
        self._join(query.device)

    def _join(self, device: torch.device) -> None:
        """What comes next waits for all branches."""
        for stream in self._branches:
            torch.cuda.current_stream(device).wait_stream(stream)

    def _sound(self) -> list[tuple[int, OffloadLayer]]:
        return [(i, layer) for i, layer in enumerate(self._layers) if i not in self._failed]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None
    ) -> Partial:
        def attend_one(i: int, layer: OffloadLayer) -> Partial:
            own = slice(i, i + 1)
            if i not in self._failed:
                try:
                    return layer.attend(query[own], key[own], value[own], None, scale=scale, softcap=softcap)
                except self._kept_apart as error:
                    self._failed[i] = error
            return Partial.empty(query[i].float().unflatten(0, (key.shape[1], -1)), value.shape[-1])

        parts = []
        for i, layer in enumerate(self._layers):
            with _branch(self._branches, i):
                parts.append(attend_one(i, layer))
        self._join(query.device)
        return Partial(torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts]))

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)


def can_batch(model: Any, config: RuntimeConfig) -> bool:
    """Whether sequences under this configuration can share a forward: no layer keeps KV outside the tiers (sliding
    windows, linear attention), nothing is computed anew, and a token's rotation follows from its own position alone."""
    with OffloadCache(model.config, config) as cache:
        whole = cache.n_offloaded == len(cache.layers) and not cache.anew.is_wanted
    return whole and _rotates_alone(model.config) and "position_ids" in inspect.signature(model.forward).parameters


def batch_of(
    caches: Sequence[OffloadCache], failed: Failed | None, branches: Sequence[torch.cuda.Stream] = ()
) -> Cache:
    """What a model is given for one forward of all of them. Their attention runs on these streams in turn: each waits
    for the forward's own before and is waited for after, so that no memory is used again too early."""
    places = zip(*(cache.layers for cache in caches), strict=True)
    return Cache(layers=[BatchLayer(layers, failed, branches) for layers in places])


@contextmanager
def _branch(branches: Sequence[torch.cuda.Stream], i: int) -> Iterator[None]:
    if not branches:
        yield
        return
    stream = branches[i % len(branches)]
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


@torch.inference_mode()
def feed_together(model: Any, caches: Sequence[OffloadCache], tokens: Sequence[int]) -> list[Fed | BaseException]:
    """Decode one token behind what each cache holds, in one forward; for each sequence what it gave, or what went wrong
    with it alone. All must be such as ``can_batch`` says, and prefilled."""
    failed: Failed = {}
    device = model.device
    ids = torch.tensor(tokens, device=device)[:, None]
    positions = torch.tensor([cache.get_seq_length() for cache in caches], device=device)[:, None]
    output = model(ids, past_key_values=batch_of(caches, failed), position_ids=positions, use_cache=True)
    logits: Tensor = output.logits[:, -1]
    return [failed[i] if i in failed else Fed(logits[i : i + 1]) for i in range(len(caches))]


def _rotates_alone(model_config: Any) -> bool:
    """False for rotary embeddings whose frequencies follow from the longest sequence of a batch."""
    rotary = getattr(model_config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, dict)]
    return not any(kind is not None and ("dynamic" in kind or kind == "longrope") for kind in kinds)
