"""What a directory's disk can do: direct I/O or not, free bytes, and a short measurement."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .aligned import BLOCK_BYTES, aligned_empty
from .engines import ReadBatch, build_engine
from .errors import StorageError
from .format import PageLayout
from .locks import PAGES, temporary_folder
from .page_file import PageFile, storage_error, unusable, write_all
from .plan import lone_reads
from .private_files import read_private, write_private

WRITE_BYTES = 1 << 20
READ_BYTES = 64 << 10
READ_DEPTH = 8
MAX_FILE_BYTES = 256 << 20
MAX_UNIT_BYTES = 1 << 20
UNIT_FILE = "read-unit"
_UNITS = tuple(1 << i for i in range(12, 21))  # BLOCK_BYTES to MAX_UNIT_BYTES


@dataclass(frozen=True)
class DiskSpeed:
    """Sequential writes of 1 MiB, one at a time, and random reads of 64 KiB, eight in flight; MB is 10^6 bytes. A read
    of ``read_unit`` bytes, a power of two, takes no longer for being a read than for its bytes."""

    write_mb_s: float
    read_mb_s: float
    read_iops: float
    read_unit: int
    direct: bool
    direct_note: str


def free_bytes(directory: Path) -> int:
    """Bytes that an unprivileged user may still write in that directory."""
    try:
        return shutil.disk_usage(directory).free
    except OSError as error:
        raise unusable(error, directory, what="free space is not known") from error


def probe_direct(directory: Path) -> tuple[bool, str]:
    """Whether files in ``directory`` take direct I/O, tried by an aligned write and read; and why not, else ""."""
    try:
        with tempfile.TemporaryDirectory(prefix="probe-", dir=directory) as folder:
            return _try_direct(Path(folder) / "probe")
    except OSError as error:
        raise unusable(error, directory, what="cannot be written") from error


def reads_directly(file: Path) -> bool:
    """Whether the first block of an existing file can be read with direct I/O; nothing is written."""
    block = aligned_empty(BLOCK_BYTES).numpy()
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return os.preadv(fd, [block.data], 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False


def measure_disk(directory: Path, seconds: float = 0.5, *, most_bytes: int = MAX_FILE_BYTES) -> DiskSpeed:
    """Write, then read, for about ``seconds`` each, in a temporary file of at most ``most_bytes``, 1 MiB at least."""
    direct, note = probe_direct(directory)
    with temporary_folder(directory, PAGES) as folder:
        path = folder / "layer-0000.kv"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        file = PageFile(path, os.open(path, flags, 0o600), PageLayout(1, READ_BYTES), direct=direct)
        try:
            n_bytes, write_s = _write(file, seconds, most_bytes)
            small_s = _read(file, n_bytes, BLOCK_BYTES, seconds / 2)
            read_s = _read(file, n_bytes, READ_BYTES, seconds / 2)
        except OSError as error:
            raise storage_error(error, path, WRITE_BYTES) from error
        finally:
            file.close()
    unit = read_unit(small_s, read_s)
    return DiskSpeed(n_bytes / write_s / 1e6, READ_BYTES / read_s / 1e6, 1 / read_s, unit, direct, note)


def kept_read_unit(directory: Path) -> int | None:
    """What ``keep_read_unit`` kept in that folder; None where there is nothing usable."""
    try:
        found = read_private(directory / UNIT_FILE, 16).decode("ascii", "replace").strip()
    except (FileNotFoundError, StorageError):
        return None
    return int(found) if found in map(str, _UNITS) else None


def keep_read_unit(directory: Path, unit: int) -> int:
    """Keep the unit of a directory's disk beside what lies in it; the one kept, which another process may have
    written first."""
    try:
        write_private(directory / UNIT_FILE, f"{unit}\n".encode())
    except StorageError:  # it is there already, or cannot be
        return kept_read_unit(directory) or unit
    return unit


def read_unit(small_s: float, large_s: float) -> int:
    """``DiskSpeed.read_unit`` from the seconds that a read of 4 KiB and one of 64 KiB take: a part for being a read and
    a part for each byte. From 4 KiB to 1 MiB."""
    byte_s = max(large_s - small_s, 0.0) / (READ_BYTES - BLOCK_BYTES)
    own_s = max(small_s - BLOCK_BYTES * byte_s, 0.0)
    return next((unit for unit in _UNITS if unit * byte_s >= own_s), MAX_UNIT_BYTES)


def _try_direct(path: Path) -> tuple[bool, str]:
    block = aligned_empty(2 * BLOCK_BYTES).numpy()
    block[:BLOCK_BYTES], block[BLOCK_BYTES:] = 0xA5, 0
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return False, f"direct I/O refused at open: {error.strerror}"
    try:
        os.pwrite(fd, block[:BLOCK_BYTES].data, 0)
        os.preadv(fd, [block[BLOCK_BYTES:].data], 0)
    except OSError as error:
        return False, f"direct I/O refused at the first block: {error.strerror}"
    finally:
        os.close(fd)
    if not np.array_equal(block[:BLOCK_BYTES], block[BLOCK_BYTES:]):
        return False, "direct I/O brought back other bytes"
    return True, ""


def _write(file: PageFile, seconds: float, most_bytes: int) -> tuple[int, float]:
    """Bytes written and the time until the disk had them."""
    block = aligned_empty(WRITE_BYTES).numpy()
    block[:] = np.random.default_rng(0).integers(0, 256, WRITE_BYTES, dtype=np.uint8)
    n_bytes, start = 0, time.perf_counter()
    while not n_bytes or (n_bytes + WRITE_BYTES <= most_bytes and time.perf_counter() - start < seconds):
        write_all(file.fd, block.data, n_bytes)
        n_bytes += WRITE_BYTES
    os.fdatasync(file.fd)
    return n_bytes, time.perf_counter() - start


def _read(file: PageFile, n_bytes: int, size: int, seconds: float) -> float:
    """Seconds a random read of ``size`` bytes takes, in batches of eight per thread."""
    engine = build_engine("threads", n_threads=READ_DEPTH)
    n_batch = 8 * READ_DEPTH
    memory, places = aligned_empty(n_batch * size), np.arange(n_batch) * size
    random = np.random.default_rng(1)
    n_reads, start = 0, time.perf_counter()
    try:
        while not n_reads or time.perf_counter() - start < seconds:
            offsets = random.integers(0, n_bytes // size, n_batch) * size
            batch = ReadBatch(lone_reads(offsets, size), memory, places, size, in_place=True)
            engine.read(file, batch).result()
            n_reads += n_batch
        return (time.perf_counter() - start) / n_reads
    finally:
        engine.close()
