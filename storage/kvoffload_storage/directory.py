"""The folder of one file store: made with a unique name, locked while it is in use, removed in the end."""

import shutil
import tempfile
import weakref
from pathlib import Path

from .locks import PAGES, FolderLock, make_locked, sweep
from .page_file import unusable


class StoreDirectory:
    """A new folder, mode 0700, inside ``parent`` (None: the system's folder for temporary files), after those of
    processes that are gone were removed.

    It is removed by ``remove``, when the object is dropped and at interpreter exit; after a kill, by the next one.
    """

    def __init__(self, parent: Path | None) -> None:
        where = parent or Path(tempfile.gettempdir())
        try:
            where.mkdir(parents=True, exist_ok=True)
            sweep(where)
            self.path, lock = make_locked(where, PAGES)
        except OSError as error:
            raise unusable(error, where, what="cannot make a folder") from error
        self._remover = weakref.finalize(self, _remove_tree, self.path, lock)

    def remove(self) -> None:
        self._remover()


def _remove_tree(path: Path, lock: FolderLock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.release()
