"""Zero-copy gather: a Triton kernel that reads pinned host memory (or device memory) itself, with device-side ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024  # 8 KiB a block of eight-byte words: a slice of 16 tokens, D = 128, in bf16


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, source_ids, out, out_ids, wanted, n_slices, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for i in range(tl.program_id(0), n_slices, tl.num_programs(0)):
        end = tl.where(tl.load(wanted + i) != 0, words, 0)
        base_in = tl.load(source_ids + i).to(tl.int64) * words
        base_out = tl.load(out_ids + i).to(tl.int64) * words
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
    if out_ids is None:
        out_ids = torch.arange(source_ids.shape[0], device=source_ids.device)
    if wanted is None:
        wanted = torch.ones_like(source_ids, dtype=torch.bool)
    words = source.view(torch.int64)
    n = source_ids.numel()
    _copy[(min(n, n_programs),)](
        words, source_ids, out.view(torch.int64), out_ids, wanted.view(torch.uint8), n, words.shape[-1], BLOCK=_WORDS
    )
