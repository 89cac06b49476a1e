"""The gather kernel against the pinned copy: launches of all sizes in chunks of all sizes, inside one CUDA graph."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvoffload_kernels.dispatch import gather_slices
from kvoffload_storage.aligned import aligned_empty
from torch import Tensor

from kvoffload.bench.ceilings import GB, random_bytes
from kvoffload.bench.clock import Clock
from kvoffload.bench.gate import GateError
from kvoffload.bench.output import Table
from kvoffload.errors import UsageError
from kvoffload.units import format_size

_MOST_SETS = 8  # different launches of one graph, so that no cache has what a launch reads
_REPEATS = 20


@dataclass(frozen=True)
class Copied:
    """One launch of ``launch_bytes``: by the gather in random chunks, and by one copy of as many bytes in a row."""

    launch_bytes: int
    chunk_bytes: int
    gather_s: float
    copy_s: float

    @property
    def gather_gb_s(self) -> float:
        return self.launch_bytes / self.gather_s / GB

    @property
    def copy_gb_s(self) -> float:
        return self.launch_bytes / self.copy_s / GB

    def as_dict(self, link_gb_s: float) -> dict[str, Any]:
        """``of_link`` is the share of the pinned copy's best rate."""
        return {
            "launch_bytes": self.launch_bytes, "chunk_bytes": self.chunk_bytes,
            "gather_us": round(self.gather_s * 1e6, 2), "copy_us": round(self.copy_s * 1e6, 2),
            "gather_gb_s": round(self.gather_gb_s, 3), "copy_gb_s": round(self.copy_gb_s, 3),
            "of_link": round(self.gather_gb_s / link_gb_s, 4),
        }  # fmt: skip


def check_sizes(launches: Sequence[int], chunks: Sequence[int], source_bytes: int) -> None:
    """Raises UsageError for what cannot be gathered."""
    for chunk in chunks:
        if chunk % 8:
            raise UsageError(f"chunks: {chunk} bytes are no whole words of 8 bytes")
    if max(launches) > source_bytes:
        raise UsageError(f"launches: {max(launches):,} bytes are more than the source of {source_bytes:,} has")
    if min(launches) < min(chunks):
        raise UsageError(f"launches: {min(launches):,} bytes are less than every chunk")


def measure_copies(clock: Clock, launches: Sequence[int], chunks: Sequence[int], source_bytes: int) -> Iterator[Copied]:
    """Row by row; the bytes that the gather brought are compared before it is timed."""
    source = aligned_empty(source_bytes, pinned=clock.has_graphs)
    source.copy_(random_bytes(source_bytes, clock.device))
    for launch in launches:
        copy_s = _time_copy(clock, source, launch)
        for chunk in chunks:
            if chunk <= launch:
                yield Copied(launch, chunk, _time_gather(clock, source, launch, chunk), copy_s)


def copy_table(rows: Sequence[Copied], link_gb_s: float) -> Table:
    """The figures for people."""
    told = [
        (format_size(row.launch_bytes), format_size(row.chunk_bytes), f"{row.gather_s * 1e6:.1f}",
         f"{row.copy_s * 1e6:.1f}", f"{row.gather_gb_s:.2f}", f"{row.copy_gb_s:.2f}",
         f"{row.gather_gb_s / link_gb_s:.2f}")
        for row in rows
    ]  # fmt: skip
    header = ("launch", "chunk", "gather us", "copy us", "gather GB/s", "copy GB/s", "of the link")
    return Table("the gather beside one copy", header, told)


def _time_copy(clock: Clock, source: Tensor, launch: int) -> float:
    out = torch.empty(launch, dtype=torch.uint8, device=clock.device)
    starts = [i * launch for i in range(_n_sets(source, launch))]

    def run() -> None:
        for start in starts:
            out.copy_(source[start : start + launch], non_blocking=True)

    return clock.on_device(clock.graph(run), _REPEATS).median / len(starts)


def _time_gather(clock: Clock, source: Tensor, launch: int, chunk: int) -> float:
    n, rows = launch // chunk, source[: source.numel() // chunk * chunk].view(-1, chunk)
    out = torch.empty(n, chunk, dtype=torch.uint8, device=clock.device)
    places = torch.arange(n, device=clock.device)
    wanted = torch.ones(n, dtype=torch.bool, device=clock.device)
    generator = torch.Generator().manual_seed(0)
    n_sets = _n_sets(source, launch)
    sets = [torch.randint(len(rows), (n,), generator=generator).to(clock.device) for _ in range(n_sets)]
    gather_slices(rows, sets[0], out, places, wanted)
    if not torch.equal(out.cpu(), rows[sets[0].cpu()]):
        raise GateError(f"the gather of {launch:,} bytes in chunks of {chunk:,} brought other bytes")

    def run() -> None:
        for ids in sets:
            gather_slices(rows, ids, out, places, wanted)

    return clock.on_device(clock.graph(run), _REPEATS).median / len(sets)


def _n_sets(source: Tensor, launch: int) -> int:
    return max(1, min(_MOST_SETS, source.numel() // launch))
