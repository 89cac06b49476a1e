"""Single bits of a saved session flipped: found, computed again, or harmless; never a wrong token."""

import random
import shutil
from pathlib import Path

import torch
from kvoffload_storage.errors import IntegrityError
from kvoffload_storage.format import HEADER_BYTES
from kvoffload_storage.manifests import read_manifest
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.repair import repair
from kvoffload.runtime.session import Session

STRIDE, PAGE_BYTES = 4096, 1024  # of a page in its file; two slices of 512


class Saved:
    """A saved session of two segments, and the tokens that follow. It generated some of its own, whose KV is sparse
    attention's under a budget that is not full: where a page is damaged, it and all behind it are prefilled instead, so
    what follows then is what follows an undamaged session that was cut back before that page and prefilled. With a full
    budget that is the same as without damage."""

    def __init__(self, loaded, folder: Path, *, budget: str) -> None:
        self.full = budget == "100%"
        self.rt = Runtime(loaded, RuntimeConfig(**SMALL | {"offload": "nvme", "budget": budget, "nvme_dir": folder}))
        self.path = folder / f"at-{budget.removesuffix('%')}.kvo"
        for i in range(2):
            with self.rt.open_session(self.path) as session:
                session.prefill([(i + 11 * j) % 256 for j in range(70)])
                session.generate(SamplingConfig(max_new_tokens=30))
                session.save(self.path)
        self._expected: dict[int | None, list[int]] = {}

    def expected(self, page: int | None) -> list[int]:
        """What follows where everything from ``page`` on, of each layer, is prefilled; None: nothing."""
        page = None if self.full else page
        if page not in self._expected:
            with self.rt.restore(self.path) as session:
                if page is not None:
                    cut_back(session, page)
                self._expected[page] = follow(session)
        return self._expected[page]

    def page_at(self, file: Path, at: int) -> int | None:
        """The first page that is lost with a byte of a layer file; None in the padding. With a header all are lost."""
        before = 0
        for segment in read_manifest(self.path).stores[0].segments:
            if segment.folder == file.parent.name:
                break
            before += segment.n_pages[int(file.stem.removeprefix("layer-"))]
        if at < HEADER_BYTES:
            return before
        page, rest = divmod(at - HEADER_BYTES, STRIDE)
        return before + page if rest < PAGE_BYTES else None


def follow(session: Session) -> list[int]:
    """The next eight tokens."""
    before = len(session.token_ids)
    session.generate(SamplingConfig(max_new_tokens=8))
    return session.token_ids[before:]


@torch.inference_mode()
def cut_back(session: Session, page: int) -> None:
    """As after damage, with pages that are whole: to before ``page``; the rest is prefilled when it goes on."""
    repair(session, IntegrityError("cut back", layer=0, page=page))


def flip_once(saved: Saved, seed: int) -> str:
    """Flip one random bit of one file of a copy and go on with it; "refused", "computed again" or "harmless"."""
    chance = random.Random(seed)
    copy = saved.path.with_name("copy.kvo")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved.path, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    pages = [p for p in files if p.suffix == ".kv"]
    others = [p for p in files if p.suffix != ".kv"]
    file = chance.choice(pages if chance.random() < 0.5 else others)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    try:
        with saved.rt.restore(copy) as session:
            found, n_again = follow(session), session.stats().recomputed_pages
    except IntegrityError:
        assert file.suffix != ".kv", "pages can be computed again"
        return "refused"
    assert file.suffix == ".kv", file.name
    page = saved.page_at(file, at)
    assert found == saved.expected(page), (file.name, at)
    assert (n_again > 0) == (page is not None), (file.name, at)
    return "computed again" if n_again else "harmless"
