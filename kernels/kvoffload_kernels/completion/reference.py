"""Tilted sums of pages, and their removal from a fixed-size summary (kernels/README.md, "Completion")."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvoffload_kernels.dense_attention.reference import weigh

EMPTY = 1e-6
"""Below this share of a segment's mass what is left is rounding (fp32 sums: 1e-7 per term)."""


@dataclass(frozen=True)
class SegmentSums:
    """Tilted sums of M segments a row: anchor fp32 [rows, D], the log scale of the weights fp32 [rows] (finite), masses
    and token counts fp32 [rows, M], sums of keys and values [rows, M, D + Dv], the page after each segment int64 [M]
    (ascending), and the share ``rounding`` of the mass below which sums of their precision say nothing of what is
    left."""

    anchor: Tensor
    shift: Tensor
    mass: Tensor
    counts: Tensor
    sums: Tensor
    ends: Tensor
    rounding: float = 0.0

    def of_pages(self, page_ids: Tensor) -> Tensor:
        """The segment of each page."""
        return torch.bucketize(page_ids, self.ends, right=True)


class Tilt(NamedTuple):
    """What tokens are weighed by, w = e^(q0 . k - c): the anchor q0 fp32 [rows, D] and its log scale c fp32 [rows]."""

    anchor: Tensor
    shift: Tensor


class SliceSums(NamedTuple):
    """Tilted sums of slices, fp32: of w and of tokens [F, 2], and of w k and w v beside each other [F, D + Dv]."""

    masses: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Slices:
    """Fetched slices: keys [F, S, D], values [F, S, Dv], valid bool [F, S] or None, and the query row and the page
    of each, int64 [F]. With ``places`` int64 [F] they are those among keys [C, S, D] and values [C, S, Dv]; with
    ``sums`` those under the segments' tilt, and nothing else of them need be read."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    row_ids: Tensor
    page_ids: Tensor
    places: Tensor | None = None
    sums: SliceSums | None = None

    def side_by_side(self) -> "Slices":
        """Without places: copies where there are any."""
        if self.places is None:
            return self
        keys, values = (t.index_select(0, self.places) for t in (self.keys, self.values))
        return Slices(keys, values, self.valid, self.row_ids, self.page_ids)


def tilted_sums(keys: Tensor, values: Tensor, log_weight: Tensor) -> Tensor:
    """Sums over the tokens of a page of w, w k and w v with w = exp(log_weight): keys [..., S, D], values [..., S,
    Dv] and log_weight fp32 [..., S] (-inf leaves a token out) to fp32 [..., 1 + D + Dv]."""
    weight = log_weight.exp()[..., None, :]
    return torch.cat([weight.sum(-1), (weight @ keys.float())[..., 0, :], (weight @ values.float())[..., 0, :]], dim=-1)


def remove_slices(state: Tensor, sums: Tensor, row_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """A copy of state [rows, M, C] with sums [F, C] subtracted at (row_ids, segment_ids), int64 [F] each; fp32."""
    n_segments = state.shape[1]
    return state.flatten(0, 1).index_add(0, row_ids * n_segments + segment_ids, sums, alpha=-1).view_as(state)


def what_is_left(n_queries: int, segments: SegmentSums, slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of each segment behind the slices of each of a row's Q queries: log mass under the anchor fp32
    [rows * Q, M] (-inf where nothing is), token counts [rows * Q, M], and weighted mean keys and values beside each
    other [rows * Q, M, D + Dv]. The sums may leave out keys: then D is 0."""
    anchor, shift, mass, counts, sums = (
        t if n_queries == 1 else t.repeat_interleave(n_queries, 0)
        for t in (segments.anchor, segments.shift, segments.mass, segments.counts, segments.sums.float())
    )
    state = torch.cat([mass[..., None], sums, counts[..., None]], -1)
    taken = slices.sums or slice_sums(Tilt(anchor, shift), slices, sums.shape[-1] - slices.values.shape[-1])
    gone = torch.cat([taken.masses[:, :1], taken.sums, taken.masses[:, 1:]], -1)
    left_over = remove_slices(state, gone, slices.row_ids, segments.of_pages(slices.page_ids))
    left_mass, n_left = left_over[..., 0], left_over[..., -1]
    left = (n_left > 0.5) & (left_mass > EMPTY * mass)
    known = (left & (left_mass > segments.rounding * mass))[..., None]
    means = left_over[..., 1:-1] / torch.where(left, left_mass, 1.0)[..., None]
    means = torch.where(known, means, sums / torch.where(mass > 0, mass, 1.0)[..., None])
    log_mass = (torch.where(left, left_mass, 1.0).log() + shift[:, None]).masked_fill(~left, -torch.inf)
    return log_mass, n_left, means


def estimate_rest(query: Tensor, segments: SegmentSums, slices: Slices) -> tuple[Tensor, Tensor]:
    """Attention to what is left of the segments behind the fetched slices, to first order around the anchor.

    query fp32 [rows * Q, R, D] (scaled; the Q queries of row g follow each other) to fp32 ([rows * Q, R, Dv], [rows *
    Q, R]). A segment without a token, or with less than ``EMPTY`` of its mass, is empty; nothing left is (0, -inf).
    """
    n_queries, key_dim = query.shape[0] // segments.anchor.shape[0], query.shape[-1]
    log_mass, _, means = what_is_left(n_queries, segments, slices)
    anchor = segments.anchor if n_queries == 1 else segments.anchor.repeat_interleave(n_queries, 0)
    logits = (query - anchor[:, None]) @ means[..., :key_dim].mT + log_mass[:, None]
    return weigh(logits, means[..., key_dim:])


def slice_sums(tilt: Tilt, slices: Slices, key_dim: int) -> SliceSums:
    """What each slice put into its segment, if that keeps ``key_dim`` channels of the keys (D or 0)."""
    slices = slices.side_by_side()
    rows = slices.row_ids
    log_valid = torch.zeros(slices.keys.shape[:2], device=rows.device)
    if slices.valid is not None:
        log_valid = log_valid.masked_fill(~slices.valid, -torch.inf)
    logits = torch.einsum("fd,fsd->fs", tilt.anchor[rows], slices.keys.float()) + log_valid
    sums = tilted_sums(slices.keys[..., :key_dim], slices.values, logits - tilt.shift[rows][:, None])
    return SliceSums(torch.stack([sums[:, 0], log_valid.exp().sum(-1)], -1), sums[:, 1:].contiguous())
