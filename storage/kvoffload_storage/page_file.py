"""One layer's file: created with its header, preallocated, grown, written at page boundaries."""

import errno
import os
import resource
import shutil
import weakref
from pathlib import Path

from .aligned import BLOCK_BYTES, aligned_empty
from .errors import CapacityError, IntegrityError, StorageError, UnavailableError
from .format import HEADER_BYTES, Header, PageLayout, decode_header, encode_header, layer_file_name, layout_of

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class PageFile:
    """An open layer file, the owner of its descriptor.

    Thread-safety: ``fd`` is only used with positioned reads and writes, so any number of threads may use it. Every job
    in flight holds the PageFile, and the descriptor closes with the last reference or with ``close``; hence no job can
    ever meet a descriptor number that was given to another file. ``close`` is called after the threads have stopped.
    """

    def __init__(self, path: Path, fd: int, layout: PageLayout, *, direct: bool) -> None:
        self.path = path
        self.fd = fd
        self.layout = layout
        self.direct = direct
        self.n_allocated = max(0, (os.fstat(fd).st_size - HEADER_BYTES) // layout.page_stride)
        self._closer = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, directory: Path, header: Header, *, n_pages: int, direct: bool) -> "PageFile":
        """A new file with its header and room for ``n_pages``; CapacityError when the disk has none."""
        path = directory / layer_file_name(header.layer)
        try:
            fd = os.open(path, _flags(direct) | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise storage_error(error, path, HEADER_BYTES) from error
        file = cls(path, fd, layout_of(header.shape), direct=direct)
        block = aligned_empty(HEADER_BYTES).numpy()
        block[:] = memoryview(encode_header(header))
        try:
            file.allocate(n_pages)
            write_all(fd, block.data, 0)
        except OSError as error:
            raise storage_error(error, path, HEADER_BYTES) from error
        return file

    @classmethod
    def reopen(cls, directory: Path, header: Header, *, direct: bool) -> "PageFile":
        """A kept file, for reading; IntegrityError when it is missing or has another header."""
        path = directory / layer_file_name(header.layer)
        if path.exists() and not path.is_file():
            raise IntegrityError(f"{path}: is no file")
        try:
            fd = os.open(path, _flags(direct) & ~os.O_RDWR | os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise lost_file(error, path) from error
        file = cls(path, fd, layout_of(header.shape), direct=direct)
        block = aligned_empty(HEADER_BYTES).numpy()
        try:
            n_read = os.preadv(fd, [block.data], 0)
        except OSError as error:
            raise storage_error(error, path, 0) from error
        found = decode_header(block[:n_read].tobytes(), name=str(path))
        if found != header:
            raise IntegrityError(f"{path}: header says {found}, expected {header}")
        return file

    @classmethod
    def stand_in(cls, directory: Path, header: Header) -> "PageFile":
        """In memory, for reading in the place of a lost file: its header and no pages."""
        path = directory / layer_file_name(header.layer)
        try:
            fd = os.memfd_create(path.name, os.MFD_CLOEXEC)
            file = cls(path, fd, layout_of(header.shape), direct=False)
            write_all(fd, memoryview(encode_header(header)), 0)
        except OSError as error:
            raise storage_error(error, path, HEADER_BYTES) from error
        return file

    def again(self) -> "PageFile":
        """The same open file through a descriptor of its own."""
        try:
            return PageFile(self.path, os.dup(self.fd), self.layout, direct=self.direct)
        except OSError as error:
            raise storage_error(error, self.path, 0) from error

    def allocate(self, n_pages: int) -> None:
        """Make room for ``n_pages`` in all; CapacityError, and the file as it was, when the disk has none."""
        if n_pages <= self.n_allocated and self.n_allocated:
            return
        before = os.fstat(self.fd).st_size
        size = self.layout.page_offset(n_pages)
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            os.ftruncate(self.fd, before)
            raise storage_error(error, self.path, size - before) from error
        self.n_allocated = n_pages

    def trim(self, n_pages: int) -> None:
        """Give back what is allocated behind the first ``n_pages``, all of which are written."""
        try:
            os.ftruncate(self.fd, self.layout.page_offset(n_pages))
        except OSError as error:
            raise storage_error(error, self.path, 0) from error
        self.n_allocated = n_pages

    def close(self) -> None:
        self._closer()
        self.fd = -1  # the number may be another file's from now on


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """``pwrite`` until every byte of ``view`` is written."""
    while view:
        n_written = os.pwrite(fd, view, offset)
        if n_written == 0:
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[n_written:], offset + n_written


def storage_error(error: OSError, path: Path, n_bytes: int) -> StorageError:
    """What a failed system call on ``path`` means: CapacityError when there was no room for ``n_bytes`` or no file may
    be opened any more, UnavailableError when it is not allowed."""
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(path.parent).free
        return CapacityError(f"{path}: no room for {n_bytes:,} bytes, {free:,} bytes free ({error.strerror})")
    if error.errno in _NO_DESCRIPTOR:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return CapacityError(f"{path}: {error.strerror} (this process may have {limit:,}, see `ulimit -n`)")
    kind = UnavailableError if error.errno in _NOT_ALLOWED else StorageError
    return kind(f"{path}: {error.strerror or error}")


def lost_file(error: OSError, path: Path) -> StorageError:
    """What it means that a file which a manifest names cannot be opened: IntegrityError when there is none."""
    if error.errno in _NO_FILE:
        return IntegrityError(f"{path}: {error.strerror}")
    return storage_error(error, path, 0)


def unusable(error: OSError, path: Path, *, what: str) -> StorageError:
    """What it means that the user's ``path`` cannot be used so: UnavailableError unless there was no room."""
    found = storage_error(error, path, 0)
    return found if isinstance(found, CapacityError) else UnavailableError(f"{path}: {what}: {error.strerror}")


def _flags(direct: bool) -> int:
    assert HEADER_BYTES == BLOCK_BYTES
    return os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
