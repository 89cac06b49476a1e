"""Bringing a segment into a session: by hard links, or by copies that grow from save to save."""

import os
import shutil
from pathlib import Path

from .bundle_format import SegmentEntry
from .errors import IntegrityError
from .format import layer_file_name
from .page_file import PageFile, storage_error
from .private_files import sync_folder
from .segments import Segment, same_file
from .space import Room

Pairs = list[tuple[PageFile, Path]]


def bring_segment(path: Path, segment: Segment, room: Room, known: SegmentEntry | None) -> SegmentEntry:
    """The segment inside the session at ``path``, whose manifest names it as ``known`` if it is there already. Pages
    never change under a segment's name, so copies that are there only lack the newest."""
    folder = path / segment.name
    pairs = [(file, folder / layer_file_name(layer)) for layer, file in enumerate(segment.files)]
    try:
        if all(same_file(file, target) for file, target in pairs):
            pass
        elif known is not None:
            _copy(segment, pairs, known.n_pages, room)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted save
            folder.mkdir(mode=0o700)
            if not _link(pairs, room):
                _copy(segment, pairs, (0,) * len(pairs), room)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    return SegmentEntry(folder=segment.name, n_pages=segment.n_pages)


def _link(pairs: Pairs, room: Room) -> bool:
    """Whether the targets are now the open files; not so across file systems, or when a file's last name is gone."""
    with room.taking(0, [os.fstat(file.fd) for file, _ in pairs]):
        try:  # the folder's descriptor is not looked at, but makes Python call linkat, which can follow /proc's link
            for file, target in pairs:
                os.link(f"/proc/self/fd/{file.fd}", target, src_dir_fd=file.fd, follow_symlinks=True)
            linked = all(same_file(file, target) for file, target in pairs)
        except OSError:
            linked = False
        for _, target in pairs if not linked else ():
            target.unlink(missing_ok=True)
    return linked


def _copy(segment: Segment, pairs: Pairs, n_there: tuple[int, ...], room: Room) -> None:
    """Add the pages that the targets do not have yet; the first ``n_there[layer]`` are there."""
    parts = [
        (file, target, _end(file, target, have), file.layout.page_offset(n_pages))
        for (file, target), have, n_pages in zip(pairs, n_there, segment.n_pages, strict=True)
    ]
    with room.taking(sum(max(end - start, 0) for _, _, start, end in parts)):
        for _, target, start, end in parts:
            _allocate(target, start, end)
    for file, target, start, end in parts:
        _fill(file, target, start, end)


def _end(file: PageFile, target: Path, n_pages: int) -> int:
    """Where the first ``n_pages`` of a copy end; 0 where it is not whole."""
    end = file.layout.page_offset(n_pages)
    return end if n_pages and target.exists() and target.lstat().st_size >= end else 0


def _allocate(target: Path, start: int, end: int) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if end > start:
            os.posix_fallocate(fd, start, end - start)
    finally:
        os.close(fd)


def _fill(file: PageFile, target: Path, start: int, end: int) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.lseek(fd, start, os.SEEK_SET)
        with open(f"/proc/self/fd/{file.fd}", "rb") as source:  # a description of its own, without direct I/O
            while start < end and (n := os.sendfile(fd, source.fileno(), start, min(end - start, 1 << 30))):
                start += n
        os.fsync(fd)
    finally:
        os.close(fd)
    if start < end:
        raise IntegrityError(f"{file.path}: {end - start:,} bytes are missing at the end")
