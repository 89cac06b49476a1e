"""Least-recently-used slots of a device page cache, in fixed-shape tensor operations without a host round trip."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor


class Hits(NamedTuple):
    """What hits are added to, int64 []: their number and their bytes, ``slice_bytes`` each."""

    number: Tensor
    spared: Tensor
    slice_bytes: int


class Table(NamedTuple):
    """Who has which of C slots: the page key of each (owners int64 [C], -1 empty), the step it was last used in
    (last_used int64 [C]), the number of the step before (now int64 []), and where each of N keys was last put (slot_of
    int32 [N + 1], the last one for no key), which says nothing where another key owns that slot now."""

    owners: Tensor
    last_used: Tensor
    now: Tensor
    slot_of: Tensor

    @staticmethod
    def empty(n_slots: int, n_keys: int, device: torch.device) -> "Table":
        last_used, now = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((n_slots,), ()))
        slot_of = torch.zeros(n_keys + 1, dtype=torch.int32, device=device)
        return Table(torch.full_like(last_used, -1), last_used, now, slot_of)

    @property
    def n_keys(self) -> int:
        return self.slot_of.shape[0] - 1


def assign_slots(wanted: Tensor, table: Table, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Give each wanted page key a slot: int64 wanted [F], distinct and below N.

    Returns (slots int64 [F], hit bool [F], missed bool [F]) and updates the table in place, whose step is counted up.
    Misses take the slots that were used longest ago, of several that of the smallest key, so that the order of what is
    wanted does not matter to what stays; the first miss takes the first of these slots. A slot hit now is never taken,
    which needs C >= F. A key of -1 wants nothing: its slot is C, and it changes nothing.
    """
    owners, last_used, now, slot_of = table
    now += 1
    n_slots, real = owners.shape[0], wanted >= 0
    found = slot_of[wanted].clamp_max(n_slots - 1).long()
    hit = real & (owners[found] == wanted)
    missed = real & ~hit
    usage = last_used.scatter_reduce(0, found, torch.where(hit, now, 0).expand_as(found), "amax")
    order = owners.argsort(stable=True)
    order = order[usage[order].argsort(stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n_slots, device=order.device))
    victims = (rank >= missed.sum()).to(torch.uint8).argsort(stable=True)
    slots = torch.where(hit, found, victims[missed.cumsum(0).clamp_min(1) - 1])
    slots = torch.where(real, slots, n_slots)
    owners.copy_(F.pad(owners, (0, 1)).scatter(0, slots, wanted)[:n_slots])
    last_used.copy_(F.pad(last_used, (0, 1)).scatter(0, slots, now.expand_as(slots))[:n_slots])
    slot_of[wanted] = slots.to(torch.int32)
    if hits is not None:
        n_hits = hit.sum()
        hits.number.add_(n_hits)
        hits.spared.add_(n_hits, alpha=hits.slice_bytes)
    return slots, hit, missed
