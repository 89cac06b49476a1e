"""Chooses the twin of each kernel: triton or torch's fused operators where they apply, the reference elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload_kernels.cache_slots import reference as cache_slots
from kvoffload_kernels.cache_slots.reference import Hits, Table
from kvoffload_kernels.completion import reference as completion
from kvoffload_kernels.completion.reference import SegmentSums, Slices, SliceSums, Tilt
from kvoffload_kernels.decode_step import reference as decode_step
from kvoffload_kernels.decode_step.reference import Parts
from kvoffload_kernels.dense_attention import fused
from kvoffload_kernels.dense_attention import reference as dense
from kvoffload_kernels.gather import reference as gather
from kvoffload_kernels.merge import reference as merge
from kvoffload_kernels.page_scores import reference as page_scores
from kvoffload_kernels.page_shares import reference as page_shares
from kvoffload_kernels.page_top import reference as page_top
from kvoffload_kernels.sparse_decode import reference as sparse_decode
from kvoffload_kernels.transform_code import reference as transform_code
from kvoffload_kernels.transform_code.reference import Levels

VERIFIED: frozenset[str] = frozenset(
    {
        "cache_slots",
        "completion",
        "decode_step",
        "gather",
        "merge",
        "page_scores",
        "page_shares",
        "page_top",
        "sparse_decode",
        "transform_code",
    }
)
"""Folders whose Triton kernels a GPU has shown to equal their references (by ``scripts/kernel-check``; the gather by
``scripts/gpu-check``). Only these are used, and only on CUDA; a folder is named here once its check has passed."""


def _verified(folder: str, tensor: Tensor) -> bool:
    return tensor.is_cuda and folder in VERIFIED


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool = False,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``dense_attention.reference.attend``, fused where no mask or soft cap stands in the way."""
    if fused.supported(query, keys, values, valid, softcap):
        return fused.attend(query, keys, values, scale=scale, causal=causal)
    return dense.attend(query, keys, values, scale=scale, causal=causal, valid=valid, softcap=softcap)


def gather_slices(
    source: Tensor, source_ids: Tensor, out: Tensor, out_ids: Tensor | None = None, wanted: Tensor | None = None
) -> None:
    """``gather.reference.gather_slices``; on a GPU the zero-copy kernel, which needs no host round trip."""
    if _verified("gather", out):
        from kvoffload_kernels.gather import kernel  # triton is imported only where there is a GPU

        kernel.gather_slices(source, source_ids, out, out_ids, wanted)
    else:
        gather.gather_slices(source, source_ids, out, out_ids, wanted)


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``sparse_decode.reference.attend_slices``."""
    if _verified("sparse_decode", query):
        from kvoffload_kernels.sparse_decode import kernel

        if kernel.supported(query, keys, values):
            return kernel.attend_slices(query, keys, values, row_ids, valid, softcap, places)
    return sparse_decode.attend_slices(query, keys, values, row_ids, valid, softcap, places)


def fuses_rows(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_rows`` is one kernel for these."""
    if not _verified("sparse_decode", query):
        return False
    from kvoffload_kernels.sparse_decode import kernel

    return _few_rows(query, keys, values) or kernel.supports_rows(query, keys, values)


def _few_rows(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether a program a row attends to these in one launch."""
    if not _verified("decode_step", query):
        return False
    from kvoffload_kernels.decode_step import kernel

    return kernel.begins(query, (keys, values))


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """``sparse_decode.reference.attend_rows``."""
    if _few_rows(query, keys, values):
        from kvoffload_kernels.decode_step import kernel as few

        return few.attend_rows(query, keys, values, seen, softcap)
    if fuses_rows(query, keys, values):
        from kvoffload_kernels.sparse_decode import kernel

        return kernel.attend_rows(query, keys, values, seen, softcap)
    return sparse_decode.attend_rows(query, keys, values, seen, softcap)


def fuses_quantized(query: Tensor, codes: Tensor, page_size: int) -> bool:
    """Whether the two functions below make no token's logit."""
    if not _verified("page_scores", query):
        return False
    from kvoffload_kernels.page_scores import kernel

    return kernel.supported(query, codes, page_size)


def score_quantized_pages(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    n_tokens: int,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """``page_scores.reference.score_pages``."""
    index = (query, codes, zero, step, bits)
    if fuses_quantized(query, codes, page_size):
        from kvoffload_kernels.page_scores import kernel

        return kernel.score_pages(*index, n_tokens=n_tokens, page_size=page_size, missing=missing, newest=newest)
    return page_scores.score_pages(*index, n_tokens=n_tokens, page_size=page_size, missing=missing, newest=newest)


def attend_quantized_index(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``page_scores.reference.attend_index``."""
    index = (query, codes, zero, step, bits)
    if fuses_quantized(query, codes, page_size):
        from kvoffload_kernels.page_scores import kernel

        return kernel.attend_index(*index, excluded=excluded, page_size=page_size, missing=missing, softcap=softcap)
    return page_scores.attend_index(*index, excluded=excluded, page_size=page_size, missing=missing, softcap=softcap)


def fuses_transform(query: Tensor, page_size: int) -> bool:
    """Whether the two functions below make no token's logit."""
    if not _verified("transform_code", query):
        return False
    from kvoffload_kernels.transform_code import kernel

    return kernel.supported(query, page_size)


def score_transform_pages(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """``transform_code.reference.score_pages``."""
    index = (query, codes, mean, synthesis, levels)
    if fuses_transform(query, page_size):
        from kvoffload_kernels.transform_code import kernel

        return kernel.score_pages(*index, page_size=page_size, missing=missing, newest=newest)
    return transform_code.score_pages(*index, page_size=page_size, missing=missing, newest=newest)


def decode_transform(codes: Tensor, levels: Levels) -> Tensor:
    """``transform_code.reference.decode``."""
    if _verified("transform_code", codes):
        from kvoffload_kernels.transform_code import kernel

        return kernel.decode(codes, levels)
    return transform_code.decode(codes, levels)


def attend_transform_index(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``transform_code.reference.attend_index``."""
    index = (query, codes, mean, synthesis, levels)
    if fuses_transform(query, page_size):
        from kvoffload_kernels.transform_code import kernel

        return kernel.attend_index(*index, excluded=excluded, page_size=page_size, missing=missing, softcap=softcap)
    return transform_code.attend_index(*index, excluded=excluded, page_size=page_size, missing=missing, softcap=softcap)


def estimate_rest(query: Tensor, segments: SegmentSums, slices: Slices) -> tuple[Tensor, Tensor]:
    """``completion.reference.estimate_rest``."""
    if _verified("completion", query):
        from kvoffload_kernels.completion import kernel

        return kernel.estimate_rest(query, segments, slices)
    return completion.estimate_rest(query, segments, slices)


def begin_step(
    query: Tensor, keys: Tensor, values: Tensor, anchors: tuple[Tensor, Tensor], place: Tensor, out: Tensor,
    *, seen: Tensor, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``decode_step.reference.begin``."""
    if _verified("decode_step", query):
        from kvoffload_kernels.decode_step import kernel

        if kernel.begins(query, anchors):
            return kernel.begin(query, keys, values, anchors, place, out, seen=seen, scale=scale, softcap=softcap)
    decode_step.put(query, keys, values, anchors, place, out, scale)
    return attend_rows(out, *anchors, seen, softcap)


def reads_in_place(places: Tensor, heads: int, keys: Tensor, values: Tensor, *, by_row: bool) -> bool:
    """Whether ``attend_slices_in_parts`` for ``heads`` queries a row takes the slices at these places from where they
    are, be it pinned host memory, and each only once."""
    if not places.is_cuda:
        return True
    if not by_row or not _verified("decode_step", places):
        return False
    from kvoffload_kernels.decode_step import slices

    return slices.takes_slices(heads, keys, values, places.shape[0])


def attend_slices_in_parts(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None, tilt: Tilt | None = None, *, by_row: bool = False,
) -> tuple[Parts, SliceSums | None]:  # fmt: skip
    """``decode_step.reference.attend_slices`` in as many parts as were made apart; sums may be left out where there are
    many slices, or row ids that are not said to ascend (``by_row``)."""
    given = query, keys, values, row_ids, valid, softcap, places
    if _verified("decode_step", query):
        from kvoffload_kernels.decode_step import slices

        if by_row and slices.takes_slices(query.shape[1], keys, values, row_ids.shape[0]):
            return slices.attend_slices(*given, tilt)
        return decode_step.one_part(attend_slices(*given)), None
    return decode_step.attend_slices(*given, tilt)


def rest_of_segments(query: Tensor, segments: SegmentSums, slices: Slices) -> Parts:
    """``decode_step.reference.rest_of_segments``, or all segments in one part."""
    if slices.sums is not None and _verified("decode_step", query):
        from kvoffload_kernels.decode_step import slices as kernel

        return kernel.rest_of_segments(query, segments, slices)
    return decode_step.one_part(estimate_rest(query, segments, slices))


def finish_step(
    anchors: tuple[Tensor, Tensor], slices: Parts, rest: Parts | None, masses: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``decode_step.reference.finish``."""
    if _verified("decode_step", masses):
        from kvoffload_kernels.decode_step import kernel

        if all(tensor.is_contiguous() for tensor in (*anchors, *slices, *(rest or ()))):
            return kernel.finish(anchors, slices, rest, masses, dtype)
    return decode_step.finish(anchors, slices, rest, masses, dtype, merge_parts=merge_parts)


def merge_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``merge.reference.merge_parts``."""
    if _verified("merge", outputs[0]):
        from kvoffload_kernels.merge import kernel

        if kernel.supported(outputs, lses):
            return kernel.merge_parts(outputs, lses)
    return merge.merge_parts(outputs, lses)


def share_pages(scores: Tensor, anchor_lse: Tensor) -> Tensor:
    """``page_shares.reference.share_pages``."""
    if _verified("page_shares", scores):
        from kvoffload_kernels.page_shares import kernel

        if kernel.supported(scores):
            return kernel.share_pages(scores, anchor_lse)
    return page_shares.share_pages(scores, anchor_lse)


def fuses_top_pages(scores: Tensor, n_slices: int) -> bool:
    """Whether ``top_pages`` is a few kernels for these. There is no other twin of it in steps: elsewhere Top-K is
    exact, without steps of shares."""
    if not _verified("page_top", scores):
        return False
    from kvoffload_kernels.page_top import kernel

    return kernel.supported(scores, n_slices)


def top_pages(
    scores: Tensor, anchor_lse: Tensor, n_heads: int, n_slices: int, n_wanted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``page_top.reference.top_pages``."""
    if fuses_top_pages(scores, n_slices):
        from kvoffload_kernels.page_top import kernel

        return kernel.top_pages(scores, anchor_lse, n_heads, n_slices, n_wanted)
    return page_top.top_pages(scores, anchor_lse, n_heads, n_slices, n_wanted)


def assign_slots(wanted: Tensor, table: Table, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``cache_slots.reference.assign_slots``."""
    if _verified("cache_slots", wanted):
        from kvoffload_kernels.cache_slots import kernel

        return kernel.assign_slots(wanted, table, hits)
    return cache_slots.assign_slots(wanted, table, hits)
