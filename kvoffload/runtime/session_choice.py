"""``--session``: what is found there before a model is loaded, and the prompt that follows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvoffload_storage.errors import IntegrityError
from kvoffload_storage.private_files import read_checked

from kvoffload.errors import UsageError
from kvoffload.models.catalog import ModelSource
from kvoffload.models.fingerprint import weights_hash
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.prompt import follow_up_ids, prompt_ids
from kvoffload.runtime.saving import check_session, claim_session, take_write_lock
from kvoffload.runtime.session import Session
from kvoffload.runtime.session_file import Description, changed_versions, decode_state, fingerprint_of
from kvoffload.runtime.terminal import ProgressView
from kvoffload.settings import Settings


@dataclass(frozen=True)
class FoundSession:
    """A session that fits: its tokens, and the newest prompt where it is ``unfinished`` in its prefill or where the
    command that brought it did not end."""

    path: Path
    token_ids: list[int]
    newest: slice | None
    unfinished: bool

    def prompt(self, text: str, settings: Settings, tokenizer: Any) -> list[int]:
        """Tokens to append: none where nothing was asked or the newest prompt goes on; UsageError where another
        prompt's prefill is not finished."""
        if not text:
            return []
        if self.newest is not None:
            asked = _tokens_behind(self.token_ids[: self.newest.start], text, settings, tokenizer)
            if asked == self.token_ids[self.newest]:
                return []
        if self.unfinished:
            raise UsageError(
                f"session {str(self.path)!r}: the prefill of another prompt was broken off; give that one, or none, to "
                "go on with it"
            )
        return _tokens_behind(self.token_ids, text, settings, tokenizer)


def _tokens_behind(before: list[int], text: str, settings: Settings, tokenizer: Any) -> list[int]:
    return follow_up_ids(text, settings, tokenizer, before[-1]) if before else prompt_ids(text, settings, tokenizer)


def _newest(description: Description) -> slice | None:
    """Where the prompt lies that waits for its prefill or its answer."""
    if description.prompt_end is None and not description.unfinished:
        return None
    return slice(description.prompt_start, description.prompt_end or description.n_tokens)


def has_session(settings: Settings) -> bool:
    """Whether ``--session`` names something that is there."""
    if settings.session is None:
        if settings.session_readonly:
            raise UsageError("session_readonly: give the session with --session")
        return False
    if settings.session.suffix != ".kvo":
        raise UsageError(f"session: {str(settings.session)!r} does not end in .kvo")
    if settings.session.absolute().parent.suffix == ".kvo":
        raise UsageError(f"session: {str(settings.session.absolute().parent)!r} is one, and another cannot be in it")
    if not settings.session.exists() and settings.session_readonly:
        raise UsageError(f"session {str(settings.session)!r} is not there, and --session-readonly makes none")
    if not settings.session.exists() and not settings.session.absolute().parent.is_dir():
        raise UsageError(f"session: {str(settings.session.absolute().parent)!r} is not a folder")
    return settings.session.exists()


def find_session(
    settings: Settings, source: ModelSource, model_config: Any, dtype: torch.dtype, view: ProgressView
) -> FoundSession | None:
    """The session that ``--session`` names, if it is there; UsageError if it does not fit or is in use, IntegrityError
    if it is damaged. No page is read."""
    is_there = has_session(settings)
    if settings.session is None:
        return None
    if not settings.session_readonly:
        (take_write_lock if is_there else claim_session)(settings.session).release()
    if not is_there:
        return None
    here = fingerprint_of(weights_hash(source), model_config, dtype, settings.runtime())
    manifest, description = check_session(settings.session, here)
    if warning := changed_versions(description.versions):
        view.warn(warning)
    name = settings.session / manifest.state.file
    try:
        state = read_checked(name, manifest.state.n_bytes, manifest.state.xxh3_64)
    except FileNotFoundError as error:
        raise IntegrityError(f"{name}: missing") from error
    ids = decode_state(state, description, name)["token_ids"].tolist()
    return FoundSession(settings.session, ids, _newest(description), description.unfinished)


def check_unchanged(session: Session, settings: Settings, found: FoundSession | None) -> None:
    """Raise UsageError where the session that was opened is not the one that the prompt was made for."""
    if session.token_ids != ([] if found is None else found.token_ids):
        raise UsageError(f"session {str(settings.session)!r} was changed by another process meanwhile: ask again")


def open_session(runtime: Runtime, settings: Settings, *, expected_tokens: int) -> Session:
    """A session of its own, the one to go on with, or a copy of it in memory."""
    if settings.session is None:
        return runtime.session(expected_tokens=expected_tokens)
    if settings.session_readonly:
        return runtime.restore(settings.session)
    return runtime.open_session(settings.session, expected_tokens=expected_tokens)
