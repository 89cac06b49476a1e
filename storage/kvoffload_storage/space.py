"""The room in a folder: whether bytes may be added to it, and making some by deleting sessions that may go."""

import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .aligned import BLOCK_BYTES
from .disk import free_bytes
from .errors import CapacityError, StorageError
from .locks import REMOVED, FolderLock, is_temporary, make_locked, remove_ours
from .manifests import read_manifest
from .page_file import unusable


@dataclass(frozen=True)
class Room:
    """``max_bytes`` bounds what all processes' pages and sessions take in ``folder`` (of temporary folders only
    ``alone`` where that is given, and no session), ``floor_bytes`` is what stays free on its disk. Where it ``spares``
    sessions, none is deleted.

    Whoever adds bytes asks first, by ``taking``.
    """

    folder: Path
    max_bytes: int | None = None
    floor_bytes: int = 0
    alone: str | None = None
    spares: bool = False

    @contextmanager
    def taking(self, n_bytes: int, links: Sequence[os.stat_result] = ()) -> Iterator[list[str]]:
        """In this block ``n_bytes`` may be allocated and links to those files made; gives the names of sessions that
        were deleted for it. No other process asks meanwhile, so allocate in the block what takes long to write.
        CapacityError where there is no room; nothing is deleted then."""
        if self.max_bytes is None and not self.floor_bytes:
            yield []
            return
        with self._locked():
            yield self._make(n_bytes, links)

    def fits(self, n_bytes: int) -> bool:
        """Whether there is room without deleting anything; asked within ``taking``."""
        return self._refusal(n_bytes) is None

    def evict(self) -> str | None:
        """Delete the session that was saved longest ago among those that are not pinned and that nobody writes to; its
        name, or None where there is none."""
        with self._that_may_go() as sessions:
            for path in sessions:
                self._remove(path)
                return path.name
        return None

    def _make(self, n_bytes: int, links: Sequence[os.stat_result]) -> list[str]:
        why, evicted = self._refusal(n_bytes, links), []
        if why is None:
            return []
        with self._that_may_go() as sessions:
            if self._refusal(n_bytes, links, gone={path.name for path in sessions}) is not None:
                raise CapacityError(why)
            for path in sessions:
                self._remove(path)
                evicted.append(path.name)
                if (why := self._refusal(n_bytes, links)) is None:
                    return evicted
        raise CapacityError(why)

    def _refusal(self, n_bytes: int, links: Sequence[os.stat_result] = (), gone: Collection[str] = ()) -> str | None:
        """Why there is no room, if the sessions ``gone`` were not there; None where there is."""
        held = self._files(gone) if gone or self.max_bytes is not None else {}
        n_held = sum(held.values())
        n_new = n_bytes + sum(_bytes(file) for file in links if file.st_ino not in held)
        if self.max_bytes is not None and n_new and n_held + n_new > self.max_bytes:
            return (f"{self.folder}: {n_new:,} bytes more would make {n_held + n_new:,} bytes of pages and sessions, "
                    f"the cap is {self.max_bytes:,}")  # fmt: skip
        if not (self.floor_bytes and n_bytes):
            return None
        freed = sum(self._files().values()) - n_held if gone else 0
        left = free_bytes(self.folder) + freed - n_bytes
        if left >= self.floor_bytes:
            return None
        return (f"{self.folder}: {n_bytes:,} bytes more would leave {max(left, 0):,} bytes free on the disk, the floor "
                f"is {self.floor_bytes:,}")  # fmt: skip

    def _files(self, gone: Collection[str] = ()) -> dict[int, int]:
        """Inode and bytes on the disk of every file that counts, but for those of the sessions ``gone``."""
        found: dict[int, int] = {}
        for name in os.listdir(self.folder):
            ours = name.endswith(".kvo") or is_temporary(name)
            if ours and name not in gone and self.alone in (None, name):
                for at, _, files in os.walk(self.folder / name):
                    found.update(_blocks(Path(at), files))
        return found

    @contextmanager
    def _that_may_go(self) -> Iterator[list[Path]]:
        """Sessions that are not pinned and not in use, oldest first; nobody else takes them in this block."""
        found = []
        with ExitStack() as locks:
            for path in () if self.spares or self.alone is not None else self.folder.glob("*.kvo"):
                try:
                    manifest = read_manifest(path)
                    lock = None if manifest.pinned else FolderLock.take(path)
                except (StorageError, OSError):  # damaged or not a session: nobody said that it may go
                    continue
                if lock is not None:
                    locks.callback(lock.release)
                    found.append((manifest.saved_at, path))
            yield [path for _, path in sorted(found)]

    def _remove(self, path: Path) -> None:
        away, mine = make_locked(self.folder, REMOVED)
        path.rename(away / path.name)
        with suppress(OSError):
            remove_ours(away)
        mine.release()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.alone is not None:  # nobody else counts the same files
            yield
            return
        try:
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise unusable(error, self.folder, what="cannot be locked") from error
        try:
            _flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            _flock(fd, fcntl.LOCK_UN)  # a forked process may have the descriptor too
            os.close(fd)


def on_disk(*sizes: int) -> int:
    """Bytes that files of these sizes take."""
    return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)


def _flock(fd: int, how: int) -> None:
    try:
        fcntl.flock(fd, how)
    except OSError:  # a file system without locks
        return


def _blocks(folder: Path, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    for name in names:
        try:
            state = (folder / name).lstat()
        except FileNotFoundError:
            continue
        yield state.st_ino, _bytes(state)


def _bytes(file: os.stat_result) -> int:
    return file.st_blocks * 512
