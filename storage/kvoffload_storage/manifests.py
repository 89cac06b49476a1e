"""The manifest of a session on disk: read, and replaced as the last step of a save."""

import os
from pathlib import Path

from .bundle_format import MANIFEST_MAX_BYTES, MANIFEST_NAME, Manifest, decode_manifest, encode_manifest
from .errors import UnavailableError
from .page_file import storage_error
from .private_files import read_private, sync_folder, write_private


def read_manifest(path: Path) -> Manifest:
    """What a session consists of; UnavailableError if there is none, IntegrityError if it is damaged."""
    try:
        return decode_manifest(read_private(path / MANIFEST_NAME, MANIFEST_MAX_BYTES), name=str(path / MANIFEST_NAME))
    except FileNotFoundError:
        if not path.exists():
            raise UnavailableError(f"{path}: there is no such session") from None
    raise UnavailableError(f"{path}: not a session (a folder with a {MANIFEST_NAME})")


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
