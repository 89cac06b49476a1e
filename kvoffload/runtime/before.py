"""Where a session stood before a prompt, to go back to when there is no room for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from kvoffload_storage.bundle import revert_bundle
from kvoffload_storage.bundle_format import Manifest
from kvoffload_storage.errors import CapacityError
from kvoffload_storage.rewrite import reclaim_bundle
from torch import Tensor

from kvoffload.errors import KvoffloadError, OutOfRoomError
from kvoffload.models.cache_state import LayerState, dump_cache, load_cache
from kvoffload.runtime.repair import beginning_with, carry_over

if TYPE_CHECKING:
    from kvoffload.runtime.session import Session


@dataclass(frozen=True)
class Before:
    """All that a prefill changes; ``lineage`` are the files as they were saved."""

    tensors: Mapping[str, Tensor]
    states: Sequence[LayerState]
    n_pages: int
    token_ids: list[int]
    logits: Tensor | None
    prompt: tuple[int, int, int | None]  # prompt_tokens, prompt_start, prompt_end
    lineage: Mapping[Path, Manifest]


def standing(session: "Session") -> Before | None:
    """Where a session stands whose pages lie in files; None where it is empty or cannot go back."""
    in_files = session.autosave is not None or session.config.offload == "nvme"
    if not in_files or not session.cache.offloaded or session.ranks.several:
        return None
    try:
        tensors, states = dump_cache(session.cache)
    except KvoffloadError:  # what cannot be saved
        return None
    return Before(
        tensors,
        states,
        session.cache.offloaded[0].n_pages,
        list(session.token_ids),
        session.state_tensors().get("logits"),
        (session.prompt_tokens, session.prompt_start, session.prompt_end),
        dict(session.lineage),
    )


@contextmanager
def going_back(session: "Session") -> Iterator[None]:
    """A prompt for which this block finds no room leaves the session as it was before it."""
    try:
        yield
    except (CapacityError, OutOfRoomError):
        if session.before is not None:
            _take_back(session, session.before)
        raise
    session.before = None


@torch.inference_mode()
def _take_back(session: "Session", before: Before) -> None:
    """The session, and the file that it saves itself to, as they were; the pages since then are dropped."""
    path, old = session.autosave, session.cache
    manifest = None if path is None else before.lineage.get(path.absolute())
    if path is not None and manifest is not None and session.lineage[path.absolute()] != manifest:
        revert_bundle(path, manifest)
        session.lineage[path.absolute()] = manifest
    sealed = old.seal(session.config.nvme_dir or Path.cwd(), n_pages=before.n_pages)
    session.cache = beginning_with(session, sealed, before.n_pages)
    old.close()
    if path is not None and manifest is not None:
        reclaim_bundle(path)
    load_cache(session.cache, before.tensors, before.states, session.model.device, same_policy=True)
    carry_over(session, old)
    session.token_ids, session.unfinished, session.before = before.token_ids, False, None
    session.prompt_tokens, session.prompt_start, session.prompt_end = before.prompt
    logits = before.logits
    session._logits, session._picked = None if logits is None else logits.to(session.model.device), None
