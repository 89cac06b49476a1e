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


def assign_slots(
    wanted: Tensor, owners: Tensor, last_used: Tensor, now: Tensor, hits: Hits | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each wanted page key a slot: int64 wanted [F] (distinct), owners [C] (page key of each slot, -1 empty),
    last_used [C] and the number ``now`` [] of the step before, which is counted up.

    Returns (slots int64 [F], hit bool [F], missed bool [F]) and updates owners and last_used in place. Misses take the
    slots that were used longest ago, of several that of the smallest key, so that the order of what is wanted does not
    matter to what stays; a slot hit now is never taken, which needs C >= F. A key below 0 wants nothing: its slot is C,
    and it changes nothing.
    """
    now += 1
    n_slots = owners.shape[0]
    order = owners.argsort(stable=True)
    sorted_owners = owners[order]
    position = torch.searchsorted(sorted_owners, wanted).clamp_max(n_slots - 1)
    real = wanted >= 0
    hit = (sorted_owners[position] == wanted) & real
    slots = order[position]
    usage = last_used.scatter_reduce(0, slots, torch.where(hit, now, 0).expand_as(slots), "amax")
    victims = order[usage[order].argsort(stable=True)]
    slots = torch.where(hit, slots, victims[(real & ~hit).cumsum(0).clamp_min(1) - 1])
    slots = torch.where(real, slots, n_slots)
    owners.copy_(F.pad(owners, (0, 1)).scatter(0, slots, wanted)[:n_slots])
    last_used.copy_(F.pad(last_used, (0, 1)).scatter(0, slots, now.expand_as(slots))[:n_slots])
    if hits is not None:
        n_hits = hit.sum()
        hits.number.add_(n_hits)
        hits.spared.add_(n_hits, alpha=hits.slice_bytes)
    return slots, hit, real & ~hit
