"""``anchored``: a fixed number of contiguous segments of tilted sums per row (kernels/README.md, "Completion"); no
training.

A segment keeps the sums over its tokens of w, w k and w v with w = e^(q0 . k - c), q0 the prefill's mean query and c
a row's largest exponent so far. The fetched slices' sums are recomputed from their keys and values and removed; what
is left of a segment has mass s0 e^((q - q0) . s1 / s0) and mean value sv / s0 to first order in (q - q0).
"""

from typing import Literal

import torch
from kvoffload_kernels.completion.reference import remove_slices, tilted_sums
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial

_UNUSED = torch.iinfo(torch.int64).max
_EMPTY = 1e-6  # below this share of a segment's mass what is left is rounding (fp32 sums: 1e-7 per term)


class AnchoredCompletionConfig(CompletionConfigBase):
    """At most ``segments`` segments a row, fp32; more pages make segments longer, not more."""

    kind: Literal["anchored"] = "anchored"
    segments: int = Field(32, ge=2, le=4096)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return AnchoredCompletion(self.segments, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return self.segments * (key_dim + value_dim + 2) * 4


class AnchoredCompletion(Completion):
    """A prefill's pages are shared out evenly. While generating, the newest segment takes pages until it is as long
    as those; then the two neighbours with the fewest pages merge (sums just add) to make room for the next one."""

    def __init__(self, n_segments: int, geometry: Geometry, device: torch.device) -> None:
        self._n_segments, self._geometry, self._device = n_segments, geometry, device
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        rows, width = self._geometry.rows, self._geometry.key_dim + self._geometry.value_dim + 1
        self._anchor = anchor
        self._sums = torch.zeros(rows, self._n_segments, width, device=self._device)
        self._counts = torch.zeros(rows, self._n_segments, device=self._device)
        self._log_scale = torch.full((rows,), -torch.inf, device=self._device)
        self._segment_pages = max(-(-n_pages // self._n_segments), 1)
        self._lengths = [0]  # pages of each segment in use
        self._ends = torch.full((self._n_segments,), _UNUSED, device=self._device)  # the page after each segment

    def absorb(self, pages: Pages) -> None:
        done = 0
        while done < pages.n_pages:
            done += self._absorb_into_last(pages, done)

    def estimate(self, query: Tensor, fetched: Fetched) -> Partial:
        sums, counts = self._remaining(fetched)
        mass = sums[..., 0]
        left = (counts > 0.5) & (mass > _EMPTY * self._sums[..., 0])
        safe = torch.where(left, mass, 1.0)
        means = sums[..., 1:] / safe[..., None]
        keys, values = means.split([self._geometry.key_dim, self._geometry.value_dim], dim=-1)
        log_mass = (safe.log() + self._shift()[:, None]).masked_fill(~left, -torch.inf)
        return Partial.weigh((query - self._anchor[:, None]) @ keys.transpose(-1, -2) + log_mass[:, None], values)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._sums, self._counts)

    def _remaining(self, fetched: Fetched) -> tuple[Tensor, Tensor]:
        """Sums and token counts without the fetched slices."""
        log_valid = fetched.log_valid()
        logits = torch.einsum("fd,fsd->fs", self._anchor[fetched.row_ids], fetched.keys.float()) + log_valid
        sums = tilted_sums(fetched.keys, fetched.values, logits - self._shift()[fetched.row_ids][:, None])
        n_tokens = log_valid.exp().sum(-1, keepdim=True)
        both = torch.cat([self._sums, self._counts[..., None]], dim=-1)
        left = remove_slices(
            both, torch.cat([sums, n_tokens], -1), fetched.row_ids, self._segments_of(fetched.page_ids)
        )
        return left[..., :-1], left[..., -1]

    def _shift(self) -> Tensor:
        return self._log_scale.masked_fill(self._log_scale.isneginf(), 0.0)

    def _rescale(self, log_scale: Tensor) -> None:
        """Express the sums relative to a new largest exponent."""
        factor = (self._log_scale - log_scale.masked_fill(log_scale.isneginf(), 0.0)).exp()
        self._sums *= factor[:, None, None]
        self._log_scale = log_scale

    def _absorb_into_last(self, pages: Pages, start: int) -> int:
        """Add pages from ``start`` on to the newest segment while it has room; returns how many."""
        if self._lengths[-1] >= self._segment_pages:
            self._open_segment()
        last = len(self._lengths) - 1
        taken = pages.run(start, min(start + self._segment_pages - self._lengths[-1], pages.n_pages))
        logits = torch.einsum("gd,gpsd->gps", self._anchor, taken.keys.float()) + taken.log_valid()
        self._rescale(torch.maximum(self._log_scale, logits.amax((1, 2))))
        flat = taken.keys.flatten(1, 2), taken.values.flatten(1, 2), (logits - self._shift()[:, None, None]).flatten(1)
        self._sums[:, last] += tilted_sums(*flat)
        self._counts[:, last] += taken.counts().sum(-1)
        self._lengths[-1] += taken.n_pages
        self._ends[last : last + 1].fill_(sum(self._lengths))  # no host round trip, as an item assignment would make
        return taken.n_pages

    def _open_segment(self) -> None:
        if len(self._lengths) == self._n_segments:
            pairs = [a + b for a, b in zip(self._lengths, self._lengths[1:], strict=False)]
            i = pairs.index(min(pairs))
            for state in (self._sums, self._counts):
                state[:, i] += state[:, i + 1]
                state[:, i + 1 : -1] = state[:, i + 2 :].clone()
                state[:, -1] = 0
            self._ends[i:-1] = self._ends[i + 1 :].clone()
            self._ends[-1:].fill_(_UNUSED)
            self._lengths[i : i + 2] = [pairs[i]]
        self._lengths.append(0)

    def _segments_of(self, page_ids: Tensor) -> Tensor:
        return torch.bucketize(page_ids, self._ends, right=True)
