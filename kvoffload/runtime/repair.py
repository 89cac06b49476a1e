"""Pages that came back damaged: they and what follows them are dropped, and computed again from the tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvoffload_storage.bundle_check import damage_in
from kvoffload_storage.errors import IntegrityError
from kvoffload_storage.segments import Sealed
from kvoffload_storage.store import Moved
from torch import Tensor

from kvoffload.models.cache import OffloadCache
from kvoffload.models.cache_state import LayerState, dump_layers, rewind_cache

if TYPE_CHECKING:
    from kvoffload.runtime.session import Session

MOST_REPAIRS = 3  # in one session: a disk that damages more than that is not to be worked around


def repair(session: "Session", error: IntegrityError) -> None:
    """Go back to before the first damaged page of a session in use, whose forward failed with ``error``; raises it
    where no page is to blame. The tokens behind that are not in the KV any more."""
    if error.page is None or session.n_repairs >= MOST_REPAIRS or session.ranks.several:
        raise error  # other ranks know nothing of it and go on
    old = session.cache
    tensors, states = dump_layers(old)
    sealed = old.seal(session.config.nvme_dir or Path.cwd())
    go_back(session, sealed, tensors, states, error)
    carry_over(session, old)
    old.close()


def carry_over(session: "Session", old: OffloadCache) -> None:
    """What the cache before the session's counted."""
    for before, after in zip(old.offloaded, session.cache.offloaded, strict=False):
        after.meter = before.meter
        after.fetch.take_counts(before.fetch)
    session.cache.copied_read += old.copied_read
    session.cache.copied_written += old.copied_written


def go_back(
    session: "Session", sealed: Sequence[Sealed], tensors: Mapping[str, Tensor], states: Sequence[LayerState],
    error: IntegrityError,
) -> None:  # fmt: skip
    """Give the session a new cache that ends before the first damaged page, of which ``error`` names one."""
    damage = [error, *(found for store in sealed for found in damage_in(store, Path("page files")))]
    pages = {(found.layer, found.page) for found in damage if found.page is not None}
    n_pages = min(page for _, page in pages)
    cache = beginning_with(session, sealed, n_pages)
    rewind_cache(cache, tensors, states, session.model.device, n_pages=n_pages)
    cache.copied_read += Moved(nvme=sum(page_bytes(store) for store in sealed))
    session.cache, session.unfinished = cache, True
    session.n_repairs += 1
    session.recomputed_pages += len(pages)


def beginning_with(session: "Session", sealed: Sequence[Sealed], n_pages: int) -> OffloadCache:
    cache = OffloadCache(session.model.config, session.config)
    cache.wrap_store = session.cache.wrap_store
    cache.begin_with([store.first(n_pages) for store in sealed])
    return cache


def page_bytes(store: Sealed) -> int:
    """Bytes of all pages, which looking for damage reads."""
    return sum(store.n_pages(layer) for layer in range(store.shape.n_layers)) * store.shape.page_bytes
