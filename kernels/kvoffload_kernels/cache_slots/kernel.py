"""Least-recently-used slots in Triton: one program looks wanted pages up, bisects for how old slots must be to go, and
gives those to the misses. No sort, no atomics, no host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.cache_slots.reference import Hits, Table

_CHUNK = 1024  # wanted pages looked at together
_BLOCK = 4096  # slots looked at together; the first of them stay in registers
_NEVER = tl.constexpr(1 << 62)


@triton.jit
def _turns(owners, last_used, c, n_slots, time, shift):  # type: ignore[no-untyped-def]
    """When slots c must go, int64, all different: empty ones first, then by their last step and key; never those of
    this step."""
    used = tl.load(last_used + c, mask=c < n_slots, other=0)
    key = tl.load(owners + c, mask=c < n_slots, other=0)
    turn = tl.where(key < 0, (c - n_slots).to(tl.int64), (used << shift) + key)
    return tl.where((c < n_slots) & (used < time), turn, _NEVER)


@triton.jit
def _latest(turn):  # type: ignore[no-untyped-def]
    return tl.max(tl.where(turn < _NEVER, turn, -_NEVER), 0)


@triton.jit
def _take(turn, c, last, victims, n_before):  # type: ignore[no-untyped-def]
    """Note the slots c whose turn it is, behind ``n_before``; how many there are now."""
    gone = (turn <= last).to(tl.int32)
    tl.store(victims + n_before + tl.cumsum(gone, 0) - 1, c, mask=gone > 0)
    return n_before + tl.sum(gone, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _assign(  # type: ignore[no-untyped-def]
    wanted, owners, last_used, now, slot_of, slots, hits, misses, turns, victims, n_hits, spared, n, n_slots,
    slice_bytes, shift, CHUNK: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    time = tl.load(now) + 1
    n_hit, n_missed = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        keys = tl.load(wanted + i, mask=i < n, other=-1)
        slot = tl.load(slot_of + keys, mask=keys >= 0, other=0)
        hit = (keys >= 0) & (tl.load(owners + slot, mask=keys >= 0, other=-1) == keys)
        missed = (keys >= 0) & (hit == 0)
        tl.store(last_used + slot, tl.zeros([CHUNK], tl.int64) + time, mask=hit)
        tl.store(slots + i, tl.where(hit, slot, n_slots).to(tl.int64), mask=i < n)
        tl.store(hits + i, hit.to(tl.uint8), mask=i < n)
        tl.store(misses + i, missed.to(tl.uint8), mask=i < n)
        n_hit += tl.sum(hit.to(tl.int32), 0)
        n_missed += tl.sum(missed.to(tl.int32), 0)
    if n_missed > 0:
        tl.debug_barrier()  # what was hit is seen by all threads
        first = tl.arange(0, BLOCK)
        turn = _turns(owners, last_used, first, n_slots, time, shift)
        low, high = tl.min(turn, 0), _latest(turn)
        for start in range(BLOCK, n_slots, BLOCK):
            c = start + first
            more = _turns(owners, last_used, c, n_slots, time, shift)
            tl.store(turns + c, more, mask=c < n_slots)
            low, high = tl.minimum(low, tl.min(more, 0)), tl.maximum(high, _latest(more))
        tl.debug_barrier()
        while low < high:  # the turn up to which there are as many slots as misses
            middle = low + (high - low) // 2
            count = tl.sum((turn <= middle).to(tl.int32), 0)
            for start in range(BLOCK, n_slots, BLOCK):
                c = start + first
                count += tl.sum((tl.load(turns + c, mask=c < n_slots, other=_NEVER) <= middle).to(tl.int32), 0)
            low = tl.where(count < n_missed, middle + 1, tl.where(count == n_missed, middle, low))
            high = tl.where(count < n_missed, high, middle)
        taken = _take(turn, first, high, victims, 0)
        for start in range(BLOCK, n_slots, BLOCK):
            c = start + first
            taken = _take(tl.load(turns + c, mask=c < n_slots, other=_NEVER), c, high, victims, taken)
        tl.debug_barrier()
        before = tl.zeros([], tl.int32)
        for start in range(0, n, CHUNK):
            i = start + tl.arange(0, CHUNK)
            missed = tl.load(misses + i, mask=i < n, other=0).to(tl.int32)
            keys = tl.load(wanted + i, mask=missed > 0, other=0)
            slot = tl.load(victims + before + tl.cumsum(missed, 0) - 1, mask=missed > 0, other=0)
            tl.store(slots + i, slot.to(tl.int64), mask=missed > 0)
            tl.store(owners + slot, keys, mask=missed > 0)
            tl.store(last_used + slot, tl.zeros([CHUNK], tl.int64) + time, mask=missed > 0)
            tl.store(slot_of + keys, slot, mask=missed > 0)
            before += tl.sum(missed, 0)
    tl.debug_barrier()  # all threads have read the step
    tl.store(now, time)
    if COUNTED:
        tl.store(n_hits, tl.load(n_hits) + n_hit)
        tl.store(spared, tl.load(spared) + n_hit.to(tl.int64) * slice_bytes)


def assign_slots(wanted: Tensor, table: Table, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.assign_slots``, to the slot."""
    n, n_slots, device = wanted.shape[0], table.owners.shape[0], wanted.device
    slots = torch.empty_like(wanted, memory_format=torch.contiguous_format)
    hit, missed = (torch.empty(n, dtype=torch.bool, device=device) for _ in range(2))
    if n == 0:
        table.now.add_(1)
        return slots, hit, missed
    turns = torch.empty(n_slots, dtype=torch.int64, device=device)
    victims = torch.empty(n, dtype=torch.int32, device=device)
    counts = (table.now, table.now) if hits is None else hits[:2]
    block = min(_BLOCK, triton.next_power_of_2(n_slots))
    _assign[(1,)](
        wanted.contiguous(), table.owners, table.last_used, table.now, table.slot_of, slots, hit.view(torch.uint8),
        missed.view(torch.uint8), turns, victims, *counts, n, n_slots, 0 if hits is None else hits.slice_bytes,
        table.n_keys.bit_length(), CHUNK=min(_CHUNK, triton.next_power_of_2(n)), BLOCK=block,
        COUNTED=hits is not None, num_warps=16 if block > 2048 else 8,
    )  # fmt: skip
    return slots, hit, missed
