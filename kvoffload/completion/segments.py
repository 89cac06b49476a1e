"""A fixed number of contiguous segments of tilted sums per row, from which fetched slices are taken out exactly
(kernels/README.md, "Completion").

A segment keeps the sums over its tokens of w, w k and w v with w = e^(q0 . k - c), q0 the prefill's mean query and c
a row's largest exponent so far.
"""

import math
from dataclasses import dataclass

import torch
from kvoffload_kernels.completion.reference import SegmentSums, Slices, tilted_sums, what_is_left
from torch import Tensor

from kvoffload.buffers import Room, tensor_bytes
from kvoffload.geometry import Geometry
from kvoffload.rows import Rowwise
from kvoffload.values import Fetched, Pages

_UNUSED = torch.iinfo(torch.int64).max
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-6}  # below this share rounded sums say nothing of what is left
_LN2 = math.log(2.0)


@dataclass(frozen=True)
class Remainders:
    """What is left of each segment: log mass fp32 [rows * Q, M] under the anchor (-inf where nothing is), whether any
    token is left, and weighted mean values, [rows * Q, M, Dv]."""

    log_mass: Tensor
    has_tokens: Tensor
    values: Tensor


class Segments(Rowwise):
    """A prefill's pages are shared out evenly. While generating, the newest segment takes pages until it is as long
    as those; then the two neighbours with the fewest pages merge (sums just add) to make room for the next one.

    Masses and token counts are fp32, the sums of keys and values ``dtype``. The newest segment is summed in fp32 and
    rounded once; with a 16-bit ``dtype`` the scale c only takes powers of two, so that a new one rounds nothing.
    Without ``keep_keys`` D is 0.
    """

    row_state = ("anchor", "_mass", "_counts", "_sums", "_newest", "_log_scale", "_shift", "_ends")

    def __init__(
        self,
        n_segments: int,
        geometry: Geometry,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        keep_keys: bool = True,
    ) -> None:
        self._n_segments, self._rows, self._device, self._dtype = n_segments, geometry.rows, device, dtype
        self._sizes = [geometry.key_dim if keep_keys else 0, geometry.value_dim]
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        """Forget every page; ``anchor`` fp32 [rows, D] is scaled, ``n_pages`` how many come now."""
        self.anchor = anchor
        per_segment = (self._rows, self._n_segments)
        self._mass, self._counts = (torch.zeros(per_segment, device=self._device) for _ in range(2))
        self._sums = torch.zeros(*per_segment, sum(self._sizes), dtype=self._dtype, device=self._device)
        self._newest = torch.zeros(self._rows, sum(self._sizes), device=self._device)
        self._log_scale = torch.full((self._rows,), -torch.inf, device=self._device)
        self._shift = torch.zeros(self._rows, device=self._device)  # the same, 0 while nothing is there
        self._segment_pages = max(-(-n_pages // self._n_segments), 1)
        self._lengths = [0]  # pages of each segment in use
        self._last = torch.zeros(1, dtype=torch.int64, device=self._device)  # the newest of them
        self._room: Room | None = None
        self._ends = torch.full((self._n_segments,), _UNUSED, device=self._device)  # the page after each segment

    def absorb(self, pages: Pages) -> None:
        done = 0
        while done < pages.n_pages:
            done += self._absorb_into_last(pages, done)

    @property
    def host_state(self) -> object:
        return self._segment_pages, tuple(self._lengths)

    def hold(self, room: Room | None) -> None:
        self._room = room

    def note(self) -> None:
        """The host's part of an ``absorb`` of one page while held: a segment that has room for it."""
        if self._lengths[-1] >= self._segment_pages:
            self._open_segment()
        self._lengths[-1] += 1

    def put(self, page: Pages) -> None:
        """The device's part."""
        assert self._room is not None, "a page is put while held"
        self._add(page)
        ends = self._ends.view(-1, self._n_segments)
        ends.index_copy_(1, self._last, (self._room.newest + 1).expand(len(ends), 1))

    def without(self, fetched: Fetched, query: Tensor) -> Remainders:
        """The segments without the fetched slices, for queries [rows * Q, R, D]."""
        log_mass, n_left, means = what_is_left(query.shape[0] // self._rows, self.sums(), self.slices(fetched))
        return Remainders(log_mass, n_left > 0.5, means[..., self._sizes[0] :])

    def sums(self) -> SegmentSums:
        """The segments as kernels take them; views."""
        rounding = _ROUNDING[self._dtype]
        return SegmentSums(self.anchor, self._shift, self._mass, self._counts, self._sums, self._ends, rounding)

    def slices(self, fetched: Fetched) -> Slices:
        """Fetched slices as kernels take them."""
        slices = fetched.all_keys, fetched.all_values, fetched.valid
        return Slices(*slices, fetched.row_ids, fetched.page_ids, fetched.places, fetched.sums)

    def of_pages(self, page_ids: Tensor) -> Tensor:
        """The segment of each page."""
        return self.sums().of_pages(page_ids)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._sums, self._mass, self._counts)

    @property
    def resident_bytes(self) -> int:
        return self.state_bytes + tensor_bytes(self._newest)

    def _tilted(self, keys: Tensor, values: Tensor, log_weight: Tensor) -> Tensor:
        return tilted_sums(keys[..., : self._sizes[0]], values, log_weight)

    def _rescale(self, logits: Tensor) -> None:
        """Express the sums relative to the largest exponent, these [rows, n] counted in."""
        largest = logits.amax(1)
        if self._dtype != torch.float32:
            largest = (largest / _LN2).ceil() * _LN2
        log_scale = torch.maximum(self._log_scale, largest)
        self._shift.copy_(log_scale.masked_fill(log_scale.isneginf(), 0.0))
        factor = (self._log_scale - self._shift).exp()
        self._mass *= factor[:, None]
        self._sums *= factor[:, None, None]
        self._newest *= factor[:, None]
        self._log_scale.copy_(log_scale)

    def _absorb_into_last(self, pages: Pages, start: int) -> int:
        """Add pages from ``start`` on to the newest segment while it has room; returns how many."""
        if self._lengths[-1] >= self._segment_pages:
            self._open_segment()
        taken = pages.run(start, min(start + self._segment_pages - self._lengths[-1], pages.n_pages))
        self._add(taken)
        self._lengths[-1] += taken.n_pages
        self._ends.index_fill_(0, self._last, sum(self._lengths))
        return taken.n_pages

    def _add(self, pages: Pages) -> None:
        """Add pages to the newest segment."""
        keys, values = pages.keys.flatten(1, 2), pages.values.flatten(1, 2)
        logits = pages.masked((keys.float() @ self.anchor[..., None])[..., 0])
        self._rescale(logits)
        sums = self._tilted(keys, values, logits - self._shift[:, None])
        self._mass.index_add_(1, self._last, sums[:, :1])
        self._newest += sums[:, 1:]
        self._sums.index_copy_(1, self._last, self._newest[:, None].to(self._dtype))
        self._counts.index_add_(1, self._last, pages.counts().sum(-1, keepdim=True))

    def _open_segment(self) -> None:
        if len(self._lengths) == self._n_segments:
            self._merge_neighbours()
        self._lengths.append(0)
        self._last.fill_(len(self._lengths) - 1)
        self._newest.zero_()

    def _merge_neighbours(self) -> None:
        """The two neighbours with the fewest pages become one; the last place is free then."""
        pairs = [a + b for a, b in zip(self._lengths, self._lengths[1:], strict=False)]
        i = pairs.index(min(pairs))
        for state in (self._mass, self._sums, self._counts):
            state[:, i] += state[:, i + 1]
            state[:, i + 1 : -1] = state[:, i + 2 :].clone()
            state[:, -1] = 0
        self._ends[i:-1] = self._ends[i + 1 :].clone()
        self._ends[-1:].fill_(_UNUSED)
        self._lengths[i : i + 2] = [pairs[i]]
