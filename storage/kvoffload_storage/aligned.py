"""Host memory that direct I/O accepts: buffers that start at a multiple of 4096 bytes."""

import ctypes
import functools
import mmap
import resource

import torch
from torch import Tensor

from .errors import CapacityError

BLOCK_BYTES = 4096
HUGE_BYTES = 2 << 20


def round_up(n_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """The smallest multiple of ``block_bytes`` that is not below ``n_bytes``."""
    return -(-n_bytes // block_bytes) * block_bytes


def round_down(n_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """The largest multiple of ``block_bytes`` that is not above ``n_bytes``."""
    return n_bytes // block_bytes * block_bytes


def host_empty(n_bytes: int, *, pinned: bool = False) -> Tensor:
    """Uninitialised uint8 [n_bytes] in host memory; CapacityError when the machine refuses it."""
    try:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        raise CapacityError(_refusal(n_bytes, pinned, error)) from error


def aligned_empty(n_bytes: int, *, pinned: bool = False) -> Tensor:
    """Uninitialised uint8 [n_bytes] whose first byte lies at a multiple of 4096.

    Pageable memory owns one block more than it shows. From 2 MiB on it begins at a multiple of that, owns so many
    addresses more, and asks for huge pages: what direct I/O reads into them is one piece for the disk, and not one for
    every 4 KiB. Pinned memory comes aligned as a rule, and torch rounds it up to a power of two, so that one block more
    could cost as much again: it is asked for only where it is needed.
    """
    if pinned:
        exact = host_empty(n_bytes, pinned=True)
        if is_aligned(exact):
            return exact
    unit = HUGE_BYTES if n_bytes >= HUGE_BYTES and not pinned else BLOCK_BYTES
    whole = host_empty(n_bytes + unit, pinned=pinned)
    start = -whole.data_ptr() % unit
    memory = whole[start : start + n_bytes]
    if unit == HUGE_BYTES:
        _ask_for_huge_pages(memory)
    return memory


def is_aligned(tensor: Tensor) -> bool:
    """Whether the tensor's first byte lies at a multiple of 4096."""
    return tensor.data_ptr() % BLOCK_BYTES == 0


def _ask_for_huge_pages(memory: Tensor) -> None:
    """Before it is first written; a system that has none leaves the memory as it is."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        place = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
        _libc().madvise(*place, mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _refusal(n_bytes: int, pinned: bool, error: RuntimeError) -> str:
    reason = str(error).strip().splitlines()[0]
    if not pinned:
        return f"no host memory for {n_bytes:,} bytes: {reason}"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} bytes"
    return f"cannot pin {n_bytes:,} bytes of host memory (RLIMIT_MEMLOCK, see `ulimit -l`: {limit}): {reason}"
