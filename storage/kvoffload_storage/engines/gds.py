"""The ``gds`` engine: GPUDirect Storage by torch's own GdsFile, from files to device memory."""

import functools
import os
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError
from ..page_file import PageFile
from .base import Engine, PendingRead, ReadBatch, file_ends
from .probe import why_not
from .threads import ThreadsEngine

DEVICE = "cuda"
_PROBE_S = 60.0  # loading torch and making a CUDA context is most of it

# In a process of its own: cuFile that finds no driver may abort or hang, and neither can be caught here.
_PROBE = """
import os, sys, torch
from torch.cuda.gds import GdsFile
path, wrote = sys.argv[1], os.urandom(8192)
open(path, "wb").write(wrote)
memory = torch.zeros(8192, dtype=torch.uint8, device="cuda")
GdsFile(path, os.O_RDONLY).load_storage(memory.untyped_storage()[4096:], 4096)
sys.exit(None if bytes(memory.tolist()) == bytes(4096) + wrote[4096:] else "GPUDirect brought back other bytes")
"""


@functools.cache
def why_no_gds(directory: Path | None = None) -> str:
    """Why files of that directory (None: the system's for temporary files) cannot be read into device memory, or "" if
    they can; where there is a GPU the answer costs one child process, once."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    wanted = (directory or Path(tempfile.gettempdir())).absolute()
    nearest = next(path for path in (wanted, *wanted.parents) if path.is_dir())  # a store makes its folder later
    try:
        with tempfile.TemporaryDirectory(prefix="probe-", dir=nearest) as folder:
            return why_not("-c", _PROBE, f"{folder}/probe", timeout_s=_PROBE_S)
    except OSError as error:
        return f"the probe could not run: {error}"


class GdsEngine(Engine):
    """``load_storage`` on ``n_threads`` threads, one read a slice; memory of the host is left to the threads engine.

    Safety: before a read starts, the stream of its caller is synchronised, since cuFile writes outside of streams.
    Every slice belongs to one job, taken from a deque by one thread. Files are opened on the caller's thread and stay
    open until ``close``. A torch whose ``load_storage`` holds the interpreter lock reads one slice at a time.
    """

    name = "gds"
    on_device = True

    def __init__(self, n_threads: int) -> None:
        self.depth = n_threads
        self._host = ThreadsEngine(n_threads)
        self._executor = ThreadPoolExecutor(n_threads, thread_name_prefix="kvoffload-gds")
        self._files: dict[Path, Any] = {}

    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        if batch.memory.device.type != DEVICE:
            return self._host.read(file, batch)
        if batch.memory.is_cuda:
            torch.cuda.current_stream(batch.memory.device).synchronize()
        plan, opened = batch.plan, self._open(file)
        offsets = plan.starts + plan.offsets.repeat(plan.firsts[1:] - plan.firsts[:-1])
        waiting = deque(zip(offsets.tolist(), batch.places.tolist(), strict=True))
        n_shares = min(self.depth, len(waiting))
        futures = [self._executor.submit(_drain, file, opened, batch, waiting) for _ in range(n_shares)]
        return PendingRead(file, futures)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._host.close()
        self._files.clear()

    def _open(self, file: PageFile) -> Any:
        if file.path not in self._files:
            try:
                self._files[file.path] = torch.cuda.gds.GdsFile(str(file.path), os.O_RDONLY)
            except (OSError, RuntimeError) as error:
                raise StorageError(f"{file.path}: GPUDirect cannot open it: {_first_line(error)}") from error
        return self._files[file.path]


def _drain(file: PageFile, opened: Any, batch: ReadBatch, waiting: deque[tuple[int, int]]) -> None:
    size, n_bytes = os.fstat(file.fd).st_size, batch.slice_bytes
    while True:
        try:
            offset, place = waiting.popleft()
        except IndexError:
            return
        if offset + n_bytes > size:  # load_storage is silent about short reads
            raise file_ends(file, offset, size - offset, n_bytes)
        try:
            opened.load_storage(_part(batch.memory, place, n_bytes), offset)
        except RuntimeError as error:
            raise StorageError(f"{file.path}: {_first_line(error)}") from error


def _part(memory: Tensor, place: int, n_bytes: int) -> Any:
    """Bytes of uint8 memory as a storage of their own, which ``load_storage`` fills to its end."""
    first = memory.storage_offset() + place
    return memory.untyped_storage()[first : first + n_bytes]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
