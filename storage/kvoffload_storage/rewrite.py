"""Writing a session anew in the present format, its pages in one segment a store."""

from pathlib import Path

from .bundle import lock_bundle, open_bundle, save_bundle
from .bundle_check import runs
from .bundle_format import Manifest
from .file import FileStore
from .file_reads import all_slices, check_slices
from .locks import FolderLock
from .segments import Sealed

MOST_SEGMENTS = 8  # every segment costs an open file a layer


def rewrite_bundle(path: Path, held: FolderLock | None = None) -> Manifest:
    """Verify every page and write it to new files in the place of the old ones; the new manifest. ``held`` is the lock
    where the caller has it."""
    lock = held or lock_bundle(path)
    bundle = open_bundle(path)
    stores: list[FileStore] = []
    try:
        for sealed in bundle.stores:
            stores.append(FileStore(path.absolute().parent, sealed.shape))
            _copy(bundle.path, sealed, stores[-1])
        new = [store.seal() for store in stores]
        return save_bundle(path, new, bundle.state, bundle.manifest.session, lock=lock)[0]
    finally:
        for store in stores:
            store.close()
        bundle.close()
        if held is None:
            lock.release()


def is_scattered(manifest: Manifest) -> bool:
    """Whether a session was gone on with so often that it should be written anew."""
    return any(len(store.segments) > MOST_SEGMENTS for store in manifest.stores)


def _copy(path: Path, sealed: Sealed, target: FileStore) -> None:
    for layer in range(sealed.shape.n_layers):
        for first, pages in runs(sealed, layer):
            ids = all_slices(first, len(pages), sealed.shape.n_slices)
            check_slices(pages.flatten(0, 1), *ids, sealed.checksums[layer], directory=path, layer=layer)
            target.append(layer, pages)
