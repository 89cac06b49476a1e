"""For every parser of files a seed that it takes as it is, and strategies that damage it: whatever the bytes, the
answer is a value or one of our errors."""

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from hypothesis import strategies as st
from kvoffload_storage import StoreShape
from kvoffload_storage.archive import import_bundle
from kvoffload_storage.bundle import open_bundle, open_remains
from kvoffload_storage.bundle_check import damaged_pages
from kvoffload_storage.bundle_format import decode_manifest
from kvoffload_storage.disk import UNIT_FILE, kept_read_unit
from kvoffload_storage.errors import StorageError
from kvoffload_storage.format import Header, decode_header, encode_header
from safetensors.torch import load, save
from seeds import SESSION, STATE_NAME, TABLE_NAME, a_session, a_state, as_archive, entry_of, line_of, signed

from kvoffload.runtime.session_file import Description, decode_state, describe, read_description

Files = dict[str, bytes]
edges = st.sampled_from([sign * ((1 << n) + d) for n in (0, 8, 31, 40, 49, 63) for d in (-1, 0, 1) for sign in (1, -1)])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | edges | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw, document):
    """A document with one value, somewhere in it, replaced or removed."""
    document = json.loads(json.dumps(document))
    inner = document
    while True:
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans()):
            inner = inner[key]
            continue
        if isinstance(inner, dict) and draw(st.integers(0, 4)) == 0:
            del inner[key]
        elif type(inner[key]) is int:
            inner[key] = draw(edges | st.integers(inner[key] - 8, inner[key] + 8) | json_values)
        else:
            inner[key] = draw(json_values)
        return document


@st.composite
def damaged(draw, data):
    """Bytes with pieces replaced, cut out or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, piece = draw(st.integers(0, len(data))), draw(st.binary(max_size=8))
        data[at : at + draw(st.just(len(piece)) | st.integers(0, 8))] = piece
    return bytes(data)


def as_json(document: object) -> bytes:
    return json.dumps(document).encode()


def manifests(whole: bytes) -> st.SearchStrategy[bytes]:
    """Other lines under a checksum that fits, and manifests whose checksum does not."""
    line = line_of(whole)
    lines = changed(line).map(as_json), changed(line["session"]).map(lambda told: as_json(line | {"session": told}))
    return st.one_of(*lines, damaged(as_json(line))).map(signed) | damaged(whole) | st.binary(max_size=200)


@st.composite
def headers(draw, block):
    """First blocks of layer files: one other field under a checksum that fits, or damaged anywhere."""
    if draw(st.booleans()):
        return draw(damaged(block) | damaged(block[:48]).map(lambda data: data[:48] + block[48:]))
    at, size = draw(st.sampled_from([(0, 8), (8, 4), (12, 4), (16, 4), (20, 4), (24, 8), (32, 8)]))
    value = draw(st.integers(0, 9) | edges.map(lambda n: n % (1 << 8 * size)))
    fields = block[:at] + value.to_bytes(size, "little") + block[at + size : 40]
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields)) + block[48:]


@st.composite
def states(draw, data):
    """State files: one tensor another or missing, another description of the bytes, or damaged anywhere."""
    tensors, dtypes = load(data), [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    name = draw(st.sampled_from(sorted(tensors)))
    shape = draw(st.just(tuple(tensors[name].shape)) | st.lists(st.integers(0, 25), max_size=4))
    other = {name: torch.zeros(shape, dtype=draw(st.sampled_from(dtypes)))} if draw(st.integers(0, 4)) else {}
    end = 8 + int.from_bytes(data[:8], "little")
    line = as_json(draw(changed(json.loads(data[8:end]))))
    described = struct.pack("<Q", len(line)) + line + data[end:]
    del tensors[name]
    return draw(st.sampled_from([save(tensors | other), described]) | damaged(data) | st.binary(max_size=300))


@st.composite
def layer_files(draw, data):
    """Layer files with another header, with damaged pages, or cut short."""
    header, cut = headers(data[:4096]).map(lambda block: block + data[4096:]), st.integers(0, len(data))
    return draw(header | damaged(data) | cut.map(lambda n: data[:n]))


@st.composite
def sessions(draw, files: Files):
    """The files of a session of which one is another, or is not there. Where the manifest has a checksum of that file
    it fits it, or not."""
    files, name = dict(files), draw(st.sampled_from(sorted(files)))
    line = line_of(files["manifest.json"])
    entry = {TABLE_NAME: "checksums", STATE_NAME: "state"}.get(name)
    if draw(st.integers(0, 9)) == 0:
        del files[name]
        return files
    kinds = {"manifest.json": manifests, TABLE_NAME: damaged, STATE_NAME: states}
    files[name] = draw(kinds.get(name, layer_files)(files[name]))
    if entry is not None and draw(st.integers(0, 4)):
        line[entry] |= entry_of(files[name])
        files["manifest.json"] = signed(as_json(line))
    return files


@st.composite
def archives(draw, files: Files):
    """Exports of other sessions, damaged ones, and anything at all."""
    if draw(st.booleans()):
        return as_archive(draw(sessions(files)))
    return draw(damaged(as_archive(files)) | st.binary(max_size=1500))


def parse_manifest(data: bytes) -> None:
    decode_manifest(data, name="m")


def parse_header(data: bytes) -> None:
    decode_header(data[:4096], name="h")


def parse_state(data: bytes) -> None:
    decode_state(data, Description.model_validate(SESSION), "s")


def parse_description(data: bytes) -> None:
    describe(json.loads(data), "d")


def parse_session(files: Files) -> None:
    """As a restore does, with what a restore could mend, and as ``session verify`` does, which refuses that."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(data)
        remains = open_remains(Path(folder))
        try:
            read_description(remains)
            list(damaged_pages(remains))
        finally:
            remains.close()
        bundle = open_bundle(Path(folder))
        bundle.close_after(damaged_pages(bundle))


def parse_archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(data)
        left = {"x.tar"}
        try:
            import_bundle(Path(folder) / "x.tar", Path(folder) / "a.kvo", read_description)
            left.add("a.kvo")
        finally:
            assert {p.name for p in Path(folder).iterdir()} == left


def parse_read_unit(data: bytes) -> None:
    """What is none is not used: it never raises."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / UNIT_FILE).write_bytes(data)
        assert kept_read_unit(Path(folder)) in {None, *(1 << i for i in range(12, 21))}


def survives(parse: Callable[[Any], None], data: Any) -> None:
    """A value or one of our errors."""
    try:
        parse(data)
    except StorageError:
        return


class Parser(NamedTuple):
    """``parse`` takes ``seed`` as it is; ``inputs`` are made of it."""

    parse: Callable[[Any], None]
    seed: Any
    inputs: st.SearchStrategy[Any]


WHOLE = a_session()
HEADER = encode_header(Header(0, StoreShape(1, 1, 8)))
DESCRIPTION = as_json(SESSION)
PARSERS = {
    "manifest": Parser(parse_manifest, WHOLE["manifest.json"], manifests(WHOLE["manifest.json"])),
    "session": Parser(parse_session, WHOLE, sessions(WHOLE)),
    "description": Parser(parse_description, DESCRIPTION, changed(SESSION).map(as_json)),
    "header": Parser(parse_header, HEADER, headers(HEADER) | st.binary(max_size=5000)),
    "state": Parser(parse_state, a_state(), states(a_state())),
    "archive": Parser(parse_archive, as_archive(WHOLE), archives(WHOLE)),
    "read-unit": Parser(parse_read_unit, b"16384\n", damaged(b"16384\n") | st.binary(max_size=40)),
}
