"""Small files that are written once, read whole and never followed through a link; what only its owner may read."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .bundle_format import is_known
from .errors import IntegrityError
from .format import checksum
from .page_file import lost_file, storage_error, write_all


def write_private(path: Path, data: bytes) -> None:
    """A new file, mode 0600, on the disk when this returns; nothing is left of it when it fails."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error, path, len(data)) from error
    try:
        write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage_error(error, path, len(data)) from error
    finally:
        os.close(fd)


def read_private(path: Path, max_bytes: int) -> bytes:
    """The whole file; FileNotFoundError if there is none in such a folder, IntegrityError if it is longer or no
    file of its own."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise lost_file(error, path) from error
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise IntegrityError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(size)
    except OSError as error:
        raise lost_file(error, path) from error
    finally:
        os.close(fd)


def read_checked(path: Path, n_bytes: int, xxh3_64: str) -> bytes:
    """The whole file; IntegrityError if it is not the one that was written."""
    data = read_private(path, n_bytes)
    if len(data) != n_bytes:
        raise IntegrityError(f"{path}: {len(data):,} bytes, expected {n_bytes:,}")
    if (found := f"{checksum(data):016x}") != xxh3_64:
        raise IntegrityError(f"{path}: checksum {found}, expected {xxh3_64}")
    return data


def sync_folder(path: Path) -> None:
    """Return when the disk has the folder's entries."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise storage_error(error, path, 0) from error


def make_private(folder: Path) -> list[Path]:
    """Give what is ours in a session, and this user's, modes 0700 and 0600 again; what stays open to others."""
    left = []
    for path in [folder, *_ours(folder)]:
        state = path.lstat()
        if stat.S_ISLNK(state.st_mode) or not state.st_mode & 0o077:
            continue
        if state.st_uid != os.getuid() or not _set_mode(path, 0o700 if stat.S_ISDIR(state.st_mode) else 0o600):
            left.append(path)
    return left


def _set_mode(path: Path, mode: int) -> bool:
    """Whether it could be done; a link is not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def _ours(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if is_known(entry.name):
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _ours(Path(entry.path))
