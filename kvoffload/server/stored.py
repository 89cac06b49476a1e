"""Sessions on disk by name: a prompt that begins like one reads its sealed pages, and an answer can be stored as one.

They are the folders ``NAME.kvo`` of ``kvoffload session``, in one folder of the server's.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kvoffload_storage.bundle_format import MANIFEST_NAME, Manifest
from kvoffload_storage.errors import StorageError
from kvoffload_storage.locks import sweep
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kvoffload.errors import KvoffloadError
from kvoffload.models.batch import FAILURES
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.saving import check_session, fingerprint
from kvoffload.runtime.session import Session
from kvoffload.server.errors import refuse

_log = logging.getLogger(__name__)
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Stored:
    """What became of an answer that was to be stored: its name, and why it could not be where it was not."""

    name: str
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        told = {} if self.error is None else {"error": self.error}
        return {"name": self.name, "stored": self.error is None, **told}


class StoredSessions:
    """One folder of them. ``check`` may be called by any thread; everything else belongs to the scheduler's."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        assert runtime.loaded is not None, "a server has a model"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(folder)
        self._folder, self._runtime = folder, runtime
        self._here = fingerprint(runtime.loaded.model, runtime.config)
        self._tokens: dict[Path, tuple[int, Tokens | None]] = {}

    def check(self, name: str) -> None:
        """Raise RequestError where the name belongs to a session that this model cannot go on with."""
        path = self._path(name)
        if not path.exists():
            return
        try:
            check_session(path, self._here)
        except (KvoffloadError, StorageError) as error:
            _log.warning("session %s cannot be used", name, exc_info=error)
            raise refuse(
                f"session {name!r} cannot be gone on with: it is damaged, or of another model or other settings",
                param="kvoffload", code="session_unusable", status=409,
            ) from None  # fmt: skip

    def longest(self, prompt: list[int]) -> tuple[Path | None, int]:
        """The session that a prompt has the longest beginning in common with, and how many tokens that are."""
        wanted = np.array(prompt)
        best: tuple[Path | None, int] = (None, 0)
        for path in sorted(self._folder.glob("*.kvo")):
            known = self._known(path)
            if known is not None and (n := n_common(known, wanted)) > best[1]:
                best = (path, n)
        return best

    def begin(self, path: Path, prompt: list[int], **options: Any) -> tuple[Session, int] | None:
        """A session that begins with what the one at ``path`` has of a prompt, with the number of tokens; None where it
        cannot be used after all."""
        try:
            session, n_tokens = self._runtime.restore_prefix(path, prompt, **options)
        except FAILURES as error:
            _log.warning("stored session %s was not used", path.name, exc_info=error)
            return None
        if n_tokens == 0:
            session.close()
            return None
        return session, n_tokens

    def store(self, session: Session, name: str) -> Stored:
        """Save a session that is not in use any more, in the place of what has that name."""
        try:
            session.save(self._path(name), overwrite=True)
        except FAILURES as error:
            _log.warning("session %s was not stored", name, exc_info=error)
            return Stored(name, f"{type(error).__name__}: the server's log has more")
        return Stored(name)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.kvo"

    def _known(self, path: Path) -> Tokens | None:
        """The tokens in a session's KV, read again when it was saved anew; None for one that does not fit."""
        try:
            saved = (path / MANIFEST_NAME).stat().st_mtime_ns
            before = self._tokens.get(path)
            if before is None or before[0] != saved:
                manifest, description = check_session(path, self._here)
                self._tokens[path] = saved, _tokens_of(path, manifest)[: description.n_in_kv]
        except (KvoffloadError, StorageError, SafetensorError, OSError):
            self._tokens[path] = 0, None
        return self._tokens[path][1]


def n_common(known: Tokens, wanted: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(known), len(wanted))
    different = np.flatnonzero(known[:n] != wanted[:n])
    return int(different[0]) if len(different) else n


def _tokens_of(path: Path, manifest: Manifest) -> Tokens:
    with safe_open(path / manifest.state.file, framework="numpy") as state:
        tokens: Tokens = state.get_tensor("token_ids")
    return tokens
