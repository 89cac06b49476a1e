"""The page-file format of FORMAT.md as pure functions: layout, header, checksum table, manifest. No I/O."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from .aligned import BLOCK_BYTES, round_down, round_up
from .errors import IntegrityError
from .store import StoreShape

HEADER_BYTES = BLOCK_BYTES
VERSION = 1
MAGIC = b"KVOFFPGS"
FORMAT_NAME = "kvoffload-pages"
MANIFEST_NAME = "manifest.json"
CHECKSUMS_NAME = "checksums.xxh3"
MANIFEST_MAX_BYTES = 16 << 20
MAX_LAYERS, MAX_SLICES, MAX_SLICE_BYTES, MAX_PAGES = 1 << 16, 1 << 20, 1 << 30, 1 << 40

_FIELDS = struct.Struct("<8sIIIIQQ")
_CHECKSUM = struct.Struct("<Q")
_MANIFEST_KEYS = frozenset(
    ("checksums", "checksums_xxh3_64", "format", "n_layers", "n_pages", "n_slices", "slice_bytes", "version")
)


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


@dataclass(frozen=True)
class Manifest:
    """What a kept store holds: its shape, pages per layer, and xxh3_64 of the checksum table."""

    shape: StoreShape
    n_pages: tuple[int, ...]
    table_checksum: int


def layout_of(shape: StoreShape) -> PageLayout:
    """The file layout of one layer of that shape."""
    return PageLayout(shape.n_slices, shape.slice_bytes)


def layer_file_name(layer: int) -> str:
    """``layer-0007.kv`` for layer 7."""
    return f"layer-{layer:04d}.kv"


def checksum(page: bytes | memoryview) -> int:
    """xxh3_64 with seed 0 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(page)


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


def encode_checksums(layers: Sequence[Sequence[int]]) -> bytes:
    """The checksum table: 8 bytes per page, layer after layer."""
    return np.concatenate([np.asarray(layer, dtype="<u8") for layer in layers]).tobytes()


def decode_checksums(table: bytes, manifest: Manifest, *, name: str) -> list[list[int]]:
    """Per layer the checksums of its pages; IntegrityError when the table is not the manifest's."""
    expected = 8 * sum(manifest.n_pages)
    if len(table) != expected:
        raise IntegrityError(f"{name}: {len(table)} bytes, expected {expected}")
    if checksum(table) != manifest.table_checksum:
        raise IntegrityError(f"{name}: checksum {checksum(table):016x}, expected {manifest.table_checksum:016x}")
    ends = np.cumsum(manifest.n_pages)[:-1]
    return [part.tolist() for part in np.split(np.frombuffer(table, dtype="<u8"), ends)]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON with sorted keys and a final newline."""
    shape = manifest.shape
    fields = {
        "format": FORMAT_NAME,
        "version": VERSION,
        "n_layers": shape.n_layers,
        "n_slices": shape.n_slices,
        "slice_bytes": shape.slice_bytes,
        "n_pages": list(manifest.n_pages),
        "checksums": CHECKSUMS_NAME,
        "checksums_xxh3_64": f"{manifest.table_checksum:016x}",
    }
    return (json.dumps(fields, sort_keys=True) + "\n").encode()


def decode_manifest(text: bytes, *, name: str) -> Manifest:
    """What a manifest says; IntegrityError that names the file and the value when FORMAT.md forbids it."""
    fields = _parse_object(text, name=name)
    literals = {"format": FORMAT_NAME, "version": VERSION, "checksums": CHECKSUMS_NAME}
    for key, expected in literals.items():
        if type(fields[key]) is not type(expected) or fields[key] != expected:
            raise IntegrityError(f"{name}: {key} is {_short(fields[key])}, expected {expected!r}")
    shape = _checked_shape(fields["n_layers"], fields["n_slices"], fields["slice_bytes"], name=name)
    n_pages = fields["n_pages"]
    if not isinstance(n_pages, list) or len(n_pages) != shape.n_layers:
        raise IntegrityError(f"{name}: n_pages is {_short(n_pages)}, expected a list of {shape.n_layers}")
    counts = tuple(_checked_int(n, "n_pages", 0, MAX_PAGES, name=name) for n in n_pages)
    return Manifest(shape, counts, _checked_hex(fields["checksums_xxh3_64"], name=name))


def _parse_object(text: bytes, *, name: str) -> dict[str, Any]:
    if len(text) > MANIFEST_MAX_BYTES:
        raise IntegrityError(f"{name}: {len(text):,} bytes, at most {MANIFEST_MAX_BYTES:,} allowed")
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name}: not a JSON manifest: {_short(str(error))}") from error
    if not isinstance(fields, dict) or fields.keys() != _MANIFEST_KEYS:
        keys = sorted(fields) if isinstance(fields, dict) else fields
        raise IntegrityError(f"{name}: keys {_short(keys)}, expected {sorted(_MANIFEST_KEYS)}")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


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


def _checked_hex(value: Any, *, name: str) -> int:
    if not isinstance(value, str) or len(value) != 16 or set(value) - set("0123456789abcdef"):
        raise IntegrityError(f"{name}: checksums_xxh3_64 is {_short(value)}, expected 16 hex digits")
    return int(value, 16)


def _short(value: object) -> str:
    text = str(type(value)) if type(value) is int and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
