"""How much room this machine has, found out without allocating anything."""

import errno
import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from kvoffload_storage.errors import UnavailableError

from kvoffload.errors import OutOfRoomError, UsageError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Limits:
    """Free bytes; None where it cannot be known or does not matter.

    ``locked`` is told and not checked: memory pinned through CUDA is not counted against RLIMIT_MEMLOCK (2 GiB pinned
    under a limit of 8 MiB as an unprivileged user on an H100), and nothing else here locks memory.
    """

    host: int | None = None
    device: int | None = None
    disk: int | None = None
    locked: int | None = None

    def shared(self, count: int) -> "Limits":
        """One process's part where so many share the host; each has a device of its own."""
        host, disk = (None if n is None else n // count for n in (self.host, self.disk))
        return replace(self, host=host, disk=disk)


def find_limits(device: torch.device, nvme_dir: Path | None, *, with_disk: bool) -> Limits:
    """Ask the system; with a disk, its folder is also tried for writing (OutOfRoomError if that fails)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Limits(
        host=free_host_bytes(),
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and torch.cuda.is_available() else None,
        disk=free_disk_bytes(nvme_dir) if with_disk else None,
        locked=None if soft == resource.RLIM_INFINITY else soft,
    )


def free_host_bytes() -> int | None:
    """MemAvailable, or what the control group still allows where that is less."""
    found = [n for n in (_available_memory(_MEMINFO), _cgroup_room(_CGROUP)) if n is not None]
    return min(found, default=None)


def free_disk_bytes(directory: Path | None) -> int:
    """Free bytes where page files would go; the folder itself need not exist yet and is not made."""
    from kvoffload_storage.disk import free_bytes

    wanted = directory or Path(tempfile.gettempdir())
    folder = next(p for p in (wanted.absolute(), *wanted.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise UsageError(f"nvme_dir {str(wanted)!r} cannot be a folder: {str(folder)!r} is a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return free_bytes(folder)
    except (OSError, UnavailableError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"nvme_dir {str(wanted)!r} cannot be written: {reason}") from error
        raise OutOfRoomError(f"nvme_dir {str(wanted)!r} cannot be written: {reason}") from error


def _available_memory(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_room(cgroup: Path) -> int | None:
    """What this control group (version 2) may still take; file pages that can be dropped count as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - used + int(statistics.get("inactive_file", 0)), 0)
