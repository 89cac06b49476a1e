"""The room that sessions take in a folder, and making some by deleting those that may go."""

import shutil
from pathlib import Path

from .bundle import read_manifest
from .errors import StorageError
from .locks import REMOVED, FolderLock, make_locked


class SessionSpace:
    """The sessions ``*.kvo`` in one folder, beside which a store writes its pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def used_bytes(self, own: set[int]) -> int:
        """Bytes on the disk of all sessions, files that several share counted once and inodes ``own`` not at all."""
        found = {}
        for path in self.folder.glob("*.kvo/**/*"):
            try:
                state = path.lstat()
            except FileNotFoundError:
                continue
            found[state.st_ino] = state.st_blocks * 512
        return sum(n_bytes for inode, n_bytes in found.items() if inode not in own)

    def evict(self) -> str | None:
        """Delete the session that was saved longest ago among those that are not pinned and that nobody writes to; its
        name, or None where there is none."""
        for _, path in sorted(self._evictable()):
            lock = FolderLock.take(path)
            if lock is None:
                continue
            away, mine = make_locked(self.folder, REMOVED)
            path.rename(away / path.name)
            shutil.rmtree(away, ignore_errors=True)
            mine.release()
            lock.release()
            return path.name
        return None

    def _evictable(self) -> list[tuple[float, Path]]:
        found = []
        for path in self.folder.glob("*.kvo"):
            try:
                manifest = read_manifest(path)
            except StorageError:  # damaged or not a session: nobody said that it may go
                continue
            if not manifest.pinned:
                found.append((manifest.saved_at, path))
        return found
