"""Page stores: immutable pages of bytes in host memory, device memory or files, read by slice or by run."""

from .aligned import aligned_empty
from .disk import DiskSpeed, free_bytes, measure_disk, probe_direct
from .engines import available_engines
from .errors import CapacityError, IntegrityError, StorageError, UnavailableError
from .file import FileStore
from .memory import MemoryStore
from .store import Moved, Store, StoreShape, Ticket
from .wrappers import Fault, FaultyStore, LatencyStore, TracingStore, WrapperStore, cut_short, flip_bit

__all__ = [
    "CapacityError",
    "DiskSpeed",
    "Fault",
    "FaultyStore",
    "FileStore",
    "IntegrityError",
    "LatencyStore",
    "MemoryStore",
    "Moved",
    "StorageError",
    "Store",
    "StoreShape",
    "Ticket",
    "TracingStore",
    "UnavailableError",
    "WrapperStore",
    "aligned_empty",
    "available_engines",
    "cut_short",
    "flip_bit",
    "free_bytes",
    "measure_disk",
    "probe_direct",
]
