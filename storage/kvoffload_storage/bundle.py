"""Sessions on disk (FORMAT.md, "A session"): opening them, and saving them in an order that leaves none torn."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle_format import (
    FORMAT_NAME,
    MANIFEST_MAX_BYTES,
    MANIFEST_NAME,
    VERSION,
    ChecksumsEntry,
    Manifest,
    SegmentEntry,
    StateEntry,
    StoreEntry,
    decode_manifest,
    encode_manifest,
    is_known,
    new_name,
)
from .disk import reads_directly
from .errors import IntegrityError, UnavailableError
from .format import Checksums, checksum, decode_checksums, encode_checksums, layer_file_name
from .locks import NEW, REMOVED, FolderLock, make_locked, refuse_temporary, sweep
from .page_file import PageFile, storage_error, unusable
from .private_files import read_checked, read_private, sync_folder, write_private
from .segments import Sealed, Segment, same_file

_ATTEMPTS = 20


@dataclass(frozen=True)
class Bundle:
    """A session as it was found: its manifest, its state file, and the open page files of every store."""

    path: Path
    manifest: Manifest
    state: bytes
    stores: tuple[Sealed, ...]

    def close_after(self, damage: Iterator[IntegrityError]) -> None:
        """Close the page files; raise the first damage, if there is any."""
        try:
            for error in damage:
                raise error
        finally:
            self.close()

    def close(self) -> None:
        """Close the page files; whoever took them over closes them instead."""
        for store in self.stores:
            for segment in store.segments:
                for file in segment.files:
                    file.close()


def read_manifest(path: Path) -> Manifest:
    """What a session consists of; UnavailableError if there is none, IntegrityError if it is damaged."""
    try:
        return decode_manifest(read_private(path / MANIFEST_NAME, MANIFEST_MAX_BYTES), name=str(path / MANIFEST_NAME))
    except FileNotFoundError:
        if not path.exists():
            raise UnavailableError(f"{path}: there is no such session") from None
    raise UnavailableError(f"{path}: not a session (a folder with a {MANIFEST_NAME})")


def open_bundle(path: Path, *, direct: bool | None = None) -> Bundle:
    """Open a session for reading; pages are not read yet. ``direct`` None finds out whether direct I/O works.

    A save by another process may replace files in between: then the manifest is another one, and all begins again.
    """
    for _ in range(_ATTEMPTS):
        manifest = read_manifest(path)
        try:
            return _open(path, manifest, reads_directly(path / MANIFEST_NAME) if direct is None else direct)
        except (IntegrityError, FileNotFoundError) as error:
            if read_manifest(path) == manifest:
                if isinstance(error, IntegrityError):
                    raise
                raise IntegrityError(f"{error.filename}: missing") from error
    raise UnavailableError(f"{path}: the session was replaced {_ATTEMPTS} times while it was opened")


def _open(path: Path, manifest: Manifest, direct: bool) -> Bundle:
    state = read_checked(path / manifest.state.file, manifest.state.n_bytes, manifest.state.xxh3_64)
    entry = manifest.checksums
    table = memoryview(read_checked(path / entry.file, entry.n_bytes, entry.xxh3_64))
    stores = []
    for store in manifest.stores:
        n_bytes = 8 * sum(store.n_pages) * store.n_slices
        checksums: list[Checksums] = decode_checksums(bytes(table[:n_bytes]), store.shape, store.n_pages)
        table = table[n_bytes:]
        segments = [Segment.open(path / s.folder, store.shape, s.n_pages, direct=direct) for s in store.segments]
        stores.append(Sealed(store.shape, tuple(segments), checksums))
    return Bundle(path, manifest, state, tuple(stores))


def lock_bundle(path: Path) -> FolderLock:
    """The right to write to a session; UnavailableError when another process has it."""
    try:
        lock = FolderLock.take(path)
    except OSError as error:
        raise unusable(error, path, what="cannot be locked") from error
    if lock is None:
        raise UnavailableError(f"{path}: another process is writing to this session")
    return lock


def save_bundle(
    path: Path,
    stores: Sequence[Sealed],
    state: bytes,
    session: dict[str, Any],
    *,
    lock: FolderLock | None = None,
    pinned: bool | None = None,
) -> tuple[Manifest, FolderLock]:
    """Make or replace the session at ``path`` in the order of FORMAT.md, and give the lock on it, which is ``lock``
    where the caller has it already. ``pinned`` None keeps what is there (True for a new one)."""
    sweep(path.absolute().parent)
    if path.exists() or path.is_symlink():
        lock = lock or lock_bundle(path)
        old = read_manifest(path)
        manifest = _publish(path, stores, state, session, pinned=old.pinned if pinned is None else pinned)
        _remove_unnamed(path, manifest)
        return manifest, lock
    return _make(path, stores, state, session, pinned=pinned is not False)


def _make(
    path: Path, stores: Sequence[Sealed], state: bytes, session: dict[str, Any], *, pinned: bool
) -> tuple[Manifest, FolderLock]:
    refuse_temporary(path)
    parent = path.absolute().parent
    try:
        folder, lock = make_locked(parent, NEW)
    except OSError as error:
        raise storage_error(error, parent / path.name, 0) from error
    try:
        manifest = _publish(folder, stores, state, session, pinned=pinned)
        os.rename(folder, path)
    except OSError as error:
        lock.release()
        raise storage_error(error, path, 0) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # nothing is there any more after the rename
    sync_folder(parent)
    return manifest, lock


def _publish(path: Path, stores: Sequence[Sealed], state: bytes, session: dict[str, Any], *, pinned: bool) -> Manifest:
    table = b"".join(encode_checksums(store.checksums) for store in stores)
    names = new_name("checksums"), new_name("state")
    entries = tuple(_link_store(path, store) for store in stores)
    for name, data in zip(names, (table, state), strict=True):
        write_private(path / name, data)
    manifest = Manifest(
        format=FORMAT_NAME,
        version=VERSION,
        stores=entries,
        checksums=ChecksumsEntry(file=names[0], n_bytes=len(table), xxh3_64=f"{checksum(table):016x}"),
        state=StateEntry(file=names[1], n_bytes=len(state), xxh3_64=f"{checksum(state):016x}"),
        pinned=pinned,
        saved_at=time.time(),
        session=session,
    )
    sync_folder(path)
    replace_manifest(path, manifest)
    return manifest


def replace_manifest(path: Path, manifest: Manifest) -> None:
    """The last step of a save; who calls it holds the lock."""
    temporary = path / f"{MANIFEST_NAME}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        write_private(temporary, encode_manifest(manifest))
        os.replace(temporary, path / MANIFEST_NAME)
    except OSError as error:
        raise storage_error(error, path / MANIFEST_NAME, 0) from error
    sync_folder(path)


def _link_store(path: Path, store: Sealed) -> StoreEntry:
    shape = store.shape
    entries = tuple(_link_segment(path, segment) for segment in store.segments)
    return StoreEntry(n_layers=shape.n_layers, n_slices=shape.n_slices, slice_bytes=shape.slice_bytes, segments=entries)


def _link_segment(path: Path, segment: Segment) -> SegmentEntry:
    """Bring a segment into the session, by hard links, or by copies into a segment of another name."""
    folder = path / segment.name
    targets = [folder / layer_file_name(layer) for layer in range(len(segment.files))]
    pairs = list(zip(segment.files, targets, strict=True))
    try:
        if not all(same_file(file, target) for file, target in pairs):
            shutil.rmtree(folder, ignore_errors=True)
            if not all(_link(file, target) for file, target in pairs):
                shutil.rmtree(folder, ignore_errors=True)
                folder = path / new_name("pages")
                for (file, target), n_pages in zip(pairs, segment.n_pages, strict=True):
                    _copy(file, folder / target.name, n_pages)
            sync_folder(folder)
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    return SegmentEntry(folder=folder.name, n_pages=segment.n_pages)


def _link(file: PageFile, target: Path) -> bool:
    """Whether ``target`` is now the open file; not so across file systems, or when its last name is gone."""
    target.parent.mkdir(mode=0o700, exist_ok=True)
    try:  # the folder's descriptor is not looked at, but makes Python call linkat, which can follow /proc's link
        os.link(f"/proc/self/fd/{file.fd}", target, src_dir_fd=file.fd, follow_symlinks=True)
    except OSError:
        return False
    return same_file(file, target)


def _copy(file: PageFile, target: Path, n_pages: int) -> None:
    target.parent.mkdir(mode=0o700, exist_ok=True)
    left = file.layout.page_offset(n_pages)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(f"/proc/self/fd/{file.fd}", "rb") as source:  # a description of its own, without direct I/O
            while left and (n := os.sendfile(fd, source.fileno(), None, min(left, 1 << 30))):
                left -= n
        os.fsync(fd)
    finally:
        os.close(fd)
    if left:
        raise IntegrityError(f"{file.path}: {left:,} bytes are missing at the end")


def _remove_unnamed(path: Path, manifest: Manifest) -> None:
    """What an interrupted save, or the manifest before this one, left behind."""
    for entry in os.scandir(path):
        if entry.name == MANIFEST_NAME or entry.name in manifest.files or not is_known(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def remove_bundle(path: Path) -> None:
    """Delete a session: first it loses its name, then its files go. UnavailableError when it is in use or none."""
    read_or_damaged(path)
    parent = path.absolute().parent
    sweep(parent)
    lock = lock_bundle(path)
    away = parent / f"{REMOVED}{new_name('pages')[6:]}"
    try:
        os.rename(path, away)
        sync_folder(parent)
        shutil.rmtree(away)
    except OSError as error:
        raise storage_error(error, path, 0) from error
    finally:
        lock.release()


def read_or_damaged(path: Path) -> Manifest | None:
    """The manifest, or None where it is damaged; raises UnavailableError where ``path`` is no session at all."""
    if path.is_symlink() or not (path / MANIFEST_NAME).exists():
        raise UnavailableError(f"{path}: there is no such session")
    try:
        return read_manifest(path)
    except IntegrityError:
        return None


def disk_bytes(path: Path) -> int:
    """Bytes that a session takes on the disk; files shared with other sessions count in each."""
    return sum(entry.lstat().st_blocks * 512 for entry in path.rglob("*"))
