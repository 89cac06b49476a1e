"""Reading every page of a session, to find damage or to write it anew; nothing is written beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from .aligned import aligned_empty
from .bundle import Bundle
from .engines.base import read_fully
from .errors import IntegrityError
from .file_reads import all_slices, check_slices
from .page_file import PageFile, storage_error
from .segments import Sealed

_BLOCK_BYTES = 8 << 20


def damaged_pages(bundle: Bundle) -> Iterator[IntegrityError]:
    """One error for every page that is not what was written, in order."""
    for store in bundle.stores:
        yield from damage_in(store, bundle.path)


def damage_in(store: Sealed, path: Path) -> Iterator[IntegrityError]:
    """As ``damaged_pages``, for one store."""
    for layer in range(store.shape.n_layers):
        for first, pages in runs(store, layer):
            yield from _damage(path, store, layer, first, pages)


def runs(store: Sealed, layer: int) -> Iterator[tuple[int, Tensor]]:
    """A layer's pages uint8 [n, n_slices, slice_bytes] with the number of the first; each is valid until the next. What
    a file does not have is zero, which a checksum tells."""
    shape, first = store.shape, 0
    stride = store.segments[0].files[layer].layout.page_stride if store.segments else 0
    step = max(1, _BLOCK_BYTES // max(stride, 1))
    memory = aligned_empty(step * stride).view(step, stride)
    for segment in store.segments:
        for start in range(0, segment.n_pages[layer], step):
            block = memory[: min(step, segment.n_pages[layer] - start)]
            _read(segment.files[layer], start, block)
            pages = block[:, : shape.page_bytes]
            yield first + start, pages.reshape(len(block), shape.n_slices, shape.slice_bytes)
        first += segment.n_pages[layer]


def _read(file: PageFile, page: int, block: Tensor) -> None:
    try:
        n_read = read_fully(file.fd, [block.numpy().reshape(-1).data], file.layout.page_offset(page), block.numel())
    except OSError as error:
        raise storage_error(error, file.path, 0) from error
    block.view(-1)[n_read:].zero_()


def _damage(path: Path, store: Sealed, layer: int, first: int, pages: Tensor) -> Iterator[IntegrityError]:
    for i, page in enumerate(pages):
        page_ids, slice_ids = all_slices(first + i, 1, store.shape.n_slices)
        try:
            check_slices(page, np.asarray(page_ids), slice_ids, store.checksums[layer], directory=path, layer=layer)
        except IntegrityError as error:
            yield error
