"""Least-recently-used slots in Triton: one launch looks the wanted pages up, one ranks the slots by age, one gives the
misses their slots. No sort, no host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.cache_slots.reference import Hits

_WANTED, _SLOTS, _AGES = 8, 512, 8  # pages and slots compared at a time; slots that one program ranks
_CHUNK = 1024  # wanted pages placed at a time


@triton.jit  # type: ignore[untyped-decorator]
def _find(wanted, owners, last_used, now, found, n, n_slots, PAGES: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    keys = tl.load(wanted + i, mask=i < n, other=-1)
    slot = tl.full([PAGES], -1, tl.int32)
    for start in range(0, n_slots, SLOTS):
        c = start + tl.arange(0, SLOTS)
        same = tl.load(owners + c, mask=c < n_slots, other=-1)[None, :] == keys[:, None]
        same = same & (keys >= 0)[:, None]
        slot = tl.maximum(slot, tl.max(tl.where(same, c[None, :], -1), 1))
    tl.store(found + i, slot, mask=i < n)
    tl.store(last_used + slot, tl.zeros([PAGES], tl.int64) + tl.load(now) + 1, mask=(i < n) & (slot >= 0))


@triton.jit  # type: ignore[untyped-decorator]
def _rank(owners, last_used, order, n_slots, AGES: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * AGES + tl.arange(0, AGES)
    age = tl.load(last_used + i, mask=i < n_slots, other=0)[:, None]
    key = tl.load(owners + i, mask=i < n_slots, other=0)[:, None]
    rank = tl.zeros([AGES], tl.int32)
    for start in range(0, n_slots, SLOTS):
        c = start + tl.arange(0, SLOTS)
        other_age = tl.load(last_used + c, mask=c < n_slots, other=0)[None, :]
        other = tl.load(owners + c, mask=c < n_slots, other=0)[None, :]
        smaller = (other < key) | ((other == key) & (c[None, :] < i[:, None]))  # empty slots have one key
        before = (other_age < age) | ((other_age == age) & smaller)
        rank += tl.sum((before & (c < n_slots)[None, :]).to(tl.int32), 1)
    tl.store(order + rank, i, mask=i < n_slots)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    wanted, owners, last_used, now, found, order, slots, hits, misses, n_hits, spared, n, n_slots, slice_bytes,
    CHUNK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    n_missed, n_hit = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
    time = tl.load(now) + 1
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        keys = tl.load(wanted + i, mask=i < n, other=-1)
        real = keys >= 0
        slot = tl.load(found + i, mask=real, other=0)
        missed = slot < 0
        number = n_missed + tl.cumsum(missed.to(tl.int32), 0) - 1
        slot = tl.where(missed, tl.load(order + number, mask=missed, other=0), slot).to(tl.int64)
        tl.store(slots + i, tl.where(real, slot, n_slots), mask=i < n)
        hit = tl.where(real & (missed == 0), 1, 0)
        tl.store(hits + i, hit.to(tl.uint8), mask=i < n)
        tl.store(misses + i, missed.to(tl.uint8), mask=i < n)
        tl.store(owners + slot, keys, mask=real)
        tl.store(last_used + slot, tl.zeros([CHUNK], tl.int64) + time, mask=real)
        n_missed += tl.sum(missed.to(tl.int32), 0)
        n_hit += tl.sum(hit, 0)
    tl.store(now, time)
    if COUNTED:
        tl.store(n_hits, tl.load(n_hits) + n_hit)
        tl.store(spared, tl.load(spared) + n_hit * slice_bytes)


def assign_slots(
    wanted: Tensor, owners: Tensor, last_used: Tensor, now: Tensor, hits: Hits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.assign_slots``, to the slot."""
    n, n_slots = wanted.shape[0], owners.shape[0]
    slots = torch.empty_like(wanted)
    found_there, missed = (torch.empty(n, dtype=torch.bool, device=wanted.device) for _ in range(2))
    if n == 0:
        now += 1
    else:
        wanted = wanted.contiguous()
        found, order = (torch.empty(size, dtype=torch.int32, device=wanted.device) for size in (n, n_slots))
        _find[(triton.cdiv(n, _WANTED),)](
            wanted, owners, last_used, now, found, n, n_slots, PAGES=_WANTED, SLOTS=_SLOTS
        )
        _rank[(triton.cdiv(n_slots, _AGES),)](owners, last_used, order, n_slots, AGES=_AGES, SLOTS=_SLOTS)
        bits = found_there.view(torch.uint8), missed.view(torch.uint8)
        _place[(1,)](
            wanted, owners, last_used, now, found, order, slots, *bits, *(hits or (now, now, 0))[:2], n, n_slots,
            0 if hits is None else hits.slice_bytes, CHUNK=_CHUNK, COUNTED=hits is not None,
        )  # fmt: skip
    return slots, found_there, missed
