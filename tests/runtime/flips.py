"""Single bits of a saved session flipped: found, computed again, or harmless; never a wrong token."""

import random
import shutil
from pathlib import Path

from kvoffload_storage.errors import IntegrityError
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime.engine import Runtime


def make(loaded, folder: Path) -> tuple[Runtime, Path, list[int]]:
    """A saved session of two segments, and the tokens that follow."""
    rt = Runtime(loaded, RuntimeConfig(**SMALL | {"offload": "nvme", "budget": "100%", "nvme_dir": folder}))
    path = folder / "a.kvo"
    for i in range(2):
        with rt.open_session(path) as session:
            session.prefill([(i + 11 * j) % 256 for j in range(100)])
    return rt, path, follow(rt, path)[0]


def follow(rt: Runtime, path: Path) -> tuple[list[int], int]:
    """The next eight tokens, and how many damaged pages were computed again."""
    with rt.restore(path) as session:
        before = len(session.token_ids)
        session.generate(SamplingConfig(max_new_tokens=8))
        return session.token_ids[before:], session.stats().recomputed_pages


def flip_once(rt: Runtime, path: Path, expected: list[int], seed: int) -> str:
    """Flip one random bit of one file of a copy and go on with it; "refused", "computed again" or "harmless"."""
    chance = random.Random(seed)
    copy = path.with_name("copy.kvo")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    pages = [p for p in files if p.suffix == ".kv"]
    others = [p for p in files if p.suffix != ".kv"]
    file = chance.choice(pages if chance.random() < 0.5 else others)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    try:
        found, n_again = follow(rt, copy)
    except IntegrityError:
        return "refused"
    assert found == expected, (file.name, at)
    if n_again:
        return "computed again"
    assert file.suffix == ".kv" and is_padding(at), (file.name, at)  # noqa: PT018
    return "harmless"


def is_padding(at: int) -> bool:
    """Whether a byte of a layer file is behind the 1,024 bytes of a page (two slices of 512) in its 4,096."""
    return at >= 4096 and at % 4096 >= 1024
