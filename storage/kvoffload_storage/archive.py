"""A session as one file and back (FORMAT.md, "Export"): an uncompressed tar of exactly its files."""

import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .bundle import Bundle, open_bundle
from .bundle_check import damaged_pages
from .bundle_format import MANIFEST_MAX_BYTES, MANIFEST_NAME, Manifest, decode_manifest
from .errors import IntegrityError, UnavailableError
from .format import layer_file_name, layout_of
from .locks import NEW, refuse_temporary, sweep, temporary_folder
from .page_file import storage_error
from .private_files import sync_folder

_PIECE = 8 << 20


def export_bundle(path: Path, out: Path) -> int:
    """Write the session to the new file ``out``, mode 0600, complete or not at all; its bytes."""
    bundle = open_bundle(path, direct=False)
    temporary: Path | None = None
    try:
        fd, made = tempfile.mkstemp(
            prefix=f"{out.name}.", suffix=".tmp", dir=out.absolute().parent
        )  # nobody's file yet
        temporary = Path(made)
        with os.fdopen(fd, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, source, n_bytes in _members(bundle):
                    _add(tar, name, source, n_bytes)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, out)  # unlike a rename, this never replaces a file
        return out.stat().st_size
    except OSError as error:
        raise storage_error(error, out, bundle.manifest.page_bytes) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        bundle.close()


def import_bundle(
    archive: Path, path: Path, check: Callable[[dict[str, Any]], object] = lambda session: None
) -> Manifest:
    """Make the session ``path`` from an exported file, after every byte of it was verified; ``check`` raises where what
    the manifest says of the session is nothing that its reader knows."""
    if path.exists() or path.is_symlink():
        raise UnavailableError(f"{path}: exists already")
    refuse_temporary(path)
    parent = path.absolute().parent
    sweep(parent)
    try:
        with temporary_folder(parent, NEW) as folder:
            _unpack(archive, folder)
            bundle = open_bundle(folder, direct=False)
            bundle.close_after(damaged_pages(bundle))
            check(bundle.manifest.session)
            os.rename(folder, path)
            sync_folder(parent)
            return bundle.manifest
    except OSError as error:
        raise storage_error(error, path, 0) from error


def _members(bundle: Bundle) -> Iterator[tuple[str, Path, int]]:
    """Name, file and bytes that count of everything in a session, the manifest first."""
    manifest, path = bundle.manifest, bundle.path
    yield MANIFEST_NAME, path / MANIFEST_NAME, (path / MANIFEST_NAME).stat().st_size
    for name, n_bytes in _sizes(manifest).items():
        yield name, path / name, n_bytes


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of every file that the manifest names."""
    sizes = {entry.file: entry.n_bytes for entry in (manifest.checksums, manifest.state)}
    for store in manifest.stores:
        layout = layout_of(store.shape)
        for segment in store.segments:
            for layer, n_pages in enumerate(segment.n_pages):
                sizes[f"{segment.folder}/{layer_file_name(layer)}"] = layout.page_offset(n_pages)
    return sizes


def _add(tar: tarfile.TarFile, name: str, source: Path, n_bytes: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = n_bytes, 0o600
    with source.open("rb") as file:
        tar.addfile(member, file)


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, mode="r:") as tar:
            first = tar.next()
            if first is None or first.name != MANIFEST_NAME or not first.isreg() or first.size > MANIFEST_MAX_BYTES:
                raise IntegrityError(f"{archive}: the first member is not a {MANIFEST_NAME}")
            text = _stream(tar, first).read()
            wanted = _sizes(decode_manifest(text, name=f"{archive}: {MANIFEST_NAME}"))
            (folder / MANIFEST_NAME).write_bytes(text)
            for member in iter(tar.next, None):
                if not member.isreg() or wanted.pop(member.name, None) != member.size:
                    raise IntegrityError(f"{archive}: {member.name!r} of {member.size:,} bytes is not in the manifest")
                _take(_stream(tar, member), folder / member.name, member.size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise IntegrityError(f"{archive}: not an exported session: {error}") from error
    except OSError as error:
        raise UnavailableError(f"{archive}: {error.strerror or error}") from error
    (folder / MANIFEST_NAME).chmod(0o600)
    if wanted:
        raise IntegrityError(f"{archive}: {min(wanted)} is missing")


def _stream(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None, "a regular member has bytes"
    return stream


def _take(source: IO[bytes], target: Path, n_bytes: int) -> None:
    target.parent.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        left = n_bytes
        while left:
            piece = source.read(min(_PIECE, left))
            if not piece:
                raise IntegrityError(f"{target.name}: the file ends {left:,} bytes early")
            left -= file.write(piece)
        file.flush()
        os.fsync(file.fileno())
