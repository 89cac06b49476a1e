"""``anchored``: a fixed number of contiguous segments of tilted sums per row (kernels/README.md, "Completion"); no
training.

What is left of a segment behind the fetched slices has mass s0 e^((q - q0) . s1 / s0) and mean value sv / s0 to first
order in (q - q0).
"""

from typing import ClassVar, Literal

import torch
from kvoffload_kernels.completion.reference import Tilt
from kvoffload_kernels.dispatch import estimate_rest, rest_of_segments
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.completion.base import Completion
from kvoffload.completion.offset import OffsetsConfigBase
from kvoffload.completion.segments import Segments
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, Parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AnchoredCompletionConfig(OffsetsConfigBase):
    """At most ``segments`` segments a row; more pages make segments longer, not more. Masses are fp32, the sums of keys
    and values ``dtype``. ``file`` holds calibrated offsets of the mass."""

    kind: Literal["anchored"] = "anchored"
    holds: ClassVar[bool] = True
    segments: int = Field(32, ge=2, le=4096)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        segments = Segments(self.segments, geometry, device, dtype=_DTYPES[self.dtype])
        return self.with_offsets(AnchoredCompletion(segments), layer, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return self.segments * ((key_dim + value_dim) * _DTYPES[self.dtype].itemsize + 2 * 4)


class AnchoredCompletion(Completion):
    uses_anchor = True
    reads_slices = False
    row_state = ("_segments",)

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._segments.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        self._segments.absorb(pages)

    def hold(self, room: Room | None) -> None:
        self._segments.hold(room)

    def note(self) -> None:
        self._segments.note()

    def put(self, page: Pages) -> None:
        self._segments.put(page)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        return Partial(*estimate_rest(query, self._segments.sums(), self._segments.slices(fetched)))

    def estimate_parts(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Parts:
        return Parts(*rest_of_segments(query, self._segments.sums(), self._segments.slices(fetched)))

    @property
    def tilt(self) -> Tilt:
        return Tilt(self._segments.anchor, self._segments.sums().shift)

    @property
    def can_hold(self) -> bool:
        return True

    @property
    def state_bytes(self) -> int:
        return self._segments.state_bytes

    @property
    def resident_bytes(self) -> int:
        return self._segments.resident_bytes
