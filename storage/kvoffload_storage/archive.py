"""A session as one file and back (FORMAT.md, "Export"): an uncompressed tar of exactly its files."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .archive_format import ARCHIVE_END, BLOCK_BYTES, decode_member, encode_member, padding_bytes
from .bundle import Bundle, open_bundle
from .bundle_check import damaged_pages
from .bundle_format import MANIFEST_MAX_BYTES, MANIFEST_NAME, Manifest, decode_manifest, encode_manifest, new_name
from .errors import IntegrityError, UnavailableError
from .format import encode_checksums, layer_file_name, layout_of
from .locks import NEW, refuse_place, sweep, taken, temporary_folder
from .page_file import PageFile, storage_error, unusable
from .private_files import sync_folder, write_private
from .space import Room, on_disk

_PIECE = 8 << 20


def export_bundle(path: Path, out: Path, *, room: Room | None = None) -> int:
    """Write the session to the new file ``out``, mode 0600, complete or not at all; its bytes. What killed exports left
    in its folder is removed. CapacityError where ``room``, that of the folder, or the disk has none for it."""
    bundle, parent = open_bundle(path, direct=False), out.absolute().parent
    try:
        sweep(parent)
        with temporary_folder(parent, NEW) as folder:
            made = folder / new_name("export")
            _pack(bundle, made, room or Room(parent))
            os.link(made, out)  # unlike a rename, this never replaces a file
        sync_folder(parent)
        return out.stat().st_size
    except OSError as error:
        raise storage_error(error, out, bundle.manifest.page_bytes) from error
    finally:
        bundle.close()


def import_bundle(
    archive: Path, path: Path, check: Callable[[Bundle], object] = lambda bundle: None, *, room: Room | None = None
) -> Manifest:
    """Make the session ``path`` from an exported file, after every byte of it was verified; ``check`` raises where what
    it says beside its pages is nothing that its reader knows. CapacityError where ``room``, that of the folder around
    it, or the disk has none for it."""
    if path.exists() or path.is_symlink():
        raise UnavailableError(f"{path}: exists already")
    refuse_place(path)
    parent = path.absolute().parent
    sweep(parent)
    with _open(archive) as source:
        n_bytes = os.fstat(source.fileno()).st_size
        try:
            with temporary_folder(parent, NEW) as folder:
                manifest = _unpack_checked(source, folder, check, room or Room(parent))
                os.rename(folder, path)
                sync_folder(parent)
                return manifest
        except OSError as error:  # not the archive's: those are told by what reads it
            raise taken(error, path) or storage_error(error, path, n_bytes) from error


def _pack(bundle: Bundle, made: Path, room: Room) -> None:
    """Everything of the open session, whoever saves it anew meanwhile; the manifest first."""
    manifest = bundle.manifest
    table = b"".join(encode_checksums(store.checksums) for store in bundle.stores)
    small = {
        MANIFEST_NAME: encode_manifest(manifest),
        manifest.checksums.file: table,
        manifest.state.file: bundle.state,
    }
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    sizes = [*_sizes(manifest).values(), len(small[MANIFEST_NAME])]
    n_bytes = sum(BLOCK_BYTES + size + padding_bytes(size) for size in sizes) + len(ARCHIVE_END)
    with os.fdopen(fd, "wb") as out:
        with room.taking(on_disk(n_bytes)):
            os.posix_fallocate(fd, 0, n_bytes)
        for name, data in small.items():
            _put(out, name, len(data), [data])
        for segment in (segment for store in bundle.stores for segment in store.segments):
            for layer, (file, n_pages) in enumerate(zip(segment.files, segment.n_pages, strict=True)):
                n_bytes = file.layout.page_offset(n_pages)
                _put(out, f"{segment.name}/{layer_file_name(layer)}", n_bytes, _pieces(file, n_bytes))
        out.write(ARCHIVE_END)
        out.flush()
        os.fsync(out.fileno())


def _put(out: BinaryIO, name: str, n_bytes: int, pieces: Iterable[bytes]) -> None:
    out.write(encode_member(name, n_bytes))
    for piece in pieces:
        out.write(piece)
    out.write(bytes(padding_bytes(n_bytes)))


def _pieces(file: PageFile, n_bytes: int) -> Iterator[bytes]:
    offset = 0
    while offset < n_bytes:
        piece = os.pread(file.fd, min(_PIECE, n_bytes - offset), offset)
        if not piece:
            raise IntegrityError(f"{file.path}: the file ends {n_bytes - offset:,} bytes early")
        yield piece
        offset += len(piece)


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of every file that the manifest names."""
    sizes = {entry.file: entry.n_bytes for entry in (manifest.checksums, manifest.state)}
    for store in manifest.stores:
        layout = layout_of(store.shape)
        for segment in store.segments:
            for layer, n_pages in enumerate(segment.n_pages):
                sizes[f"{segment.folder}/{layer_file_name(layer)}"] = layout.page_offset(n_pages)
    return sizes


def _open(archive: Path) -> BinaryIO:
    try:
        return archive.open("rb")
    except OSError as error:
        raise unusable(error, archive, what="cannot be read") from error


def _unpack_checked(source: BinaryIO, folder: Path, check: Callable[[Bundle], object], room: Room) -> Manifest:
    try:
        _unpack(source, folder, room)
        bundle = open_bundle(folder, direct=False)
        bundle.close_after(damaged_pages(bundle))
        check(bundle)
    except IntegrityError as error:  # the folder is gone when the user reads this
        raise IntegrityError(str(error).replace(str(folder), source.name)) from error
    return bundle.manifest


def _unpack(source: BinaryIO, folder: Path, room: Room) -> None:
    first = decode_member(_read(source, BLOCK_BYTES), name=source.name)
    if first is None or first[0] != MANIFEST_NAME or first[1] > MANIFEST_MAX_BYTES:
        raise IntegrityError(f"{source.name}: the first member is not a {MANIFEST_NAME}")
    text = _read(source, first[1])
    _read(source, padding_bytes(first[1]))
    wanted = _sizes(decode_manifest(text, name=f"{source.name}: {MANIFEST_NAME}"))
    if (n_bytes := sum(wanted.values())) > os.fstat(source.fileno()).st_size:
        raise IntegrityError(f"{source.name}: shorter than the {n_bytes:,} bytes of its files")
    with room.taking(on_disk(len(text), *wanted.values())):
        _reserve(folder, wanted)
        write_private(folder / MANIFEST_NAME, text)
    while member := decode_member(_read(source, BLOCK_BYTES), name=source.name):
        name, n_bytes = member
        if wanted.pop(name, None) != n_bytes:
            raise IntegrityError(f"{source.name}: {name!r} of {n_bytes:,} bytes is not in the manifest")
        _take(source, folder / name, n_bytes)
        _read(source, padding_bytes(n_bytes))
    if wanted:
        raise IntegrityError(f"{source.name}: {min(wanted)} is missing")


def _reserve(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, n_bytes in sizes.items():
        target = folder / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if n_bytes:
                os.posix_fallocate(fd, 0, n_bytes)
        finally:
            os.close(fd)


def _take(source: BinaryIO, target: Path, n_bytes: int) -> None:
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as file:
        for done in range(0, n_bytes, _PIECE):
            file.write(_read(source, min(_PIECE, n_bytes - done)))
        file.flush()
        os.fsync(file.fileno())


def _read(source: BinaryIO, n_bytes: int) -> bytes:
    """The next ``n_bytes`` of an archive, of which no more are read than are there."""
    try:
        data = source.read(n_bytes)
    except OSError as error:
        raise storage_error(error, Path(source.name), 0) from error
    if len(data) < n_bytes:
        raise IntegrityError(f"{source.name}: the file ends {n_bytes - len(data):,} bytes early")
    return data
