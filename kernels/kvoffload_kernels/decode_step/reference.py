"""The parts of a decode step of fixed shapes that are one launch each: its beginning, its slices, what is left of
segments, and its end (kernels/README.md, "Steps in few launches")."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvoffload_kernels.completion.reference import SegmentSums, Slices, SliceSums, Tilt, slice_sums, what_is_left
from kvoffload_kernels.merge import reference as merge
from kvoffload_kernels.sparse_decode import reference as sparse_decode
from kvoffload_kernels.sparse_decode.reference import attend_rows

Parts = tuple[Tensor, Tensor]
"""Partials of n disjoint key sets side by side: outputs fp32 [rows, n, R, Dv] ([rows, n, 1, Dv] where all heads have
the same) and log-sum-exps fp32 [rows, n, R]."""

MergeParts = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


def put(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    anchors: tuple[Tensor, Tensor],
    place: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """Write the newest token, keys [rows, 1, D] and values [rows, 1, Dv], to its place int64 [1] in the anchors'
    buffers [rows, A, D] and [rows, A, Dv], and the query [rows, R, D] times ``scale`` to ``out`` fp32."""
    anchors[0].index_copy_(1, place, keys)
    anchors[1].index_copy_(1, place, values)
    torch.mul(query.float(), scale, out=out)


def begin(
    query: Tensor, keys: Tensor, values: Tensor, anchors: tuple[Tensor, Tensor], place: Tensor, out: Tensor,
    *, seen: Tensor, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``put``, then attention to the anchors that ``seen`` bool [rows or 1, A] names: fp32 ([rows, R, Dv], [rows,
    R])."""
    put(query, keys, values, anchors, place, out, scale)
    return attend_rows(out, *anchors, seen, softcap)


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None, tilt: Tilt | None = None,
) -> tuple[Parts, SliceSums | None]:  # fmt: skip
    """``sparse_decode.reference.attend_slices`` in parts, and with ``tilt`` the slices' sums under it."""
    slices = Slices(keys, values, valid, row_ids, row_ids, places).side_by_side()
    parts = one_part(sparse_decode.attend_slices(query, slices.keys, slices.values, row_ids, valid, softcap))
    return parts, None if tilt is None else slice_sums(tilt, slices, keys.shape[-1])


def rest_of_segments(query: Tensor, segments: SegmentSums, slices: Slices) -> Parts:
    """``completion.reference.estimate_rest`` of one query a row, a partial for each segment: ([rows, M, 1, Dv], [rows,
    M, R]); a segment without anything left is -inf, its output anything finite."""
    log_mass, _, means = what_is_left(1, segments, slices)
    dim = query.shape[-1]
    logits = (query - segments.anchor[:, None]) @ means[..., :dim].mT + log_mass[:, None]
    return means[:, :, None, dim:], logits.mT


def finish(
    anchors: tuple[Tensor, Tensor], slices: Parts, rest: Parts | None, masses: Tensor, dtype: torch.dtype,
    *, merge_parts: MergeParts = merge.merge_parts,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The partial of anchors ([rows, R, Dv], [rows, R]), slices and what stands for the rest of the keys, and the
    rest's share of the mass added to ``masses`` fp32 [rows, R]; the output is ``dtype``."""
    output, lse = merge_parts(*zip(anchors, joined(slices), strict=True))
    if rest is not None:
        guess, rest_lse = joined(rest)
        output, lse = merge_parts([output, guess], [lse, rest_lse])
        masses.add_((rest_lse - lse).exp())
    return output.to(dtype), lse


def one_part(partial: tuple[Tensor, Tensor]) -> Parts:
    """A partial ([rows, R, Dv], [rows, R]) as the only one."""
    return partial[0][:, None], partial[1][:, None]


def joined(parts: Parts) -> tuple[Tensor, Tensor]:
    """All of them in one: ([rows, R, Dv], [rows, R])."""
    outputs, lses = parts
    if lses.shape[1] == 1 and outputs.shape[2] == lses.shape[2]:
        return outputs[:, 0], lses[:, 0]
    return merge.merge_splits(outputs.expand(*lses.shape, -1), lses)
