"""The folder of one file store: made with a unique name, removed again unless it is kept."""

import errno
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from .errors import CapacityError, UnavailableError


class StoreDirectory:
    """A new folder, mode 0700, inside ``parent`` (None: the system's folder for temporary files).

    It is removed by ``remove``, when the object is dropped and at interpreter exit, unless ``keep`` came before.
    """

    def __init__(self, parent: Path | None) -> None:
        try:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix="kvoffload-", dir=parent))
        except OSError as error:
            where = parent or tempfile.gettempdir()
            kind = CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UnavailableError
            raise kind(f"{where}: cannot make a folder: {os.strerror(error.errno or 0)}") from error
        remover = weakref.finalize(self, _remove_tree, self.path)
        self._remover: weakref.finalize[[Path], StoreDirectory] | None = remover

    @classmethod
    def of_kept(cls, path: Path) -> "StoreDirectory":
        """The folder of a kept store, which is never removed."""
        directory = cls.__new__(cls)
        directory.path = path
        directory._remover = None
        return directory

    def keep(self) -> None:
        if self._remover is not None:
            self._remover.detach()

    def remove(self) -> None:
        if self._remover is not None:
            self._remover()


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
