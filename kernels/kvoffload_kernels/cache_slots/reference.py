"""Least-recently-used slots of a device page cache, in fixed-shape tensor operations without a host round trip."""

import torch
from torch import Tensor


def assign_slots(wanted: Tensor, owners: Tensor, last_used: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Give each wanted page key a slot: int64 wanted [F] (distinct), owners [C] (page key of each slot, -1 empty),
    last_used [C].

    Returns (slots int64 [F], hit bool [F]) and updates owners and last_used in place. Misses take the slots that were
    used longest ago; a slot hit now is never taken, which needs C >= F.
    """
    order = owners.argsort()
    sorted_owners = owners[order]
    position = torch.searchsorted(sorted_owners, wanted).clamp_max(owners.shape[0] - 1)
    hit = sorted_owners[position] == wanted
    slots = order[position]
    usage = last_used.scatter_reduce(0, slots, torch.where(hit, now, 0).expand_as(slots), "amax")
    victims = usage.argsort(stable=True)
    slots = torch.where(hit, slots, victims[(~hit).cumsum(0).clamp_min(1) - 1])
    owners[slots] = wanted
    last_used[slots] = now
    return slots, hit
