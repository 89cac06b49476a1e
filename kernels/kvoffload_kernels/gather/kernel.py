"""Zero-copy gather: a Triton kernel that reads pinned host memory (or device memory) itself, with device-side ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024  # 8 KiB a block of eight-byte words: a slice of 16 tokens, D = 128, in bf16


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    source, source_ids, out, out_ids, wanted, n_slices, words, BLOCK: tl.constexpr, PLACED: tl.constexpr,
    CHOSEN: tl.constexpr,
):  # fmt: skip
    for i in range(tl.program_id(0), n_slices, tl.num_programs(0)):
        end, place = words, i
        if CHOSEN:
            end = tl.where(tl.load(wanted + i) != 0, words, 0)
        if PLACED:
            place = tl.load(out_ids + i)
        base_in = tl.load(source_ids + i).to(tl.int64) * words
        base_out = tl.cast(place, tl.int64) * words
        for start in range(0, words, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            mask = offset < end
            tl.store(out + base_out + offset, tl.load(source + base_in + offset, mask=mask), mask=mask)


def gather_slices(
    source: Tensor,
    source_ids: Tensor,
    out: Tensor,
    out_ids: Tensor | None = None,
    wanted: Tensor | None = None,
    n_programs: int = 64,
) -> None:
    """As ``reference.gather_slices``; slices must be whole eight-byte words. ``source`` may be pinned host memory.

    Few programs suffice to fill PCIe and leave the other multiprocessors to the weights.
    """
    if source_ids.numel() == 0:
        return
    words = source.view(torch.int64)
    n = source_ids.numel()
    _copy[(min(n, n_programs),)](
        words, source_ids, out.view(torch.int64), source_ids if out_ids is None else out_ids,
        source_ids if wanted is None else wanted.view(torch.uint8), n, words.shape[-1], BLOCK=_WORDS,
        PLACED=out_ids is not None, CHOSEN=wanted is not None,
    )  # fmt: skip
