"""FORMAT.md in literal bytes, and what it forbids."""

import json
import struct
from typing import Any

import pytest
import xxhash
from kvoffload_storage import IntegrityError, StoreShape
from kvoffload_storage.format import (
    Header,
    Manifest,
    decode_checksums,
    decode_header,
    decode_manifest,
    encode_checksums,
    encode_header,
    encode_manifest,
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
MANIFEST = Manifest(SHAPE, (5, 0), 0x1234)
MANIFEST_BYTES = (
    b'{"checksums": "checksums.xxh3", "checksums_xxh3_64": "0000000000001234", "format": "kvoffload-pages", '
    b'"n_layers": 2, "n_pages": [5, 0], "n_slices": 3, "slice_bytes": 48, "version": 1}\n'
)


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
    assert encode_manifest(MANIFEST) == MANIFEST_BYTES
    assert decode_manifest(MANIFEST_BYTES, name="m") == MANIFEST


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        MANIFEST_BYTES[:-3],
        b'{"version": ' + b"9" * 9999 + b"}",
    ],
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError, match="m: "):
        decode_manifest(raw, name="m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "zip"),
        ("version", 2),
        ("version", True),
        ("checksums", "../../etc/passwd"),
        ("checksums_xxh3_64", "12"),
        ("checksums_xxh3_64", "00000000000012_4"),
        ("checksums_xxh3_64", 7),
        ("n_layers", 0),
        ("n_layers", True),
        ("n_layers", 3),
        ("n_layers", 10**300),
        ("n_slices", "3"),
        ("n_slices", 1 << 21),
        ("slice_bytes", -1),
        ("slice_bytes", 48.0),
        ("slice_bytes", 1 << 31),
        ("n_pages", [5]),
        ("n_pages", 5),
        ("n_pages", [5, -1]),
        ("n_pages", [5, 1 << 50]),
        ("n_pages", [5, None]),
        ("extra", 1),
    ],
)
def test_a_hostile_manifest_is_refused(key: str, value: Any) -> None:
    fields = json.loads(MANIFEST_BYTES)
    fields[key] = value
    with pytest.raises(IntegrityError, match="m: "):
        decode_manifest(json.dumps(fields).encode(), name="m")


def test_a_repeated_or_missing_key_is_refused() -> None:
    with pytest.raises(IntegrityError, match="twice"):
        decode_manifest(MANIFEST_BYTES.replace(b'"version": 1', b'"version": 1, "version": 1'), name="m")
    with pytest.raises(IntegrityError, match="keys"):
        decode_manifest(MANIFEST_BYTES.replace(b', "version": 1', b""), name="m")


def test_a_manifest_too_long_is_not_parsed() -> None:
    with pytest.raises(IntegrityError, match="at most 16,777,216"):
        decode_manifest(b" " * ((16 << 20) + 1), name="m")


def test_the_checksum_table_is_eight_little_endian_bytes_per_page() -> None:
    table = encode_checksums([[1, 2], [], [0x0807060504030201]])
    assert table == bytes.fromhex("0100000000000000 0200000000000000 0102030405060708")
    manifest = Manifest(StoreShape(3, 1, 1), (2, 0, 1), xxhash.xxh3_64_intdigest(table))
    assert decode_checksums(table, manifest, name="t") == [[1, 2], [], [0x0807060504030201]]


def test_a_table_that_is_not_the_manifests_is_refused() -> None:
    manifest = Manifest(StoreShape(1, 1, 1), (1,), 0)
    with pytest.raises(IntegrityError, match="t: 9 bytes, expected 8"):
        decode_checksums(b"\0" * 9, manifest, name="t")
    with pytest.raises(IntegrityError, match=r"t: checksum .* expected 0000000000000000"):
        decode_checksums(b"\0" * 8, manifest, name="t")


def test_layer_files_have_four_digits_or_more() -> None:
    assert [layer_file_name(7), layer_file_name(12345)] == ["layer-0007.kv", "layer-12345.kv"]
