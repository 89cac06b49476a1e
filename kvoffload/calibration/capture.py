"""Queries, keys and values of short runs of positions, layer by layer, from dense forwards; kept in host memory."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.config import RuntimeConfig
from kvoffload.geometry import Geometry
from kvoffload.models.watch import Seen, watch

_RUN = 8
_ANCHOR_QUERIES = 256  # as the runtime takes the mean of a prefill's newest queries


@dataclass(frozen=True)
class LayerCapture:
    """One layer and sequence in host memory: scaled queries fp32 [rows, R, C, T, D] at ``positions`` (int64 [C, T], C
    runs of T tokens in a row), the anchor of each run fp32 [C, rows, D], the mean scaled query before it, and all keys
    [rows, N, D] and values [rows, N, Dv] in the model's dtype."""

    geometry: Geometry
    positions: Tensor
    queries: Tensor
    anchors: Tensor
    keys: Tensor
    values: Tensor

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.queries, self.anchors, self.keys, self.values)


def query_runs(n_tokens: int, n_queries: int) -> Tensor:
    """Positions of ``n_queries`` queries in runs of up to 8 tokens, int64 [C, T]: the runs' ends are spread evenly over
    the second half of a sequence, and its last token ends the last one.

    A run is short, so that what a query finds outside the recent window begins as near to it as in a decode step.
    """
    length = min(_RUN, n_queries)
    n_runs = n_queries // length
    ends = n_tokens - torch.arange(n_runs).flip(0).mul(n_tokens // 2).div(n_runs, rounding_mode="floor")
    return ends[:, None] - length + torch.arange(length)


def capture(
    model: Any,
    sequences: Sequence[Tensor],
    layers: Collection[int],
    config: RuntimeConfig,
    *,
    n_queries: int,
    on_sequence: Callable[[int], None] = lambda done: None,
) -> dict[int, list[LayerCapture]]:
    """The captures of each layer, one a sequence (int64 [N]); one dense forward a sequence. ``on_sequence`` hears how
    many are done."""
    found: dict[int, list[LayerCapture]] = {layer: [] for layer in layers}
    for done, token_ids in enumerate(sequences):
        positions = query_runs(len(token_ids), n_queries)

        def keep(seen: Seen, positions: Tensor = positions) -> None:
            found[seen.layer].append(_keep(seen, positions))

        watch(model, token_ids, layers, config, keep)
        on_sequence(done + 1)
    return found


def _keep(seen: Seen, positions: Tensor) -> LayerCapture:
    firsts, scale = positions[:, 0].tolist(), seen.geometry.scale
    before = [seen.queries[:, :, max(first - _ANCHOR_QUERIES, 0) : first].float().mean((1, 2)) for first in firsts]
    anchors = torch.stack(before) * scale
    queries = seen.queries[:, :, positions.to(seen.queries.device)].float() * scale
    return LayerCapture(seen.geometry, positions, queries.cpu(), anchors.cpu(), _own(seen.keys), _own(seen.values))


def _own(tensor: Tensor) -> Tensor:
    """A copy in host memory, whatever the tensor is a view of."""
    return tensor.detach().to("cpu", copy=True)
