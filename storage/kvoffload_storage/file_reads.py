"""Reads of a file store under way, and the checks of what they bring."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .aligned import BLOCK_BYTES, is_aligned
from .engines import PendingRead, ReadBatch
from .errors import IntegrityError
from .format import Checksums, checksum
from .plan import Int64Array, ReadPlan
from .store import Moved, Ticket


@dataclass(frozen=True)
class PartRead:
    """The reads of one file: rows ``rows`` of the caller's buffer follow from the plan's rows. The file's first page is
    page ``first`` of the layer."""

    pending: PendingRead
    plan: ReadPlan
    rows: Int64Array
    layer: int
    first: int

    def result(self) -> None:
        """Return when the rows are there but for repeated ones; the error of a page that the file lost names it."""
        try:
            self.pending.result()
        except IntegrityError as error:
            if error.page is None:
                raise
            raise IntegrityError(str(error), layer=self.layer, page=self.first + error.page) from error


class FileTicket(Ticket):
    """Disk reads under way; rows that repeat another row are copied when those have arrived."""

    def __init__(self, parts: Sequence[PartRead], out: Tensor, copied: Moved) -> None:
        self._parts, self._out = parts, out
        self._moved = copied + Moved(nvme=sum(part.plan.n_bytes for part in parts))

    def done(self, timeout_s: float | None) -> bool:
        return all(part.pending.done(timeout_s) for part in self._parts)

    def wait(self) -> Moved:
        for part in self._parts:  # all of them before any failure is raised: nobody may write into ``out`` after that
            part.pending.done(None)
        for part in self._parts:
            part.result()
            if len(part.plan.repeats):
                repeated = torch.from_numpy(part.rows[part.plan.repeat_of]).to(self._out.device)
                put_rows(self._out, part.rows[part.plan.repeats], self._out[repeated])
        return self._moved


def put_rows(out: Tensor, rows: Int64Array, values: Tensor) -> None:
    """Row ``rows[i]`` of uint8 [.., m], on any device, becomes row i of ``values``."""
    if out.device.type == "cpu":
        out.numpy()[rows] = values.numpy()  # torch would take byte by byte
    else:
        out.index_copy_(0, torch.from_numpy(rows).to(out.device), values.to(out.device))


class VerifyingTicket(Ticket):
    """Calls ``check`` when the bytes are there; it raises IntegrityError."""

    def __init__(self, inner: Ticket, check: Callable[[], None]) -> None:
        self._inner, self._check = inner, check

    def done(self, timeout_s: float | None) -> bool:
        return self._inner.done(timeout_s)

    def wait(self) -> Moved:
        moved = self._inner.wait()
        self._check()
        return moved


def check_slices(
    found: Tensor, page_ids: Int64Array, slice_ids: Int64Array, expected: Checksums, *, directory: Path, layer: int
) -> None:
    """Raise IntegrityError for the first of the slices uint8 [n, slice_bytes] that is not what was written."""
    rows = found.cpu().numpy()
    for row, page, piece in zip(rows, page_ids.tolist(), slice_ids.tolist(), strict=True):
        if (given := checksum(row.data)) != expected[page][piece]:
            raise IntegrityError(
                f"{directory}: layer {layer}, page {page}, slice {piece} has checksum {given:016x}, expected "
                f"{expected[page][piece]:016x}", layer=layer, page=page,
            )  # fmt: skip


def batch_of(plan: ReadPlan, disk_rows: Int64Array, out: Tensor, *, direct: bool) -> ReadBatch:
    """The plan's ranges with the rows of ``out`` that they fill."""
    size = out.shape[1]
    in_place = size % BLOCK_BYTES == 0 and (is_aligned(out) or not direct)
    return ReadBatch(plan, out.view(-1), disk_rows[plan.rows] * size, size, in_place)


def all_slices(first: int, n_pages: int, n_slices: int) -> tuple[Int64Array, Int64Array]:
    """Page and slice ids of a run of whole pages, in order."""
    pages = np.arange(first, first + n_pages, dtype=np.int64)
    return np.repeat(pages, n_slices), np.tile(np.arange(n_slices, dtype=np.int64), n_pages)
