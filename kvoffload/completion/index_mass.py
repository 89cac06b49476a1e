"""``index_mass``: the selector's own score is the mass of every unread page; values are the tilted mean values of a
fixed number of segments (kernels/README.md, "Completion")."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.completion.segments import Segments
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial


class IndexMassCompletionConfig(CompletionConfigBase):
    """At most ``segments`` mean values a row, fp32."""

    kind: Literal["index_mass"] = "index_mass"
    segments: int = Field(32, ge=2, le=4096)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return IndexMassCompletion(Segments(self.segments, geometry, device, keep_keys=False), geometry.value_dim)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return self.segments * (value_dim + 2) * 4


class IndexMassCompletion(Completion):
    """Where the anchor gives next to no mass to what is left of a segment, but the scores do, the mean value of all of
    the segment stands for it."""

    uses_scores, uses_anchor = True, True

    def __init__(self, segments: Segments, value_dim: int) -> None:
        self._segments, self._value_dim = segments, value_dim

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._segments.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        self._segments.absorb(pages)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        n_pages = scores.shape[-1]
        if n_pages == 0:
            return Partial.empty(query, self._value_dim)
        rest = self._segments.without(fetched, query)
        segments = self._segments.of_pages(torch.arange(n_pages, device=query.device))
        read = fetched.mask(query.shape[0], n_pages)
        gone = read | ~rest.has_tokens.index_select(1, segments)
        masses = scores.masked_fill(gone[:, None], -torch.inf)
        top = masses.amax(-1, keepdim=True)
        shift = top.masked_fill(top.isneginf(), 0.0)
        by_segment = scores.new_zeros(*scores.shape[:2], rest.values.shape[1])
        by_segment.index_add_(-1, segments, (masses - shift).exp())
        return Partial.weigh(by_segment.log() + shift, rest.values)

    @property
    def state_bytes(self) -> int:
        return self._segments.state_bytes

    @property
    def resident_bytes(self) -> int:
        return self._segments.resident_bytes
