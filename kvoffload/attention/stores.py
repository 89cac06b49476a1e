"""From a configuration to the store of a tier, and from one store to another."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvoffload_storage.aligned import aligned_empty
from kvoffload_storage.file import FileStore
from kvoffload_storage.memory import MemoryStore
from kvoffload_storage.segments import Sealed
from kvoffload_storage.store import Moved, Store, StoreShape
from kvoffload_storage.tiered import TieredStore

from kvoffload.config import RuntimeConfig

_COPY_BYTES = 16 << 20
_DEADLINE_PARTS = 8  # a read can be late in so many parts


@dataclass(frozen=True)
class OpenedStore:
    """The store of a tier; ``mirror`` has the pages of a session that a tier in memory began with, and ``read`` is what
    it cost to bring them there."""

    store: Store
    mirror: FileStore | None = None
    read: Moved = field(default_factory=Moved)


def open_store(
    config: RuntimeConfig, shape: StoreShape, capacity_pages: int, device: torch.device, begin: Sealed | None
) -> OpenedStore:
    """A store with room for ``capacity_pages`` a layer that begins with the pages of ``begin``."""
    if config.offload == "nvme":
        files = _file_store(config, shape, capacity_pages, device, begin)
        if config.cpu_max is None:
            return OpenedStore(files)
        n_parts = _DEADLINE_PARTS if config.fetch == "deadline" else 1
        pinned = device.type == "cuda"
        n_bytes = config.cpu_max
        if capacity_pages:  # then more would never be used, and pinned memory is taken at once
            n_bytes = min(n_bytes, capacity_pages * shape.n_layers * shape.page_bytes)
        return OpenedStore(TieredStore(files, max_bytes=n_bytes, pinned=pinned, n_parts=n_parts))
    mirror = None if begin is None else mirror_store(config, config.nvme_dir, shape, begin)
    pinned = device.type == "cuda"
    if config.offload == "cpu":
        store = MemoryStore(shape, tier="cpu", pinned=pinned, capacity_pages=capacity_pages, max_bytes=config.cpu_max)
    else:
        store = MemoryStore(shape, tier="gpu", device=device, capacity_pages=capacity_pages)
    return OpenedStore(store) if mirror is None else OpenedStore(store, mirror, copy_pages(mirror, store)[0])


def mirror_store(config: RuntimeConfig, folder: Path | None, shape: StoreShape, begin: Sealed | None) -> FileStore:
    """Files for the pages of a tier in memory, behind those of ``begin``."""
    bounds: dict[str, Any] = {"max_bytes": config.nvme_max, "floor_bytes": config.nvme_floor}
    return FileStore(folder, shape, direct=config.direct, begin=begin, **bounds)


def copy_pages(source: Store, target: Store, most: int | None = None) -> tuple[Moved, Moved]:
    """Append the pages that ``target`` does not have yet, up to ``most`` a layer; what was read and written. Checksums
    are verified where the source has them."""
    read = written = Moved()
    shape = source.shape
    step = max(1, _COPY_BYTES // shape.page_bytes)
    memory = aligned_empty(step * shape.page_bytes).view(step, shape.n_slices, shape.slice_bytes)
    for layer in range(shape.n_layers):
        end = source.n_pages(layer) if most is None else min(most, source.n_pages(layer))
        for first in range(target.n_pages(layer), end, step):
            pages = memory[: min(step, end - first)]
            read += source.read_pages(layer, first, pages).wait()
            written += target.append(layer, pages)
    return read, written


def _file_store(
    config: RuntimeConfig, shape: StoreShape, capacity_pages: int, device: torch.device, begin: Sealed | None
) -> FileStore:
    n_begin = 0 if begin is None else max(begin.n_pages(layer) for layer in range(shape.n_layers))
    return FileStore(
        config.nvme_dir,
        shape,
        engine=config.io_engine,
        capacity_pages=max(capacity_pages - n_begin, 0),
        max_bytes=config.nvme_max,
        floor_bytes=config.nvme_floor,
        direct=config.direct,
        pinned=device.type == "cuda",
        verify=config.verify,
        begin=begin,
    )
