"""Page stores: immutable pages of bytes in host memory, device memory or files, read by slice or by run."""

from .aligned import aligned_empty
from .bundle import Bundle, lock_bundle, open_bundle, remove_bundle, save_bundle
from .disk import DiskSpeed, free_bytes, measure_disk, probe_direct
from .engines import available_engines
from .errors import CapacityError, IntegrityError, StorageError, UnavailableError
from .file import FileStore
from .locks import sweep
from .manifests import read_manifest
from .memory import MemoryStore
from .segments import Sealed, Segment
from .store import Moved, Store, StoreShape, Ticket
from .tiered import TieredStore
from .wrappers import Fault, FaultyStore, LatencyStore, TracingStore, WrapperStore, cut_short, flip_bit

__all__ = [
    "Bundle",
    "CapacityError",
    "DiskSpeed",
    "Fault",
    "FaultyStore",
    "FileStore",
    "IntegrityError",
    "LatencyStore",
    "MemoryStore",
    "Moved",
    "Sealed",
    "Segment",
    "StorageError",
    "Store",
    "StoreShape",
    "Ticket",
    "TieredStore",
    "TracingStore",
    "UnavailableError",
    "WrapperStore",
    "aligned_empty",
    "available_engines",
    "cut_short",
    "flip_bit",
    "free_bytes",
    "lock_bundle",
    "measure_disk",
    "open_bundle",
    "probe_direct",
    "read_manifest",
    "remove_bundle",
    "save_bundle",
    "sweep",
]
