"""Strategies for every parser of files: whatever the bytes, the answer is a value or one of our errors."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from hypothesis import strategies as st
from kvoffload_storage import StoreShape
from kvoffload_storage.archive import import_bundle
from kvoffload_storage.bundle import open_bundle
from kvoffload_storage.bundle_format import decode_manifest
from kvoffload_storage.errors import StorageError
from kvoffload_storage.format import Header, decode_header, encode_header
from safetensors.torch import save

from kvoffload.runtime.session_file import Description, decode_state, describe

LINE = {
    "format": "kvoffload-session", "version": 1,
    "stores": [{"n_layers": 1, "n_slices": 1, "slice_bytes": 8, "segments": [
        {"folder": "pages-00000000000000aa", "n_pages": [1]}]}],
    "checksums": {"file": "checksums-00000000000000bb.xxh3", "n_bytes": 8, "xxh3_64": "0" * 16},
    "state": {"file": "state-00000000000000cc.safetensors", "n_bytes": 0, "xxh3_64": "0" * 16},
    "pinned": True, "saved_at": 1.0, "session": {},
}  # fmt: skip
SESSION = {
    "model": "m",
    "fingerprint": {"weights": "w", "dtype": "float32", "rotary": "{}", "layout": "l", "page_size": 4, "sinks": 4,
                    "recent": 8},
    "versions": {}, "policy": "p", "n_tokens": 3, "n_in_kv": 3, "prompt_tokens": 3, "unfinished": False,
    "prompt_start": 0, "sampling": None,
    "layers": [{"n_tokens": 3, "offloaded": True, "n_kv_heads": 1, "group_size": 1, "key_dim": 2, "value_dim": 2,
                "scale": 1.0, "softcap": None, "n_window": 0, "n_prefilled": None, "n_anchored": None}],
}  # fmt: skip
STATE = save(
    {
        "token_ids": torch.arange(3),
        "0.keys": torch.zeros(1, 16, 2),
        "0.values": torch.zeros(1, 16, 2),
        "0.tail": torch.zeros(1, 1, 3, 2),
    }
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
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
        if draw(st.booleans()) and isinstance(inner, dict):
            del inner[key]
        else:
            inner[key] = draw(json_values)
        return document


@st.composite
def damaged(draw, data):
    """Bytes with pieces replaced, cut out or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


def signed(line: bytes) -> bytes:
    return line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"


def parse_manifest(data: bytes) -> None:
    decode_manifest(signed(data), name="m")
    decode_manifest(data, name="m")


def parse_header(data: bytes) -> None:
    decode_header(data[:4096], name="h")


def parse_state(data: bytes) -> None:
    decode_state(data, Description.model_validate(SESSION), "s")


def parse_description(data: bytes) -> None:
    describe(json.loads(data), "d")


def open_session(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(signed(data))
        open_bundle(Path(folder)).close()


def parse_archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(data)
        try:
            import_bundle(Path(folder) / "x.tar", Path(folder) / "a.kvo")
        finally:
            assert {p.name for p in Path(folder).iterdir()} <= {"x.tar", "a.kvo"}


def survives(parse: Callable[[bytes], None], data: bytes) -> None:
    """A value or one of our errors."""
    try:
        parse(data)
    except StorageError:
        return


def documents(document: object) -> st.SearchStrategy[bytes]:
    """Documents that are changed, damaged, or anything at all."""
    line = json.dumps(document).encode()
    return changed(document).map(lambda d: json.dumps(d).encode()) | damaged(line) | st.binary(max_size=200)


def a_tar() -> bytes:
    import io
    import tarfile

    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("manifest.json", signed(json.dumps(LINE).encode())), (LINE["state"]["file"], b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return whole.getvalue()


PARSERS = {
    "manifest": (parse_manifest, documents(LINE)),
    "session": (open_session, documents(LINE)),
    "description": (parse_description, changed(SESSION).map(lambda d: json.dumps(d).encode())),
    "header": (parse_header, damaged(encode_header(Header(0, StoreShape(1, 1, 8)))) | st.binary(max_size=5000)),
    "state": (parse_state, damaged(STATE) | st.binary(max_size=300)),
    "archive": (parse_archive, damaged(a_tar()) | st.binary(max_size=1500)),
}
