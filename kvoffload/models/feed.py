"""Decoding tokens under the budget, with what the cache's policies compute anew: the newest tokens beside the new one,
or a dense pass over them now and then."""

from typing import Any

import torch
from torch import Tensor

from kvoffload.models.cache import OffloadCache


@torch.inference_mode()
def feed(model: Any, cache: OffloadCache, ids: Tensor, *, first: Tensor | None = None) -> Tensor:
    """Decode int64 [B, n] behind what the cache holds, each token as a step of its own; the logits after each,
    [B, n, vocabulary]. ``first`` int64 [B, 1] is the position of the first one where rows are padded.

    n may be ``cache.run_length(n)`` at most. Tokens that are computed anew leave the cache first (they are in the
    window still) and come back with their new keys and values; their logits are dropped.
    """
    logits = _forward(model, cache, cache.anew.revised(cache.offloaded), ids, first)
    cache.anew.note(ids)
    if n_dense := cache.anew.dense(cache.offloaded, ids.shape[1]):
        with cache.rectifying():
            _forward(model, cache, n_dense, ids[:, :0], None if first is None else first + ids.shape[1])
    return logits


def _forward(model: Any, cache: OffloadCache, n_again: int, ids: Tensor, first: Tensor | None) -> Tensor:
    """The newest ``n_again`` decoded tokens, anew, and then the new ones; the logits of the new ones."""
    options: dict[str, Any] = {}
    if first is not None:
        options["position_ids"] = first + torch.arange(-n_again, ids.shape[1], device=first.device)
    if n_again:
        cache.crop(-n_again)
        ids = torch.cat([cache.anew.newest(n_again), ids], 1)
    with cache.decoding(n_revised=n_again):
        output = model(ids, past_key_values=cache, use_cache=True, **options)
    logits: Tensor = output.logits[:, n_again:]
    return logits
