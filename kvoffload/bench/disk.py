"""Random page reads of the file store against fio on the same file and offsets, in turn.

What is compared: whole reads of the store, planning, threads and Python in them, with fio's bare system calls. Both are
never idle: the store always has a ticket waiting behind the one that it reads, as prefetch gives it; a step that asks
layer by layer drains the queue at the end of each. The store reads into memory as it has it on a CPU device
(``aligned_empty``, in huge pages where the system has them), fio into memory of its own, in pages of 4 KiB.
"""

import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kvoffload_storage import FileStore, StoreShape, Ticket, aligned_empty
from kvoffload_storage.format import HEADER_BYTES

from kvoffload.bench.output import Table
from kvoffload.units import format_size

PAGE_BYTES = (64 << 10, 256 << 10)
PEERS = ("psync", "libaio")
_THREADS = 8
_ROUNDS = 5


@dataclass(frozen=True)
class Rate:
    """One measurement: MB/s (10^6 bytes), and CPU time, microseconds a page."""

    mb_s: float
    cpu_us: float


@dataclass(frozen=True)
class DiskReads:
    """Rounds of one page size and engine, and the same reads by fio with as many under way: by threads that wait for
    theirs (psync) and by one that waits for all (libaio). Empty where fio is not installed."""

    engine: str
    page_bytes: int
    depth: int
    ours: tuple[Rate, ...]
    fio: dict[str, tuple[Rate, ...]]
    direct: bool

    def ratio(self, peer: str) -> float | None:
        """Our median round as a share of fio's."""
        return _median(self.ours).mb_s / _median(self.fio[peer]).mb_s if self.fio else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine, "page_bytes": self.page_bytes, "depth": self.depth, "direct": self.direct,
            "ours": _told(self.ours), "fio": {peer: _told(rounds) for peer, rounds in self.fio.items()},
            "ratio_of_medians": {peer: round(self.ratio(peer) or 0.0, 3) for peer in self.fio},
        }  # fmt: skip


def lacks_fio() -> str:
    """Why fio is left out; empty where it is there."""
    return "" if shutil.which("fio") else "fio is not installed"


def measure_reads(folder: Path, file_bytes: int, seconds: float, engines: Sequence[str]) -> Iterator[DiskReads]:
    """A row for each page size and engine, each from a file of its own."""
    for page_bytes in PAGE_BYTES:
        for engine in engines:
            store = _written(folder, engine, page_bytes, file_bytes // page_bytes)
            try:
                yield _measure(store, seconds)
            finally:
                store.close()


def disk_table(rows: Sequence[DiskReads]) -> Table:
    """The figures for people: medians."""
    told = [
        (format_size(row.page_bytes).replace(" ", ""), f"{row.engine} x{row.depth}", f"{_median(row.ours).mb_s:.0f}",
         *["-" if (ratio := row.ratio(peer)) is None else f"{ratio:.2f}" for peer in PEERS],
         f"{_median(row.ours).cpu_us:.1f}",
         *[f"{_median(row.fio[peer]).cpu_us:.1f}" if row.fio else "-" for peer in PEERS])
        for row in rows
    ]  # fmt: skip
    heads = ("page", "engine", "MB/s", "of psync", "of libaio", "CPU us", "psync us", "libaio us")
    return Table("random page reads, and fio's; CPU time a page", heads, told)


def _median(rounds: Sequence[Rate]) -> Rate:
    return Rate(median(rate.mb_s for rate in rounds), median(rate.cpu_us for rate in rounds))


def _told(rounds: Sequence[Rate]) -> dict[str, Any]:
    return {"mb_s": [round(rate.mb_s) for rate in rounds], "cpu_us_a_page": round(_median(rounds).cpu_us, 1)}


def _written(folder: Path, engine: str, page_bytes: int, n_pages: int) -> FileStore:
    store = FileStore(folder, StoreShape(1, 1, page_bytes), engine=engine, n_threads=_THREADS)
    block = torch.randint(0, 256, (64, 1, page_bytes), dtype=torch.uint8)
    for first in range(0, n_pages, 64):
        store.append(0, block[: min(64, n_pages - first)])
    store.seal()
    return store


def _measure(store: FileStore, seconds: float) -> DiskReads:
    ours: list[Rate] = []
    theirs: dict[str, list[Rate]] = {} if lacks_fio() else {peer: [] for peer in PEERS}
    for _ in range(_ROUNDS):
        ours.append(_ours(store, seconds))
        for peer, rounds in theirs.items():
            rounds.append(_fio(store, peer, seconds))
    fio = {peer: tuple(rounds) for peer, rounds in theirs.items()}
    return DiskReads(store.engine, store.shape.page_bytes, store.depth, tuple(ours), fio, store.direct)


def _ours(store: FileStore, seconds: float) -> Rate:
    """Batches of 128 pages, the next one asked for before one is waited for, so that there is always work."""
    n_batch, n_pages = 128, store.n_pages(0)
    memory = aligned_empty(2 * n_batch * store.shape.page_bytes).zero_()
    out = (memory.cuda() if store.reads_to_device else memory).view(2, n_batch, -1)
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
    return Rate(n_read * store.shape.page_bytes / took / 1e6, used / n_read * 1e6)


def _fio(store: FileStore, peer: str, seconds: float) -> Rate:
    """The same reads by fio, as many under way as ours."""
    page_bytes = store.shape.page_bytes
    many = ["--thread", f"--numjobs={store.depth}"] if peer == "psync" else [f"--iodepth={store.depth}"]
    command = [
        "fio", "--name=pages", f"--filename={store.directory / 'layer-0000.kv'}", "--rw=randread", f"--bs={page_bytes}",
        f"--offset={HEADER_BYTES}", f"--size={store.n_pages(0) * page_bytes}", f"--direct={int(store.direct)}",
        f"--ioengine={peer}", *many, "--group_reporting", "--time_based", f"--runtime={seconds}",
        "--output-format=json", "--readonly", "--norandommap", f"--blockalign={page_bytes}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout)["jobs"][0]
    used_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Rate(job["read"]["bw_bytes"] / 1e6, used_s / job["read"]["total_ios"] * 1e6)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
