"""Teacher forcing: a batch of given tokens through the runtime, many query rows a forward, each with its own
selection."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.prefill import prepare
from kvoffload.models.cache import OffloadCache
from kvoffload.models.feed import feed
from kvoffload.models.freeze import frozen_states
from kvoffload.models.step_graph import Replays

_CHUNK_TOKENS = {"cuda": 8192, "cpu": 1024}  # of all sequences together
_LEAST_REPLAYED = 8  # fewer steps are over before a capture pays
_FETCHED_BYTES = (
    1 << 28
)  # that a layer may select in one forward; in fp32 and with their weights they are several times that


@torch.inference_mode()
def prefill(model: Any, cache: OffloadCache, ids: Tensor) -> Tensor:
    """Take in a batch of prompts int64 [B, N] of one length exactly, in chunks; logits fp32 [B, vocabulary] after
    them. The cache is ready to decode then."""
    size = cache.config.prefill_chunk or max(_CHUNK_TOKENS.get(model.device.type, 1024) // len(ids), 1)
    with cache.prefilling(whole=size >= ids.shape[1]):
        for chunk in ids.to(model.device).split(size, dim=1):
            with frozen_states(model, cache.freezing, cache.get_seq_length()):
                logits: Tensor = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    for layer in cache.offloaded:
        prepare(layer)
    return logits[:, -1].float()


@torch.inference_mode()
def teacher_forced(model: Any, cache: OffloadCache, ids: Tensor, *, longest: int = 256) -> Iterator[Tensor]:
    """Feed int64 [B, n] token by token under the budget, behind what the cache holds; gives the logits after each token
    in order, in blocks fp32 [B, q, vocabulary].

    A block is one forward. It equals q single steps, in its logits and in what the meter counts, and is as long as the
    cache allows (``OffloadCache.run_length``), ``longest`` tokens at most, and shorter where a step reads much. Where
    all have to be single steps and there are many, they are replays.
    """
    ids, done = ids.to(model.device), 0
    if cache.config.gpu_cache is not None:
        longest = 1  # several queries would pass the page cache by
    with Replays.of(model, cache.config) as replays:
        while done < ids.shape[1]:
            limit = min(longest, _affordable(cache))
            stepped = None
            if limit == 1 and ids.shape[1] >= _LEAST_REPLAYED:
                stepped = replays.step(cache, ids[:, done : done + 1])
            if stepped is not None:
                logits, n_tokens = stepped.logits[:, None].clone(), 1
            else:
                n_tokens = cache.run_length(min(ids.shape[1] - done, limit))
                logits = feed(model, cache, ids[:, done : done + n_tokens])
            done += n_tokens
            yield logits.float()


def _affordable(cache: OffloadCache) -> int:
    """Steps whose selections together stay within ``_FETCHED_BYTES`` in every layer; at least 1."""
    largest = max((_step_bytes(layer) for layer in cache.offloaded), default=0)
    return max(_FETCHED_BYTES // max(largest, 1), 1)


def _step_bytes(layer: LayerCache) -> int:
    n_slices = min(layer.budget(layer.n_tokens), layer.n_pages * layer.geometry.n_kv_heads)
    return n_slices * layer.geometry.n_sequences * layer.geometry.slice_bytes
