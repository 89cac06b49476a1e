"""Sessions on disk (FORMAT.md, "A session"): opening them, and saving them in an order that leaves none torn."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bring import bring_segment
from .bundle_format import (
    FORMAT_NAME,
    MANIFEST_NAME,
    VERSION,
    ChecksumsEntry,
    Manifest,
    StateEntry,
    StoreEntry,
    encode_manifest,
    is_known,
    new_name,
)
from .disk import reads_directly
from .errors import IntegrityError, UnavailableError
from .format import Checksums, checksum, decode_checksums, encode_checksums
from .locks import NEW, REMOVED, FolderLock, make_locked, refuse_place, remove_ours, sweep, taken
from .manifests import read_manifest, replace_manifest
from .page_file import storage_error, unusable
from .private_files import make_private, read_checked, sync_folder, write_private
from .segments import Sealed, Segment
from .space import Room, on_disk

_ATTEMPTS = 20


@dataclass(frozen=True)
class Bundle:
    """A session as it was found: its manifest, its state file, and the open page files of every store."""

    path: Path
    manifest: Manifest
    state: bytes
    stores: tuple[Sealed, ...]

    @property
    def lost(self) -> IntegrityError | None:
        """That the first of the pages is not there which are lost with their files; None where all files are whole."""
        found = [error for store in self.stores for segment in store.segments for error in segment.lost]
        return min(found, key=lambda error: error.page or 0, default=None)

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


def open_bundle(path: Path, *, direct: bool | None = None) -> Bundle:
    """Open a session for reading; pages are not read yet. ``direct`` None finds out whether direct I/O works."""
    bundle = open_remains(path, direct=direct)
    if bundle.lost is not None:
        bundle.close()
        raise bundle.lost
    return bundle


def open_remains(path: Path, *, direct: bool | None = None) -> Bundle:
    """As ``open_bundle``, also where page files are ``lost`` or cut short.

    A save by another process may replace files in between: then the manifest is another one, and all begins again.
    """
    for _ in range(_ATTEMPTS):
        manifest = read_manifest(path)
        try:
            bundle = _open(path, manifest, reads_directly(path / MANIFEST_NAME) if direct is None else direct)
            if bundle.lost is None or read_manifest(path) == manifest:
                return bundle
            bundle.close()
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
        segments, before = [], [0] * store.n_layers
        for s in store.segments:
            segments.append(Segment.open(path / s.folder, store.shape, s.n_pages, before=before, direct=direct))
            before = [n + m for n, m in zip(before, s.n_pages, strict=True)]
        stores.append(Sealed(store.shape, tuple(segments), checksums))
    return Bundle(path, manifest, state, tuple(stores))


def lock_bundle(path: Path) -> FolderLock:
    """The right to write to a session, which nobody else may read from now on where it is this user's; UnavailableError
    when another process has it."""
    try:
        lock = FolderLock.take(path)
        if lock is not None:
            make_private(path)
    except OSError as error:
        raise unusable(error, path, what="cannot be locked") from error
    if lock is None:
        raise UnavailableError(f"{path}: another process is writing to this session")
    return lock


@dataclass(frozen=True)
class Content:
    """What is saved."""

    stores: Sequence[Sealed]
    state: bytes
    session: dict[str, Any]


def save_bundle(
    path: Path,
    stores: Sequence[Sealed],
    state: bytes,
    session: dict[str, Any],
    *,
    lock: FolderLock | None = None,
    pinned: bool | None = None,
    room: Room | None = None,
    keep: Manifest | None = None,
) -> tuple[Manifest, FolderLock]:
    """Make or replace the session at ``path`` in the order of FORMAT.md, and give the lock on it, which is ``lock``
    where the caller has it already. ``pinned`` None keeps what is there (True for a new one). ``room`` is that of the
    folder around it; what ``keep`` names stays, so that it can be put back (``revert_bundle``)."""
    sweep(path.absolute().parent)
    room = room or Room(path.absolute().parent)
    content = Content(stores, state, session)
    if not (path.exists() or path.is_symlink()):
        return _make(path, content, room, pinned=pinned is not False)
    held = lock
    lock = held or lock_bundle(path)
    try:
        old = read_manifest(path)
        return _replace(path, content, room, old, pinned=old.pinned if pinned is None else pinned, keep=keep), lock
    except BaseException:
        if held is None:
            lock.release()
        raise


def revert_bundle(path: Path, manifest: Manifest) -> None:
    """Put an earlier manifest back, whose files were kept; who calls it holds the lock."""
    replace_manifest(path, manifest)
    remove_unnamed(path, manifest)


def _replace(
    path: Path, content: Content, room: Room, old: Manifest, *, pinned: bool, keep: Manifest | None
) -> Manifest:  # fmt: skip
    kept = [old] if keep is None else [old, keep]
    try:
        manifest = _publish(path, content, room, old, pinned=pinned)
    except BaseException:
        remove_unnamed(path, *kept, read_manifest(path))  # which may be the new one, where only its sync failed
        raise
    remove_unnamed(path, manifest, *kept[1:])
    return manifest


def _make(path: Path, content: Content, room: Room, *, pinned: bool) -> tuple[Manifest, FolderLock]:
    refuse_place(path)
    parent = path.absolute().parent
    try:
        folder, lock = make_locked(parent, NEW)
    except OSError as error:
        raise storage_error(error, parent / path.name, 0) from error
    try:
        manifest = _publish(folder, content, room, None, pinned=pinned)
        os.rename(folder, path)
    except OSError as error:
        raise taken(error, path) or storage_error(error, path, 0) from error
    finally:
        if not path.exists():
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # nothing is there any more after the rename
    sync_folder(parent)
    return manifest, lock


def _publish(path: Path, content: Content, room: Room, old: Manifest | None, *, pinned: bool) -> Manifest:
    table = b"".join(encode_checksums(store.checksums) for store in content.stores)
    files = {new_name("checksums"): table, new_name("state"): content.state}
    table_name, state_name = files
    manifest = Manifest(
        format=FORMAT_NAME,
        version=VERSION,
        stores=tuple(_link_store(path, store, room, old) for store in content.stores),
        checksums=ChecksumsEntry(file=table_name, n_bytes=len(table), xxh3_64=f"{checksum(table):016x}"),
        state=StateEntry(file=state_name, n_bytes=len(content.state), xxh3_64=f"{checksum(content.state):016x}"),
        pinned=pinned,
        saved_at=time.time(),
        session=content.session,
    )
    with room.taking(on_disk(len(table), len(content.state), len(encode_manifest(manifest)))):
        for name, data in files.items():
            write_private(path / name, data)
        sync_folder(path)
        replace_manifest(path, manifest)
    return manifest


def _link_store(path: Path, store: Sealed, room: Room, old: Manifest | None) -> StoreEntry:
    shape = store.shape
    named = {} if old is None else {s.folder: s for entry in old.stores for s in entry.segments}
    entries = tuple(bring_segment(path, segment, room, named.get(segment.name)) for segment in store.segments)
    return StoreEntry(n_layers=shape.n_layers, n_slices=shape.n_slices, slice_bytes=shape.slice_bytes, segments=entries)


def remove_unnamed(path: Path, *manifests: Manifest) -> None:
    """Delete what an interrupted save, or an earlier manifest, left behind."""
    named = {MANIFEST_NAME}.union(*(manifest.files for manifest in manifests))
    for entry in os.scandir(path):
        if entry.name in named or not is_known(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def remove_bundle(path: Path) -> None:
    """Delete a session: first it loses its name, then its files go; what is not ours in it stays under the other name.
    UnavailableError when it is in use or none."""
    read_or_damaged(path)
    parent = path.absolute().parent
    sweep(parent)
    lock = lock_bundle(path)
    away = parent / f"{REMOVED}{new_name('pages')[6:]}"
    try:
        os.rename(path, away)
        sync_folder(parent)
        remove_ours(away)
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
