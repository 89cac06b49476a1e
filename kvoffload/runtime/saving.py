"""Saving a session to a folder and building it again from one."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kvoffload_storage.bundle import Bundle, disk_bytes, lock_bundle, open_remains, remove_unnamed, save_bundle
from kvoffload_storage.bundle_format import Manifest
from kvoffload_storage.errors import IntegrityError, UnavailableError
from kvoffload_storage.locks import FolderLock, NameClaim, claim_name, sweep
from kvoffload_storage.manifests import read_manifest
from kvoffload_storage.private_files import make_private
from kvoffload_storage.rewrite import is_scattered, reclaim_bundle, rewrite_bundle
from kvoffload_storage.space import Room
from torch import Tensor

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.models.cache_state import dump_cache, load_cache, rewind_cache
from kvoffload.models.fingerprint import source_of, weights_hash
from kvoffload.runtime.ranks import refuse_files
from kvoffload.runtime.repair import go_back
from kvoffload.runtime.session_file import (
    Description,
    Fingerprint,
    check_fingerprint,
    describe,
    encode_state,
    fingerprint_of,
    policy_of,
    read_description,
    versions,
)

if TYPE_CHECKING:
    from kvoffload.runtime.session import Session


_log = logging.getLogger(__name__)


class SavedAs:
    """The file that a session was read from or saved to last, and the right to write to it where it is held; ``claim``
    is the right to make the one that it saves itself to."""

    def __init__(self, path: Path, lock: FolderLock | None, claim: NameClaim | None = None) -> None:
        self.path, self.lock, self.claim = path, lock, claim

    def release(self) -> None:
        for held in (self.lock, self.claim):
            if held is not None:
                held.release()


def fingerprint(model: Any, config: RuntimeConfig) -> Fingerprint:
    """Of a loaded model; reads its weight files."""
    return fingerprint_of(weights_hash(source_of(model.config)), model.config, model.dtype, config)


def save_session(session: "Session", path: Path, *, pinned: bool | None, overwrite: bool) -> SavedAs:
    """Save as FORMAT.md says. The right to write is taken for the save alone unless the session holds it already.
    Raises UsageError when another process has it, or saved there since the session was read, and where another session
    is that was not to be overwritten; CapacityError, and everything is as it was, where there is no room."""
    refuse_files(session.ranks)
    whole, saved_as = path.absolute(), session.saved_as
    tensors, description = _content(session)
    lock = held = saved_as.lock if saved_as is not None and saved_as.path == whole else None
    keep = None if session.before is None else session.before.lineage.get(whole)
    manifest: Manifest | None = None
    try:
        lock = held or (lock_bundle(path) if path.exists() else None)
        if path.exists() and not overwrite:
            _check_lineage(session, path)
        manifest, lock = save_bundle(
            path,
            session.cache.seal(session.config.nvme_dir or whole.parent),
            encode_state(tensors),
            description.model_dump(mode="json"),
            lock=lock,
            pinned=pinned,
            room=room_beside(whole, session.config),
            keep=keep,
        )
        if keep is not None and not session.unfinished:
            remove_unnamed(path, manifest)
    except UnavailableError as error:
        raise UsageError(str(error)) from error
    finally:
        if manifest is None and lock is not None and held is None:
            lock.release()
    session.lineage[whole] = manifest
    claim = None if saved_as is None else saved_as.claim
    if session.autosave == path and claim is not None:
        claim.release()
    if held is None and session.autosave != path:
        lock.release()
        return SavedAs(whole, None, claim)
    return SavedAs(whole, lock, claim)


def room_beside(path: Path, config: RuntimeConfig) -> Room:
    """What may be written in the folder that a session lies in."""
    return Room(path.absolute().parent, config.nvme_max, config.nvme_floor)


def _content(session: "Session") -> tuple[dict[str, Tensor], Description]:
    tensors, layers = dump_cache(session.cache)
    tensors["token_ids"] = torch.tensor(session.token_ids, dtype=torch.int64)
    return tensors | session.state_tensors(), Description(
        model=str(session.model.config.name_or_path),
        fingerprint=fingerprint(session.model, session.config),
        versions=versions(),
        policy=policy_of(session.config),
        n_tokens=len(session.token_ids),
        n_in_kv=session.cache.get_seq_length(),
        prompt_tokens=session.prompt_tokens,
        unfinished=session.unfinished,
        prompt_start=session.prompt_start,
        prompt_end=session.prompt_end,
        sampling=None if session.sampling is None else session.sampling.model_dump(mode="json"),
        layers=layers,
    )


def _check_lineage(session: "Session", path: Path) -> None:
    known = session.lineage.get(path.absolute())
    if known is None:
        raise UsageError(f"{str(path)!r} exists already and is not this session; give another name, or overwrite it")
    if read_manifest(path) != known:
        raise UsageError(f"session {str(path)!r} was saved by another process since it was read")


def open_session_file(path: Path, config: RuntimeConfig) -> Bundle:
    """Also where page files are lost; raises UsageError where there is none."""
    try:
        return open_remains(path, direct=False if config.direct == "off" else None)
    except UnavailableError as error:
        raise UsageError(str(error)) from error


def claim_session(path: Path) -> NameClaim:
    """The right to make a session; raises UsageError when another process has it."""
    try:
        return claim_name(path)
    except UnavailableError as error:
        raise UsageError(str(error)) from error


def take_write_lock(path: Path) -> FolderLock:
    """Raises UsageError when another process writes to the session."""
    try:
        return lock_bundle(path)
    except UnavailableError as error:
        hint = "; --session-readonly reads it" if path.is_dir() else ""
        raise UsageError(f"{error}{hint}") from error


def tidy(path: Path, lock: FolderLock, config: RuntimeConfig) -> None:
    """Give back what killed processes left allocated, and write a session's pages in one piece when they are in many,
    none is damaged and there is room for both."""
    room = room_beside(path, config)
    try:
        for folder in {room.folder, config.nvme_dir or room.folder}:
            if folder.is_dir():
                sweep(folder)
        reclaim_bundle(path)
        if open_to_others := make_private(path):
            _log.warning("%s: others may use it, and its mode cannot be changed by you", open_to_others[0])
        if is_scattered(read_manifest(path)) and room.fits(disk_bytes(path)):
            with suppress(IntegrityError):  # a restore mends it
                rewrite_bundle(path, lock, room=room)
    except UnavailableError as error:
        raise UsageError(str(error)) from error


def check_session(path: Path, here: Fingerprint) -> tuple[Manifest, Description]:
    """What a session file says of itself, if it fits; UsageError or IntegrityError if it does not. Reads no pages."""
    try:
        manifest = read_manifest(path)
    except UnavailableError as error:
        raise UsageError(str(error)) from error
    description = describe(manifest.session, path)
    check_fingerprint(path, description.fingerprint, here)
    return manifest, description


@torch.inference_mode()
def fill_session(session: "Session", bundle: Bundle) -> Description:
    """Give a new session the tokens, pages and states of a session file. Every page is read, verified and shown to
    selector and completion."""
    description, tensors = _read_state(session, bundle)
    _fill_cache(session, bundle, description, tensors)
    session.take_over(
        tensors["token_ids"].tolist(),
        description,
        {key: tensors[key] for key in ("logits", "rng") if key in tensors},
        None if description.sampling is None else SamplingConfig(**description.sampling),
    )
    session.saved_as = SavedAs(bundle.path.absolute(), None)
    session.lineage[bundle.path.absolute()] = bundle.manifest
    if session.recomputed_pages and not description.unfinished:
        session.finish_prefill()
    return description


@torch.inference_mode()
def fill_with_prefix(session: "Session", bundle: Bundle, prompt: list[int]) -> int:
    """Give a new session what a session file has of the beginning of a prompt, and close the file; how many tokens are
    in the KV then. At least one token of the prompt is left, and a window of them where the rest differs: pages are
    taken whole, and what follows them has to be prefilled. Sampling does not go on where the file's did."""
    if bundle.lost is not None:
        raise bundle.lost
    description, tensors = _read_state(session, bundle)
    known = tensors["token_ids"].tolist()[: description.n_in_kv]
    n_common = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
    n_common = min(n_common, len(prompt) - 1)
    if n_common == description.n_in_kv:
        _fill_cache(session, bundle, description, tensors)
    else:
        config = session.config
        n_sealed = min(len(layer) for store in bundle.stores for layer in store.checksums)
        n_pages = min((n_common - config.sinks - config.recent) // config.page_size, n_sealed)
        if n_pages > 0:
            session.cache.begin_with([store.first(n_pages) for store in bundle.stores])
            rewind_cache(session.cache, tensors, description.layers, session.model.device, n_pages=n_pages)
        bundle.close()
    n_kept = session.cache.get_seq_length()
    session.token_ids = prompt[:n_kept]
    session.restored_tokens = n_kept
    return n_kept


def _read_state(session: "Session", bundle: Bundle) -> tuple[Description, dict[str, Tensor]]:
    """What a session file says beside its pages, if it fits the session's model and settings."""
    description, tensors = read_description(bundle)
    check_fingerprint(bundle.path, description.fingerprint, fingerprint(session.model, session.config))
    if len(description.layers) != len(session.cache.layers):
        raise IntegrityError(f"{bundle.path}: {len(description.layers)} layers, the model has "
                             f"{len(session.cache.layers)}")  # fmt: skip
    return description, tensors


def _fill_cache(session: "Session", bundle: Bundle, description: Description, tensors: dict[str, Tensor]) -> None:
    session.cache.begin_with(bundle.stores)
    same_policy = description.policy == policy_of(session.config)
    try:
        if bundle.lost is not None:
            raise bundle.lost
        load_cache(session.cache, tensors, description.layers, session.model.device, same_policy=same_policy)
    except IntegrityError as error:
        if error.page is None:
            raise
        broken = session.cache
        go_back(session, bundle.stores, tensors, description.layers, error)
        broken.close()
    if session.cache.get_seq_length() > description.n_in_kv or description.n_in_kv > description.n_tokens:
        name = bundle.path / bundle.manifest.state.file
        raise IntegrityError(f"{name}: {session.cache.get_seq_length()} tokens, expected {description.n_in_kv}")
