"""FORMAT.md in literal bytes, and what it forbids."""

import json
import struct
from typing import Any

import pytest
import xxhash
from kvoffload_storage import IntegrityError, StoreShape, UnavailableError
from kvoffload_storage.bundle_format import (
    ChecksumsEntry,
    Manifest,
    SegmentEntry,
    StateEntry,
    StoreEntry,
    decode_manifest,
    encode_manifest,
    is_known,
    new_name,
)
from kvoffload_storage.format import (
    Header,
    decode_checksums,
    decode_header,
    encode_checksums,
    encode_header,
    layer_file_name,
)

SHAPE = StoreShape(n_layers=2, n_slices=3, slice_bytes=48)
FIELDS = bytes.fromhex(
    "4b564f4646504753"  # KVOFFPGS
    "01000000"  # version
    "01000000"  # layer
    "02000000"  # n_layers
    "03000000"  # n_slices
    "3000000000000000"  # slice_bytes
    "0010000000000000"  # stride
)
A, B, C = "pages-00000000000000aa", "checksums-00000000000000bb.xxh3", "state-00000000000000cc.safetensors"
MANIFEST = Manifest(
    format="kvoffload-session",
    version=1,
    pinned=True,
    stores=(StoreEntry(n_layers=2, n_slices=3, slice_bytes=48, segments=(SegmentEntry(folder=A, n_pages=(5, 0)),)),),
    checksums=ChecksumsEntry(file=B, n_bytes=120, xxh3_64="0000000000001234"),
    state=StateEntry(file=C, n_bytes=7, xxh3_64="00000000000000ff"),
    saved_at=1.5,
    session={"any": ["thing"]},
)
LINE = (
    b'{"format":"kvoffload-session","version":1,"stores":[{"n_layers":2,"n_slices":3,"slice_bytes":48,"segments":'
    b'[{"folder":"pages-00000000000000aa","n_pages":[5,0]}]}],"checksums":{"n_bytes":120,"xxh3_64":"0000000000001234",'
    b'"file":"checksums-00000000000000bb.xxh3"},"state":{"n_bytes":7,"xxh3_64":"00000000000000ff",'
    b'"file":"state-00000000000000cc.safetensors"},"pinned":true,"saved_at":1.5,"session":{"any":["thing"]}}'
)


def signed(line: bytes) -> bytes:
    """A manifest with a right checksum over whatever it says."""
    return line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"


def block(fields: bytes) -> bytes:
    """A header with a right checksum over whatever it says."""
    return (fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))).ljust(4096, b"\0")


def test_a_header_is_these_bytes() -> None:
    assert encode_header(Header(1, SHAPE)) == block(FIELDS)
    assert decode_header(block(FIELDS), name="f") == Header(1, SHAPE)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "header has 0 bytes"),
        (b"\0" * 4096, "magic"),
        (block(FIELDS[:8] + b"\2" + FIELDS[9:]), "version 2, expected 1"),
        (FIELDS.ljust(4096, b"\0"), "header checksum"),
        (block(FIELDS)[:-1] + b"x", "not zero"),
        (block(FIELDS[:12] + b"\2" + FIELDS[13:]), "layer 2 of 2"),
        (block(FIELDS[:16] + b"\0\0\0\0" + FIELDS[20:]), "n_layers is 0"),
        (block(FIELDS[:20] + b"\xff\xff\xff\xff" + FIELDS[24:]), "n_slices is 4294967295"),
        (block(FIELDS[:24] + b"\xff" * 8 + FIELDS[32:]), "slice_bytes is 18446744073709551615"),
        (block(FIELDS[:32] + b"\1" + FIELDS[33:]), "page stride 4097, expected 4096"),
    ],
)
def test_a_hostile_header_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(IntegrityError, match=f"layer-0000.kv: .*{complaint}"):
        decode_header(raw, name="layer-0000.kv")


def test_a_manifest_is_these_bytes() -> None:
    assert encode_manifest(MANIFEST) == signed(LINE)
    assert decode_manifest(signed(LINE), name="m") == MANIFEST


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        LINE,
        signed(LINE)[:-1],
        signed(LINE)[1:],
        signed(b"\xff\xfe"),
        signed(b"[]"),
        signed(b"null"),
        signed(b"{}"),
        signed(b"[" * 100_000),
        signed(b'{"version": ' + b"9" * 9999 + b"}"),
        signed(LINE.replace(b'"version":1,', b"")),
    ],
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError, match="m: "):
        decode_manifest(raw, name="m")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "zip"),
        ("version", True),
        ("version", "1"),
        ("pinned", 1),
        ("saved_at", "now"),
        ("saved_at", 1e300),
        ("session", []),
        ("extra", 1),
        ("checksums.file", "../../etc/passwd"),
        ("checksums.file", B + "\n"),
        ("checksums.n_bytes", 112),
        ("checksums.xxh3_64", "12"),
        ("checksums.xxh3_64", 7),
        ("state.file", "state-00000000000000cc.pt"),
        ("state.n_bytes", -1),
        ("stores.0.n_layers", 0),
        ("stores.0.n_layers", True),
        ("stores.0.n_layers", 3),
        ("stores.0.n_layers", 10**300),
        ("stores.0.n_slices", "3"),
        ("stores.0.n_slices", 1 << 21),
        ("stores.0.slice_bytes", 48.5),
        ("stores.0.slice_bytes", 1 << 31),
        ("stores.0.segments", None),
        ("stores.0.segments.0.folder", "/tmp"),
        ("stores.0.segments.0.folder", "pages-..aaaaaaaaaaaaaa"),
        ("stores.0.segments.0.n_pages", [5]),
        ("stores.0.segments.0.n_pages", [5, -1]),
        ("stores.0.segments.0.n_pages", [5, 1 << 50]),
        ("stores.0.segments.0.n_pages", [5, None]),
    ],
)
def test_a_hostile_manifest_is_refused(path: str, value: Any) -> None:
    fields = json.loads(LINE)
    inner = fields
    *parents, key = path.split(".")
    for parent in parents:
        inner = inner[int(parent) if parent.isdigit() else parent]
    inner[key] = value
    with pytest.raises(IntegrityError, match="m: "):
        decode_manifest(signed(json.dumps(fields).encode()), name="m")


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_no_damage(version: int) -> None:
    line = LINE.replace(b'"version":1', f'"version":{version},"new":true'.encode())
    with pytest.raises(UnavailableError, match=f"m: .*version {version}, .* version 1"):
        decode_manifest(signed(line), name="m")
    with pytest.raises(IntegrityError, match="checksum"):
        decode_manifest(signed(LINE).replace(b'"version":1', b'"version":2'), name="m")


def test_a_manifest_too_long_is_not_parsed() -> None:
    with pytest.raises(IntegrityError, match="at most 16,777,216"):
        decode_manifest(b" " * ((16 << 20) + 1), name="m")


def test_every_new_name_is_known_and_a_path_never_is() -> None:
    for kind in ("pages", "checksums", "state", "export"):
        assert is_known(new_name(kind))
    for name in ("../x", "pages-0", "notes.txt", "layer-1.kv", ".."):
        assert not is_known(name)


def test_the_checksum_table_is_eight_little_endian_bytes_a_slice() -> None:
    layers = [[(1, 2), (3, 4)], [], [(0x0807060504030201, 5)]]
    table = encode_checksums(layers)
    numbers = [b"\1", b"\2", b"\3", b"\4", bytes(range(1, 9)), b"\5"]
    assert table == b"".join(number.ljust(8, b"\0") for number in numbers)
    assert decode_checksums(table, StoreShape(3, 2, 1), (2, 0, 1)) == layers


def test_layer_files_have_four_digits_or_more() -> None:
    assert [layer_file_name(7), layer_file_name(12345)] == ["layer-0007.kv", "layer-12345.kv"]
