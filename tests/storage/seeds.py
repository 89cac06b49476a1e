"""A whole session in memory, every file of it, and the same as an export: what the fuzzers start from."""

import json

import numpy as np
import torch
import xxhash
from kvoffload_storage import StoreShape
from kvoffload_storage.archive_format import ARCHIVE_END, encode_member, padding_bytes
from kvoffload_storage.format import Header, encode_checksums, encode_header, layout_of, page_checksums
from safetensors.torch import save

SHAPE = StoreShape(n_layers=2, n_slices=2, slice_bytes=64)  # float32, pages of 4 tokens, keys and values of 2 channels
FOLDERS = {"pages-00000000000000aa": (2, 2), "pages-00000000000000ab": (1, 1)}
TABLE_NAME, STATE_NAME = "checksums-00000000000000bb.xxh3", "state-00000000000000cc.safetensors"
LAYER = {"n_tokens": 24, "offloaded": True, "n_kv_heads": 2, "group_size": 1, "key_dim": 2, "value_dim": 2,
         "scale": 1.0, "softcap": None, "n_window": 8, "n_prefilled": 3, "n_anchored": 3}  # fmt: skip
SESSION = {
    "model": "m",
    "fingerprint": {"weights": "w", "dtype": "float32", "rotary": "{}", "layout": "l", "page_size": 4, "sinks": 4,
                    "recent": 8},
    "versions": {}, "policy": "p", "n_tokens": 25, "n_in_kv": 24, "prompt_tokens": 20, "unfinished": False,
    "prompt_start": 0, "prompt_end": None, "sampling": {"temperature": 0.5}, "layers": [LAYER, LAYER],
}  # fmt: skip


def signed(line: bytes) -> bytes:
    """A manifest with that line."""
    return line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"


def entry_of(data: bytes) -> dict[str, object]:
    """What a manifest says of a file with that content."""
    return {"n_bytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}


def a_state() -> bytes:
    """As the description says it."""
    layer = {"keys": (2, 16, 2), "values": (2, 16, 2), "tail": (2, 1, 3, 2), "anchor": (2, 2)}
    tensors = {f"{i}.{name}": torch.zeros(shape) for i in range(2) for name, shape in layer.items()}
    return save(tensors | {"token_ids": torch.arange(25)})


def a_session() -> dict[str, bytes]:
    """The files of a session by their names in its folder, ``manifest.json`` first."""
    files, layers = {}, [[] for _ in range(SHAPE.n_layers)]
    for folder, n_pages in FOLDERS.items():
        for layer, n in enumerate(n_pages):
            first = len(layers[layer])
            pages = np.arange(n * SHAPE.page_bytes, dtype=np.uint8).reshape(n, SHAPE.n_slices, SHAPE.slice_bytes)
            pages = pages + np.uint8(17 * layer + 5 * first)
            layers[layer] += page_checksums(pages)
            padding = bytes(layout_of(SHAPE).page_stride - SHAPE.page_bytes)
            body = b"".join(page.tobytes() + padding for page in pages)
            files[f"{folder}/layer-{layer:04d}.kv"] = encode_header(Header(layer, SHAPE)) + body
    small = {TABLE_NAME: encode_checksums(layers), STATE_NAME: a_state()}
    line = {
        "format": "kvoffload-session", "version": 1,
        "stores": [{"n_layers": 2, "n_slices": 2, "slice_bytes": 64, "segments": [
            {"folder": folder, "n_pages": list(n_pages)} for folder, n_pages in FOLDERS.items()]}],
        "checksums": {"file": TABLE_NAME, **entry_of(small[TABLE_NAME])},
        "state": {"file": STATE_NAME, **entry_of(small[STATE_NAME])},
        "pinned": True, "saved_at": 1.0, "session": SESSION,
    }  # fmt: skip
    return {"manifest.json": signed(json.dumps(line).encode())} | small | files


def line_of(manifest: bytes) -> dict[str, object]:
    """What a whole manifest says."""
    return json.loads(manifest[: manifest.index(b"\n")])


def as_archive(files: dict[str, bytes]) -> bytes:
    """An export of exactly these members."""
    members = (encode_member(name, len(data)) + data + bytes(padding_bytes(len(data))) for name, data in files.items())
    return b"".join(members) + ARCHIVE_END
