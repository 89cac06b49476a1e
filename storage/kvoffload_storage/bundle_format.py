"""The manifest of a session (FORMAT.md, "A session") as pure functions and checked values. No I/O."""

import re
import secrets
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import IntegrityError, UnavailableError
from .format import MAX_LAYERS, MAX_PAGES, MAX_SLICE_BYTES, MAX_SLICES
from .store import StoreShape

MANIFEST_NAME = "manifest.json"
MANIFEST_MAX_BYTES = 16 << 20
FORMAT_NAME: Literal["kvoffload-session"] = "kvoffload-session"
VERSION = 1
_CHECKSUM_LINE = 18  # newline, sixteen digits, newline
_KNOWN = re.compile(
    r"manifest\.json(\.tmp)?|checksums-[0-9a-f]{16}\.xxh3|state-[0-9a-f]{16}\.safetensors|pages-[0-9a-f]{16}"
    r"|layer-\d{4,}\.kv|export-[0-9a-f]{16}\.tar|probe(-\w+)?"
)

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
PageCount = Annotated[int, Field(ge=0, le=MAX_PAGES)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SegmentEntry(_Part):
    """A folder of layer files, and how many pages of each belong to the session."""

    folder: Annotated[str, Field(pattern=r"^pages-[0-9a-f]{16}$")]
    n_pages: tuple[PageCount, ...]


class _Opening(BaseModel):
    """What the manifests of all versions have."""

    model_config = ConfigDict(strict=True)

    format: Literal["kvoffload-session"]
    version: int


class StoreEntry(_Part):
    """One store: its shape and its segments in the order of their pages."""

    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    n_slices: Annotated[int, Field(ge=1, le=MAX_SLICES)]
    slice_bytes: Annotated[int, Field(ge=1, le=MAX_SLICE_BYTES)]
    segments: tuple[SegmentEntry, ...]

    @property
    def shape(self) -> StoreShape:
        return StoreShape(self.n_layers, self.n_slices, self.slice_bytes)

    @property
    def n_pages(self) -> list[int]:
        """Pages of each layer, all segments together."""
        return [sum(segment.n_pages[layer] for segment in self.segments) for layer in range(self.n_layers)]


class FileEntry(_Part):
    """A file that is read whole."""

    n_bytes: Annotated[int, Field(ge=0, le=1 << 50)]
    xxh3_64: Hex


class ChecksumsEntry(FileEntry):
    file: Annotated[str, Field(pattern=r"^checksums-[0-9a-f]{16}\.xxh3$")]


class StateEntry(FileEntry):
    file: Annotated[str, Field(pattern=r"^state-[0-9a-f]{16}\.safetensors$")]


class Manifest(_Part):
    """What a session consists of."""

    format: Literal["kvoffload-session"]
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    stores: tuple[StoreEntry, ...]
    checksums: ChecksumsEntry
    state: StateEntry
    pinned: bool
    saved_at: Annotated[float, Field(ge=0, le=253_402_214_400)]  # seconds, up to the year 9999
    session: dict[str, Any]

    @property
    def page_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(sum(store.n_pages) * store.shape.page_bytes for store in self.stores)

    @property
    def files(self) -> set[str]:
        """Names inside the folder, the manifest's own not counted."""
        return {self.checksums.file, self.state.file} | {s.folder for store in self.stores for s in store.segments}


def new_name(kind: Literal["pages", "checksums", "state", "export"]) -> str:
    """A name of that kind that nothing has yet."""
    ending = {"pages": "", "checksums": ".xxh3", "state": ".safetensors", "export": ".tar"}[kind]
    return f"{kind}-{secrets.token_hex(8)}{ending}"


def is_known(name: str) -> bool:
    """Whether a file of that name inside a session or a folder of pages is ours."""
    return _KNOWN.fullmatch(name) is not None


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's line and the line of its checksum."""
    line = manifest.model_dump_json().encode()
    return line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"


def decode_manifest(data: bytes, *, name: str) -> Manifest:
    """What a manifest says; IntegrityError that names the file and the value when FORMAT.md forbids it, and
    UnavailableError when it is whole, but of another version of the format."""
    if len(data) > MANIFEST_MAX_BYTES:
        raise IntegrityError(f"{name}: {len(data):,} bytes, at most {MANIFEST_MAX_BYTES:,} allowed")
    line, tail = data[:-_CHECKSUM_LINE], data[-_CHECKSUM_LINE:]
    expected = b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"
    if tail != expected:
        raise IntegrityError(f"{name}: checksum {tail.decode(errors='replace').strip()!r}, expected "
                             f"{expected.decode().strip()!r}")  # fmt: skip
    try:
        _refuse_version(_Opening.model_validate_json(line).version, name)
        manifest = Manifest.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{name}: {where}: {str(first['input'])[:120]!r}: {first['msg']}") from error
    for store in manifest.stores:
        for segment in store.segments:
            if len(segment.n_pages) != store.n_layers:
                raise IntegrityError(f"{name}: n_pages of {segment.folder} has {len(segment.n_pages)} numbers, "
                                     f"expected {store.n_layers}")  # fmt: skip
    if manifest.checksums.n_bytes != (n_bytes := table_bytes(manifest)):
        raise IntegrityError(f"{name}: checksums has {manifest.checksums.n_bytes:,} bytes, expected {n_bytes:,}")
    return manifest


def _refuse_version(version: int, name: str) -> None:
    if version != VERSION:
        raise UnavailableError(f"{name}: session format version {version}, this kvoffload reads version {VERSION}")


def table_bytes(manifest: Manifest) -> int:
    """Bytes of the checksum table."""
    return sum(8 * sum(store.n_pages) * store.n_slices for store in manifest.stores)
