"""Chooses the twin of each kernel: triton or torch's fused operators where they apply, the reference elsewhere."""

from torch import Tensor

from kvoffload_kernels.dense_attention import fused
from kvoffload_kernels.dense_attention import reference as dense
from kvoffload_kernels.gather import reference as gather


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
    if out.is_cuda:
        from kvoffload_kernels.gather import kernel  # triton is imported only where there is a GPU

        kernel.gather_slices(source, source_ids, out, out_ids, wanted)
    else:
        gather.gather_slices(source, source_ids, out, out_ids, wanted)
