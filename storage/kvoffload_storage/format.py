"""The page files of FORMAT.md as pure functions: layout, header, checksum table. No I/O."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from .aligned import BLOCK_BYTES, round_down, round_up
from .errors import IntegrityError
from .store import StoreShape

HEADER_BYTES = BLOCK_BYTES
VERSION = 1
MAGIC = b"KVOFFPGS"
MAX_LAYERS, MAX_SLICES, MAX_SLICE_BYTES, MAX_PAGES = 1 << 16, 1 << 20, 1 << 30, 1 << 40

_FIELDS = struct.Struct("<8sIIIIQQ")
_CHECKSUM = struct.Struct("<Q")

Checksums = list[tuple[int, ...]]
"""Of the pages of a layer: one xxh3_64 a slice."""


@dataclass(frozen=True)
class PageLayout:
    """Where pages and slices of one layer lie in its file, in bytes."""

    n_slices: int
    slice_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.n_slices * self.slice_bytes

    @property
    def page_stride(self) -> int:
        return round_up(self.page_bytes)

    def page_offset(self, page_id: int) -> int:
        return HEADER_BYTES + page_id * self.page_stride

    @property
    def slice_cost_bytes(self) -> int:
        """Aligned bytes around the most expensive slice of a page."""
        return max(
            round_up((i + 1) * self.slice_bytes) - round_down(i * self.slice_bytes) for i in range(self.n_slices)
        )

    def whole_pages(self) -> "PageLayout":
        """The same file seen as pages of one slice each."""
        return PageLayout(1, self.page_bytes)


@dataclass(frozen=True)
class Header:
    """What the first block of a layer file says."""

    layer: int
    shape: StoreShape


def layout_of(shape: StoreShape) -> PageLayout:
    """The file layout of one layer of that shape."""
    return PageLayout(shape.n_slices, shape.slice_bytes)


def layer_file_name(layer: int) -> str:
    """``layer-0007.kv`` for layer 7."""
    return f"layer-{layer:04d}.kv"


def checksum(data: bytes | memoryview) -> int:
    """xxh3_64 with seed 0 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(data)


def page_checksums(pages: NDArray[np.uint8]) -> Checksums:
    """Of pages uint8 [n, n_slices, slice_bytes] whose slices are contiguous."""
    return [tuple([checksum(piece.data) for piece in page]) for page in pages]


def encode_header(header: Header) -> bytes:
    """The first block of a layer file, 4096 bytes."""
    shape = header.shape
    stride = layout_of(shape).page_stride
    fields = _FIELDS.pack(MAGIC, VERSION, header.layer, shape.n_layers, shape.n_slices, shape.slice_bytes, stride)
    return (fields + _CHECKSUM.pack(checksum(fields))).ljust(HEADER_BYTES, b"\0")


def decode_header(block: bytes, *, name: str) -> Header:
    """What a first block says; IntegrityError that names the file and the value when it is not one of ours."""
    if len(block) != HEADER_BYTES:
        raise IntegrityError(f"{name}: header has {len(block)} bytes, expected {HEADER_BYTES}")
    fields = block[: _FIELDS.size]
    magic, version, layer, n_layers, n_slices, slice_bytes, stride = _FIELDS.unpack(fields)
    if magic != MAGIC:
        raise IntegrityError(f"{name}: magic {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise IntegrityError(f"{name}: format version {version}, expected {VERSION}")
    if _CHECKSUM.unpack_from(block, _FIELDS.size)[0] != checksum(fields):
        raise IntegrityError(f"{name}: header checksum does not match")
    if any(block[_FIELDS.size + _CHECKSUM.size :]):
        raise IntegrityError(f"{name}: header has bytes that are not zero behind its fields")
    shape = _checked_shape(n_layers, n_slices, slice_bytes, name=name)
    if layer >= n_layers:
        raise IntegrityError(f"{name}: layer {layer} of {n_layers}")
    if stride != layout_of(shape).page_stride:
        raise IntegrityError(f"{name}: page stride {stride}, expected {layout_of(shape).page_stride}")
    return Header(layer, shape)


def encode_checksums(layers: Iterable[Checksums]) -> bytes:
    """The checksum table: 8 bytes a slice, page after page, layer after layer."""
    return b"".join(np.asarray(layer, dtype="<u8").tobytes() for layer in layers)


def decode_checksums(table: bytes, shape: StoreShape, n_pages: Sequence[int]) -> list[Checksums]:
    """Per layer the checksums of its pages from a table whose length was compared with them."""
    pages = np.frombuffer(table, dtype="<u8").reshape(-1, shape.n_slices)
    parts = np.split(pages, np.cumsum(n_pages)[:-1])
    return [[tuple(page) for page in part.tolist()] for part in parts]


def _checked_shape(n_layers: Any, n_slices: Any, slice_bytes: Any, *, name: str) -> StoreShape:
    return StoreShape(
        _checked_int(n_layers, "n_layers", 1, MAX_LAYERS, name=name),
        _checked_int(n_slices, "n_slices", 1, MAX_SLICES, name=name),
        _checked_int(slice_bytes, "slice_bytes", 1, MAX_SLICE_BYTES, name=name),
    )


def _checked_int(value: Any, key: str, low: int, high: int, *, name: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise IntegrityError(f"{name}: {key} is {_short(value)}, expected an integer from {low} to {high}")
    return value


def _short(value: object) -> str:
    text = str(type(value)) if type(value) is int and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
