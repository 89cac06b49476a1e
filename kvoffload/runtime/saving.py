"""Saving a session to a folder and building it again from one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kvoffload_storage.bundle import Bundle, lock_bundle, open_bundle, save_bundle
from kvoffload_storage.bundle_format import Manifest
from kvoffload_storage.errors import IntegrityError, UnavailableError
from kvoffload_storage.locks import FolderLock
from kvoffload_storage.manifests import read_manifest
from kvoffload_storage.rewrite import is_scattered, rewrite_bundle
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


class SavedAs:
    """The file that a session was read from or saved to, and the right to write to it where it is held."""

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock | None) -> None:
        self.path, self.manifest, self.lock = path, manifest, lock

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def fingerprint(model: Any, config: RuntimeConfig) -> Fingerprint:
    """Of a loaded model; reads its weight files."""
    return fingerprint_of(weights_hash(source_of(model.config)), model.config, model.dtype, config)


def save_session(session: "Session", path: Path, *, pinned: bool | None = None) -> SavedAs:
    """Save as FORMAT.md says. The right to write is taken for the save alone unless the session holds it already.
    Raises UsageError when another process has it, or saved there since the session was read."""
    refuse_files(session.ranks)
    known = session.saved_as if session.saved_as and session.saved_as.path == path.absolute() else None
    tensors, layers = dump_cache(session.cache)
    tensors["token_ids"] = torch.tensor(session.token_ids, dtype=torch.int64)
    tensors |= session.state_tensors()
    description = Description(
        model=str(session.model.config.name_or_path),
        fingerprint=fingerprint(session.model, session.config),
        versions=versions(),
        policy=policy_of(session.config),
        n_tokens=len(session.token_ids),
        n_in_kv=session.cache.get_seq_length(),
        prompt_tokens=session.prompt_tokens,
        unfinished=session.unfinished,
        prompt_start=session.prompt_start,
        sampling=None if session.sampling is None else session.sampling.model_dump(mode="json"),
        layers=layers,
    )
    held = known.lock if known is not None else None
    try:
        lock = held or (lock_bundle(path) if path.exists() else None)
        if known is not None and path.exists() and read_manifest(path) != known.manifest:
            raise UsageError(f"session {str(path)!r} was saved by another process since it was read")
        sealed = session.cache.seal(session.config.nvme_dir or path.absolute().parent)
        stored = description.model_dump(mode="json")
        manifest, lock = save_bundle(path, sealed, encode_state(tensors), stored, lock=lock, pinned=pinned)
    except UnavailableError as error:
        raise UsageError(str(error)) from error
    if held is None and session.autosave != path:
        lock.release()
        return SavedAs(path.absolute(), manifest, None)
    return SavedAs(path.absolute(), manifest, lock)


def open_session_file(path: Path, config: RuntimeConfig) -> Bundle:
    """Raises UsageError where there is none."""
    try:
        return open_bundle(path, direct=False if config.direct == "off" else None)
    except UnavailableError as error:
        raise UsageError(str(error)) from error


def take_write_lock(path: Path) -> FolderLock:
    """Raises UsageError when another process writes to the session."""
    try:
        return lock_bundle(path)
    except UnavailableError as error:
        raise UsageError(f"{error}; --session-readonly reads it") from error


def rewrite_if_scattered(path: Path, lock: FolderLock) -> None:
    """Write a session's pages in one piece when they are in many."""
    try:
        if is_scattered(read_manifest(path)):
            rewrite_bundle(path, lock)
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
    if session.recomputed_pages and not description.unfinished:
        session.finish_prefill()
    return description


@torch.inference_mode()
def fill_with_prefix(session: "Session", bundle: Bundle, prompt: list[int]) -> int:
    """Give a new session what a session file has of the beginning of a prompt, and close the file; how many tokens are
    in the KV then. At least one token of the prompt is left, and a window of them where the rest differs: pages are
    taken whole, and what follows them has to be prefilled. Sampling does not go on where the file's did."""
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
