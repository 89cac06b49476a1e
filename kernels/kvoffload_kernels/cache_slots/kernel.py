"""Least-recently-used slots in Triton: one launch looks the wanted pages up, one ranks the slots by age, one gives the
misses their slots. No sort, no host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WANTED, _SLOTS, _AGES = 32, 128, 32  # pages and slots compared at a time; slots that one program ranks
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
    tl.store(last_used + slot, tl.zeros([PAGES], tl.int64) + tl.load(now), mask=(i < n) & (slot >= 0))


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
    wanted, owners, last_used, now, found, order, slots, hits, n, n_slots, CHUNK: tl.constexpr
):
    n_missed = tl.zeros([], tl.int32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        keys = tl.load(wanted + i, mask=i < n, other=-1)
        real = keys >= 0
        slot = tl.load(found + i, mask=real, other=0)
        missed = slot < 0
        number = n_missed + tl.cumsum(missed.to(tl.int32), 0) - 1
        slot = tl.where(missed, tl.load(order + number, mask=missed, other=0), slot).to(tl.int64)
        tl.store(slots + i, tl.where(real, slot, n_slots), mask=i < n)
        tl.store(hits + i, tl.where(real & (missed == 0), 1, 0).to(tl.uint8), mask=i < n)
        tl.store(owners + slot, keys, mask=real)
        tl.store(last_used + slot, tl.zeros([CHUNK], tl.int64) + tl.load(now), mask=real)
        n_missed += tl.sum(missed.to(tl.int32), 0)


def assign_slots(wanted: Tensor, owners: Tensor, last_used: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.assign_slots``, to the slot."""
    n, n_slots = wanted.shape[0], owners.shape[0]
    slots, hits = torch.empty_like(wanted), torch.empty(n, dtype=torch.uint8, device=wanted.device)
    if n > 0:
        wanted = wanted.contiguous()
        found, order = (torch.empty(size, dtype=torch.int32, device=wanted.device) for size in (n, n_slots))
        _find[(triton.cdiv(n, _WANTED),)](
            wanted, owners, last_used, now, found, n, n_slots, PAGES=_WANTED, SLOTS=_SLOTS
        )
        _rank[(triton.cdiv(n_slots, _AGES),)](owners, last_used, order, n_slots, AGES=_AGES, SLOTS=_SLOTS)
        _place[(1,)](wanted, owners, last_used, now, found, order, slots, hits, n, n_slots, CHUNK=_CHUNK)
    return slots, hits.view(torch.bool)
