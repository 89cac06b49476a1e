"""Writing a session anew in the present format, its pages in one segment a store; giving back what it does not need."""

import os
from pathlib import Path
from typing import Any

from .bundle import lock_bundle, open_bundle, remove_unnamed, save_bundle
from .bundle_check import runs
from .bundle_format import Manifest
from .file import FileStore
from .file_reads import all_slices, check_slices
from .format import layer_file_name, layout_of
from .locks import FolderLock
from .manifests import read_manifest
from .page_file import storage_error
from .segments import Sealed
from .space import Room

MOST_SEGMENTS = 8  # every segment costs an open file a layer


def rewrite_bundle(path: Path, held: FolderLock | None = None, *, room: Room | None = None) -> Manifest:
    """Verify every page and write it to new files in the place of the old ones; the new manifest. ``held`` is the lock
    where the caller has it, ``room`` that of the folder around, which holds both for a while."""
    room = room or Room(path.absolute().parent)
    lock = held or lock_bundle(path)
    bundle = open_bundle(path)
    stores: list[FileStore] = []
    try:
        for sealed in bundle.stores:
            n_pages = max(sealed.n_pages(layer) for layer in range(sealed.shape.n_layers))
            bounds: dict[str, Any] = {"max_bytes": room.max_bytes, "floor_bytes": room.floor_bytes}
            stores.append(FileStore(room.folder, sealed.shape, capacity_pages=n_pages, **bounds))
            _copy(bundle.path, sealed, stores[-1])
        new = [store.seal() for store in stores]
        return save_bundle(path, new, bundle.state, bundle.manifest.session, lock=lock, room=room)[0]
    finally:
        for store in stores:
            store.close()
        bundle.close()
        if held is None:
            lock.release()


def reclaim_bundle(path: Path) -> None:
    """Give back what interrupted saves left in a session, and what its files have allocated behind their last page.
    Files with another name (a fork's, a living store's) stay as they are. Who calls it holds the lock."""
    manifest = read_manifest(path)
    remove_unnamed(path, manifest)
    for store in manifest.stores:
        layout = layout_of(store.shape)
        for segment in store.segments:
            for layer, n_pages in enumerate(segment.n_pages):
                _trim(path / segment.folder / layer_file_name(layer), layout.page_offset(n_pages))


def _trim(file: Path, n_bytes: int) -> None:
    try:
        fd = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # missing or not ours to write: whoever reads the session says so
        return
    try:
        state = os.fstat(fd)
        if state.st_nlink == 1 and state.st_size > n_bytes:
            os.ftruncate(fd, n_bytes)
    except OSError as error:
        raise storage_error(error, file, 0) from error
    finally:
        os.close(fd)


def is_scattered(manifest: Manifest) -> bool:
    """Whether a session was gone on with so often that it should be written anew."""
    return any(len(store.segments) > MOST_SEGMENTS for store in manifest.stores)


def _copy(path: Path, sealed: Sealed, target: FileStore) -> None:
    for layer in range(sealed.shape.n_layers):
        for first, pages in runs(sealed, layer):
            ids = all_slices(first, len(pages), sealed.shape.n_slices)
            check_slices(pages.flatten(0, 1), *ids, sealed.checksums[layer], directory=path, layer=layer)
            target.append(layer, pages)
