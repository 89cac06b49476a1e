"""The files that make a directory a kept store: checksum table and manifest, through aiofiles."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import aiofiles

from .errors import IntegrityError
from .format import (
    CHECKSUMS_NAME,
    MANIFEST_MAX_BYTES,
    MANIFEST_NAME,
    Manifest,
    checksum,
    decode_checksums,
    decode_manifest,
    encode_checksums,
    encode_manifest,
)
from .page_file import storage_error
from .store import StoreShape

T = TypeVar("T")


def write_kept(directory: Path, shape: StoreShape, checksums: Sequence[Sequence[int]]) -> None:
    """Declare the pages of ``checksums`` kept: table first, manifest last, each by rename."""
    table = encode_checksums(checksums)
    manifest = Manifest(shape, tuple(len(layer) for layer in checksums), checksum(table))
    _run(lambda: _publish(directory, CHECKSUMS_NAME, table))
    _run(lambda: _publish(directory, MANIFEST_NAME, encode_manifest(manifest)))


def read_kept(directory: Path) -> tuple[Manifest, list[list[int]]]:
    """Manifest and checksums per layer; IntegrityError when either is missing or not as FORMAT.md demands."""
    text = _run(lambda: _load(directory / MANIFEST_NAME, MANIFEST_MAX_BYTES))
    manifest = decode_manifest(text, name=str(directory / MANIFEST_NAME))
    table = _run(lambda: _load(directory / CHECKSUMS_NAME, 8 * sum(manifest.n_pages)))
    return manifest, decode_checksums(table, manifest, name=str(directory / CHECKSUMS_NAME))


def _run(start: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run a coroutine to its end on a thread of its own: the caller may be inside an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(start())).result()


async def _publish(directory: Path, name: str, data: bytes) -> None:
    temporary = directory / f"{name}.tmp"
    try:
        async with aiofiles.open(temporary, "wb", opener=_private) as file:
            await file.write(data)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        temporary.replace(directory / name)
        await asyncio.to_thread(_sync_directory, directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(error, temporary, len(data)) from error


async def _load(path: Path, max_bytes: int) -> bytes:
    try:
        async with aiofiles.open(path, "rb", opener=_no_links) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise IntegrityError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}")
            return await file.read()
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
