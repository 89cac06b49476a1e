"""Temporary folders that belong to a living process, told by a lock on the folder itself; others are swept away."""

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .bundle_format import is_known
from .errors import UnavailableError
from .format import checksum
from .page_file import unusable

_log = logging.getLogger(__name__)
PAGES, NEW, REMOVED = "kvoffload-pages-", "kvoffload-new-", "kvoffload-rm-"
# As they are made; a session's name ends with .kvo.
_TEMPORARY = re.compile(f"({PAGES}|{NEW}|{REMOVED})[a-z0-9_]{{8,16}}")
_ATTEMPTS, _PAUSE_S = 10, 0.05


class FolderLock:
    """An exclusive ``flock`` on a folder, held until ``release``, until the object is dropped, or until the process
    ends in whatever way. Several in one process exclude each other too."""

    def __init__(self, fd: int) -> None:
        self._release = weakref.finalize(self, os.close, fd)
        self.fd = fd

    @classmethod
    def take(cls, folder: Path) -> "FolderLock | None":
        """The lock, or None when another owner has it or the folder is not what ``folder`` leads to any more. OSError
        when it cannot be opened or locked at all."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        lock = cls(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(folder)):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        lock.release()
        return None

    def release(self) -> None:
        self._release()


class NameClaim:
    """The right to make what has a name, held until ``release``, until the object is dropped, or until the process ends
    in whatever way: an empty temporary folder that is called by the name, and its lock (None: there are no locks)."""

    def __init__(self, folder: Path, lock: FolderLock | None) -> None:
        self._release = weakref.finalize(self, _give_up, folder, lock)

    def release(self) -> None:
        self._release()


def _give_up(folder: Path, lock: FolderLock | None) -> None:
    with suppress(OSError):
        folder.rmdir()
    if lock is not None:
        lock.release()


def claim_name(path: Path) -> NameClaim:
    """For what is not there yet; UnavailableError when it is, when another process has the claim, and when nothing can
    be made there. Where there are no locks, or no folder yet, everybody gets it, and who is last finds it there."""
    folder = path.absolute().parent / f"{NEW}{checksum(os.fsencode(path.name)):016x}"
    for _ in range(_ATTEMPTS):  # a sweeper may have the lock, but not for long
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            return NameClaim(folder, None)
        except OSError as error:
            raise unusable(error, path, what="cannot be made") from error
        try:
            lock = FolderLock.take(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return NameClaim(folder, None)
        if lock is not None:
            claim = NameClaim(folder, lock)
            if path.exists():
                claim.release()
                raise UnavailableError(f"{path}: exists already")
            return claim
        time.sleep(_PAUSE_S)
    raise UnavailableError(f"{path}: another process is making this session")


def is_temporary(name: str) -> bool:
    """Whether a folder of that name is a temporary one, as they are made."""
    return _TEMPORARY.fullmatch(name) is not None


def make_locked(parent: Path, prefix: str) -> tuple[Path, FolderLock]:
    """A new folder, mode 0700, whose name begins with ``prefix``, and the lock on it; OSError when it cannot be made.
    On a file system without locks it is not locked, and cannot be swept either."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = FolderLock.take(path)
        except FileNotFoundError:  # a sweeper came between
            continue
        except OSError:
            lock = _without_locking(path)
        if lock is not None:
            return path, lock


def _without_locking(path: Path) -> FolderLock:
    try:
        return FolderLock(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:  # not the file system, but no descriptor left
        path.rmdir()
        raise


def refuse_place(path: Path) -> None:
    """Raise UnavailableError where something that is to stay would be swept away for its name, or go with the session
    that it is in."""
    if is_temporary(path.name):
        raise UnavailableError(f"{path}: what is called so is swept away as temporary; let its name end in .kvo")
    parent = path.absolute().parent
    if parent.suffix == ".kvo":
        raise UnavailableError(f"{path}: {parent} is a session, and another one cannot be in it")


def taken(error: OSError, path: Path) -> UnavailableError | None:
    """What it means that a folder could not be renamed to ``path``, where somebody was faster; None otherwise."""
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return UnavailableError(f"{path}: exists already")
    return None


def sweep(parent: Path) -> list[str]:
    """Remove the temporary folders of processes that are gone; their names. A folder that cannot be read or locked is
    left alone, and so is what is not ours in one."""
    removed = []
    for name in _temporary(parent):
        path = parent / name
        try:
            lock = FolderLock.take(path)
            if lock is None:
                continue
            if os.fstat(lock.fd).st_uid == os.getuid() and remove_ours(path):
                removed.append(name)
            lock.release()
        except OSError:  # another sweeper was faster, or the file system has no locks: nothing of ours is lost
            continue
    return removed


def remove_ours(folder: Path) -> bool:
    """Delete what is ours in a folder, and the folder itself where that is all; whether it was. What else is there
    stays, and is told once: when nothing of ours is left beside it. OSError where something cannot be deleted."""
    found = _remove_known(folder)
    with suppress(OSError):
        folder.rmdir()
        return True
    if found:
        _log.warning("%s: what is not of kvoffload stays there: %s", folder, ", ".join(sorted(os.listdir(folder))))
    return False


def _remove_known(folder: Path) -> bool:
    """Whether there was anything; links are not followed."""
    found = False
    for entry in list(os.scandir(folder)):
        is_folder = entry.is_dir(follow_symlinks=False)
        if not (is_known(entry.name) or (is_folder and entry.name.endswith(".kvo"))):
            continue
        if is_folder:
            found |= _remove_known(Path(entry.path))
            with suppress(OSError):
                os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
            found = True
    return found


def _temporary(parent: Path) -> list[str]:
    try:
        return [name for name in os.listdir(parent) if is_temporary(name)]
    except OSError as error:
        raise unusable(error, parent, what="cannot be listed") from error


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A locked folder that is gone after the block, unless it was renamed in it."""
    path, lock = make_locked(parent, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
