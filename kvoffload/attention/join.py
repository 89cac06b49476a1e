"""Several prefilled sequences become the rows of one layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.stream import stream


def join(layer: LayerCache, sources: Sequence[LayerCache]) -> None:
    """Give an empty layer the tokens of single, unpadded sequences, the shorter ones padded at the left.

    Exact without a padded prefill: a token's key depends on its distance to the first real token alone. Summaries are
    made anew.
    """
    n_tokens = max(source.n_tokens for source in sources)
    padding = torch.tensor([n_tokens - source.n_tokens for source in sources], device=layer.anchors.keys.device)
    if bool(padding.any()):
        layer.anchors.padding = padding.repeat_interleave(layer.geometry.n_kv_heads)
    layer.ready = False
    tokens = [_tokens(source) for source in sources]
    keys = _side_by_side([k for k, _ in tokens])
    values = _side_by_side([v for _, v in tokens])
    layer.append(keys, values)
    queries = [source.tail_queries for source in sources if source.tail_queries is not None]
    assert len(queries) == len(sources), "a prefill leaves its last queries behind"
    layer.tail_queries = _side_by_side(queries)


def _tokens(layer: LayerCache) -> tuple[Tensor, Tensor]:
    """All keys [G, n, D] and values [G, n, Dv] of an unpadded sequence, in order."""
    anchors = layer.anchors
    assert anchors.padding is None, "only single sequences are joined"
    # copies: a streamed block is valid until the next one is asked for
    pages = [(p.keys.flatten(1, 2).clone(), p.values.flatten(1, 2).clone()) for p in stream(layer)]
    (key_sinks, key_window), (value_sinks, value_window) = (anchors.in_order(buffer) for buffer in anchors.buffers)
    keys = torch.cat([key_sinks, *(k for k, _ in pages), key_window], dim=1)
    return keys, torch.cat([value_sinks, *(v for _, v in pages), value_window], dim=1)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Rows [G, ..., n_i, D] below each other, zeros before the shorter ones: [B * G, ..., n, D]."""
    n = max(part.shape[-2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, n - part.shape[-2], 0)) for part in parts])
