"""Sealed pages in files: what a session keeps, and what a new store can begin with."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import IntegrityError
from .format import Checksums, Header
from .page_file import PageFile
from .store import StoreShape


@dataclass(frozen=True)
class Segment:
    """Layer files, of which the first ``n_pages[layer]`` pages count; ``name`` is the segment's wherever it lies.
    ``lost`` has an error for every file without all of them."""

    name: str
    files: tuple[PageFile, ...]
    n_pages: tuple[int, ...]
    lost: tuple[IntegrityError, ...] = ()

    @classmethod
    def open(
        cls, folder: Path, shape: StoreShape, n_pages: Sequence[int], *, before: Sequence[int], direct: bool
    ) -> "Segment":
        """Behind ``before[layer]`` other pages, which those of the errors are counted from. A file that is missing, has
        another header or is a link is one without pages."""
        files, lost = [], []
        for layer, (n, first) in enumerate(zip(n_pages, before, strict=True)):
            file = _reopen(folder, Header(layer, shape), direct=direct)
            if isinstance(file, IntegrityError):
                lost.append(IntegrityError(str(file), layer=layer, page=first if n else 0))
                file = PageFile.stand_in(folder, Header(layer, shape))
            elif file.n_allocated < n:
                told = f"{file.path}: room for {file.n_allocated} pages, the manifest says {n}"
                lost.append(IntegrityError(told, layer=layer, page=first + file.n_allocated))
            files.append(file)
        return cls(folder.name, tuple(files), tuple(n_pages), tuple(lost))


@dataclass(frozen=True)
class Sealed:
    """Pages that stay as they are: segments in order, and the checksums of every layer's pages."""

    shape: StoreShape
    segments: tuple[Segment, ...]
    checksums: list[Checksums]

    def n_pages(self, layer: int) -> int:
        return len(self.checksums[layer])

    def first(self, n_pages: int) -> "Sealed":
        """The first pages of every layer, through descriptors of their own."""
        segments, left = [], [min(n_pages, self.n_pages(layer)) for layer in range(self.shape.n_layers)]
        for segment in self.segments:
            taken = tuple(min(n, most) for n, most in zip(segment.n_pages, left, strict=True))
            left = [n - m for n, m in zip(left, taken, strict=True)]
            if any(taken):
                segments.append(Segment(segment.name, tuple(file.again() for file in segment.files), taken))
        return Sealed(self.shape, tuple(segments), [layer[:n_pages] for layer in self.checksums])


def _reopen(folder: Path, header: Header, *, direct: bool) -> PageFile | IntegrityError:
    if folder.is_symlink() or not folder.is_dir():
        return IntegrityError(f"{folder}: not a folder")
    try:
        return PageFile.reopen(folder, header, direct=direct)
    except IntegrityError as error:
        return error


def same_file(file: PageFile, path: Path) -> bool:
    """Whether ``path`` leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fd), os.lstat(path))
    except OSError:
        return False
