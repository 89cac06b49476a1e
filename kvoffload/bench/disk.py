"""Random page reads of the file store against fio on the same file, in turn."""

import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvoffload_storage import FileStore, StoreShape, Ticket, aligned_empty

from kvoffload.bench.output import Table
from kvoffload.units import format_size

PAGE_BYTES = (64 << 10, 256 << 10)
_DEPTH = 8
_ROUNDS = 3


@dataclass(frozen=True)
class DiskReads:
    """Rounds of one page size: MB/s (10^6 bytes) of ours and of fio (empty where it is not installed), and the CPU
    time of ours, microseconds a page."""

    page_bytes: int
    ours_mb_s: tuple[float, ...]
    fio_mb_s: tuple[float, ...]
    cpu_us_a_page: float
    direct: bool

    @property
    def ratio(self) -> float | None:
        """Our best round as a share of fio's."""
        return max(self.ours_mb_s) / max(self.fio_mb_s) if self.fio_mb_s else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "page_bytes": self.page_bytes, "ours_mb_s": [round(x) for x in self.ours_mb_s],
            "fio_mb_s": [round(x) for x in self.fio_mb_s], "direct": self.direct,
            "ratio_of_best": None if self.ratio is None else round(self.ratio, 3),
            "cpu_us_a_page": round(self.cpu_us_a_page, 1),
        }  # fmt: skip


def lacks_fio() -> str:
    """Why fio is left out; empty where it is there."""
    return "" if shutil.which("fio") else "fio is not installed"


def measure_reads(folder: Path, file_bytes: int, seconds: float) -> Iterator[DiskReads]:
    """One row a page size, each from a file of its own."""
    for page_bytes in PAGE_BYTES:
        store = _written(folder, page_bytes, file_bytes // page_bytes)
        try:
            yield _measure(store, file_bytes // page_bytes, seconds)
        finally:
            store.close()


def disk_table(rows: Sequence[DiskReads]) -> Table:
    """The figures for people: the best round of each."""
    told = [
        (format_size(row.page_bytes), f"{max(row.ours_mb_s):.0f}", _or_dash(max(row.fio_mb_s, default=None), "{:.0f}"),
         _or_dash(row.ratio, "{:.2f}"), f"{row.cpu_us_a_page:.1f}")
        for row in rows
    ]  # fmt: skip
    return Table("random page reads", ("page", "ours MB/s", "fio MB/s", "of fio", "CPU us a page"), told)


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)


def _written(folder: Path, page_bytes: int, n_pages: int) -> FileStore:
    store = FileStore(folder, StoreShape(1, 1, page_bytes), n_threads=_DEPTH)
    block = torch.randint(0, 256, (64, 1, page_bytes), dtype=torch.uint8)
    for first in range(0, n_pages, 64):
        store.append(0, block[: min(64, n_pages - first)])
    store.seal()
    return store


def _measure(store: FileStore, n_pages: int, seconds: float) -> DiskReads:
    ours, theirs = [], []
    for _ in range(_ROUNDS):
        ours.append(_ours(store, n_pages, seconds))
        if not lacks_fio():
            theirs.append(_fio(store, seconds))
    rates, cpu = zip(*ours, strict=True)
    return DiskReads(store.shape.page_bytes, rates, tuple(theirs), min(cpu), store.direct)


def _ours(store: FileStore, n_pages: int, seconds: float) -> tuple[float, float]:
    """MB/s and CPU microseconds a page: batches of 16 pages a thread, the next one asked for before one is waited for,
    so that the threads always have work."""
    n_batch = 16 * _DEPTH
    out = aligned_empty(2 * n_batch * store.shape.page_bytes).view(2, n_batch, -1)
    slices, n_read = torch.zeros(n_batch, dtype=torch.int64), 0

    def ask(i: int) -> Ticket:
        return store.read_slices(0, torch.randint(0, n_pages, (n_batch,)), slices, out[i % 2])

    started, used, coming, took = time.perf_counter(), _cpu_s(), ask(0), 0.0
    while took < seconds:
        ready, coming = coming, ask(n_read // n_batch + 1)
        ready.wait()
        n_read, took = n_read + n_batch, time.perf_counter() - started
    used = _cpu_s() - used
    coming.wait()
    return n_read * store.shape.page_bytes / took / 1e6, used / n_read * 1e6


def _fio(store: FileStore, seconds: float) -> float:
    """MB/s of the same reads by fio: threads with preadv, as many as our readers."""
    page_bytes = store.shape.page_bytes
    command = [
        "fio", "--name=pages", f"--filename={store.directory / 'layer-0000.kv'}", "--rw=randread", f"--bs={page_bytes}",
        f"--direct={int(store.direct)}", "--ioengine=psync", "--thread", f"--numjobs={_DEPTH}",
        "--group_reporting", "--time_based", f"--runtime={seconds}", "--output-format=json", "--readonly",
        "--norandommap", f"--blockalign={page_bytes}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e6


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
