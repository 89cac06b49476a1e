"""``Runtime``: a model, a configuration, and sessions over them."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from kvoffload_storage.bundle import Bundle
from pydantic import ValidationError

from kvoffload.config import RuntimeConfig, SamplingConfig, explain
from kvoffload.errors import UsageError
from kvoffload.models.batch_graph import BatchSteps
from kvoffload.models.cache import OffloadCache
from kvoffload.models.catalog import LoadedModel, load_model, resolve
from kvoffload.models.compiled import glue_of, has_glue
from kvoffload.models.fingerprint import check_calibrations
from kvoffload.models.joined import join
from kvoffload.models.parallel import ALONE, Ranks, find_ranks, stage_layers
from kvoffload.models.progress import OnProgress, ignore
from kvoffload.models.self_test import check_parity, shares_forwards, switch_attention
from kvoffload.repeats import capture_of
from kvoffload.runtime.events import StreamEvent
from kvoffload.runtime.page_size import settle_page_size
from kvoffload.runtime.ranks import rank_config, refuse_files, replays, with_rank_budget
from kvoffload.runtime.saving import (
    SavedAs,
    claim_session,
    fill_session,
    fill_with_prefix,
    open_session_file,
    take_write_lock,
    tidy,
)
from kvoffload.runtime.session import Session
from kvoffload.runtime.together import feed_ahead, stream_together
from kvoffload.units import Budget

T = TypeVar("T")


def checked(fields: dict[str, Any]) -> RuntimeConfig:
    """A configuration from its fields; raises UsageError in one line."""
    try:
        return RuntimeConfig(**fields)
    except ValidationError as error:
        raise UsageError(explain(error, RuntimeConfig.model_fields)) from None


class Runtime:
    """Runs a causal language model with its KV in the configured tier.

    ``Runtime.from_pretrained("smollm2-135m", offload="nvme", budget="5%")`` loads a model; ``Runtime(None, config)``
    only attaches to models that the caller has loaded.
    """

    def __init__(self, loaded: LoadedModel | None, config: RuntimeConfig | None = None) -> None:
        self.config = config or RuntimeConfig()
        self.loaded = loaded
        if loaded is not None:
            settled = settle_page_size(self.config, loaded.config, loaded.model.dtype)
            self.config = rank_config(settled, loaded.ranks)
            self._join(loaded)
            self._take_over(loaded.model)

    @classmethod
    def from_pretrained(cls, model: str, *, on_progress: OnProgress = ignore, **config: Any) -> Self:
        """``model`` is a built-in name, a Hugging Face folder or hub name, or a .gguf file; ``config`` are the fields
        of RuntimeConfig. ``on_progress`` hears of downloads and conversions. Raises UsageError for what it cannot
        accept, before any weights load. Under torchrun all processes make the same calls, and each has its part of the
        model and of the KV."""
        settings = checked(config)
        ranks, source = find_ranks(settings.pp_size), resolve(model)
        rank_config(settings, ranks)
        check_calibrations(settings.calibrations, source)
        options: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "on_progress": on_progress}
        return cls(load_model(source, ranks=ranks, **options), settings)

    def session(self, *, expected_tokens: int = 0, budget: str | int | Budget | None = None) -> Session:
        """A new, empty sequence; ``expected_tokens`` sizes its storage at once instead of by growth, ``budget`` stands
        in for the configuration's."""
        config = self.config if budget is None else with_rank_budget(self.config, budget, self._ranks)
        return self._session(config, expected_tokens)

    def _session(self, config: RuntimeConfig, expected_tokens: int) -> Session:
        if self.loaded is None:
            raise UsageError("this Runtime has no model of its own: use attach(), or Runtime.from_pretrained()")
        loaded = self.loaded
        return Session(loaded.model, loaded.tokenizer, config, expected_tokens=expected_tokens, ranks=loaded.ranks)

    @cached_property
    def shares_forwards(self) -> bool:
        """Whether one forward can decode several sessions; tried once. False for models with sliding windows or linear
        layers, for policies that compute tokens anew and for several ranks."""
        if self.loaded is None or self._ranks.several:  # what fails on one rank alone would leave the others waiting
            return False
        return shares_forwards(self.loaded.model, self.config)

    def feed_ahead(self, sessions: Sequence[Session]) -> None:
        """Feed the newest token of every session that has one in a single forward, where that can be done; their next
        step, whenever it comes, finds the logits there. One that fails tells so at that step, and no other does."""
        if self.shares_forwards:
            feed_ahead(sessions, self.shared_steps)

    @cached_property
    def shared_steps(self) -> BatchSteps:
        """How several sessions' forwards are made: as replays of a graph where the device and the configuration have
        them."""
        assert self.loaded is not None, "only a model of its own is decoded"
        capture = capture_of(self.loaded.model.device) if self.config.replays_steps else None
        glue = None if capture is None else glue_of(self.loaded.model, self.config.compile)
        return BatchSteps(self.loaded.model, capture, glue=glue)

    def stream_together(
        self, sessions: Sequence[Session], sampling: SamplingConfig | None = None
    ) -> Iterator[tuple[Session, StreamEvent]]:
        """``Session.stream`` of several prefilled sessions side by side, a forward a step for all of them; each ends
        when it is done. What went wrong with some is raised when the others are done."""
        yield from stream_together(sessions, sampling, self.feed_ahead)

    def restore(self, path: str | Path) -> Session:
        """The session that was saved at ``path``, verified; it may be asked for as often as wanted, also by several
        processes. Raises UsageError where there is none or where it was made with another model, dtype, page size,
        rotary settings or anchors; the storage package's IntegrityError where it is damaged."""
        return self._restore(Path(path), self.config)

    def restore_prefix(
        self, path: str | Path, prompt: list[int], *, expected_tokens: int = 0, budget: str | int | Budget | None = None
    ) -> tuple[Session, int]:
        """A session that begins with what the one saved at ``path`` has of the beginning of a prompt, and how many
        tokens that are: sealed pages are read instead of being prefilled. The saved one stays as it is. Raises what
        ``restore`` raises."""
        session = self.session(expected_tokens=expected_tokens, budget=budget)
        return session, _filled(session, Path(path), lambda bundle: fill_with_prefix(session, bundle, prompt))

    def _restore(self, path: Path, config: RuntimeConfig) -> Session:
        session = self._session(config, 0)
        _filled(session, path, lambda bundle: fill_session(session, bundle))
        return session

    def open_session(self, path: str | Path, *, expected_tokens: int = 0) -> Session:
        """The session at ``path``, for writing: no other process can write to it before ``close``. It is restored, or
        made at its first save. Prefills save it after every chunk, so that a killed one goes on from there."""
        path, config = Path(path), self.config
        refuse_files(self._ranks)
        if config.nvme_dir is None:  # on the session's file system, where its files can be linked to
            config = config.model_copy(update={"nvme_dir": path.absolute().parent})
        if not path.exists():
            claim = claim_session(path)
            session = self._session(config, expected_tokens)
            session.saved_as = SavedAs(path.absolute(), None, claim)
        else:
            lock = take_write_lock(path)
            try:
                tidy(path, lock, config)
                session = self._restore(path, config)
            except BaseException:
                lock.release()
                raise
            if session.saved_as is not None:
                session.saved_as.lock = lock
        session.autosave = path
        return session

    def attach(self, hf_model: Any, *, expected_tokens: int = 0) -> OffloadCache:
        """A cache for the stock ``hf_model.generate(past_key_values=cache)``, batches with left padding included.

        The model's attention implementation is switched to ours (its results with other caches stay the same). One
        cache serves one batch of sequences; close it afterwards. num_beams > 1 is refused.
        """
        owned = stage_layers(hf_model)
        self.config = settle_page_size(self.config, hf_model.config, hf_model.dtype)
        cache = OffloadCache(hf_model.config, self.config, expected_tokens=expected_tokens, owned=owned)
        if cache.anew.is_wanted or cache.freezing is not None:
            kinds = "+".join(config.kind for config in self.config.policy)
            raise UsageError(f"policy: {kinds!r} computes tokens anew, which the stock generate cannot: use a session")
        self._take_over(hf_model)
        return cache

    @property
    def _ranks(self) -> Ranks:
        return self.loaded.ranks if self.loaded else ALONE

    def _join(self, loaded: LoadedModel) -> None:
        """Lay the weights of a model that steps are compiled of side by side, unless another runtime had the model
        before: what was captured since would go on to read them where they were."""
        model: Any = loaded.model
        if (
            replays(self.config, loaded.ranks)
            and has_glue(model, self.config.compile)
            and not getattr(model, "_kvoffload_had", False)
        ):
            join(model)
        model._kvoffload_had = True

    def _take_over(self, model: Any) -> None:
        if getattr(model, "_kvoffload_checked", False) or not self.config.self_test:
            switch_attention(model)
            return
        check_parity(model, self.config)
        model._kvoffload_checked = True


def _filled(session: Session, path: Path, fill: Callable[[Bundle], T]) -> T:
    """Fill a new session from a session file; both are closed where that fails."""
    try:
        refuse_files(session.ranks)
        bundle = open_session_file(path, session.config)
        try:
            result = fill(bundle)
        except BaseException:
            bundle.close()
            raise
    except BaseException:
        session.close()
        raise
    return result
