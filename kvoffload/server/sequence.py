"""A job that runs: its session, first prefilled chunk by chunk, then decoded token by token."""

import logging
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol

from kvoffload.errors import KvoffloadError
from kvoffload.models.batch import FAILURES
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.events import Progress, StreamEvent
from kvoffload.runtime.layer_figures import LayerWatch
from kvoffload.runtime.session import Session
from kvoffload.server.errors import Failure, server_failure
from kvoffload.server.job import Done, Job, Piece

_log = logging.getLogger(__name__)


class Sequence:
    """Belongs to the scheduler's thread. ``cached_tokens`` of the prompt are in the session's KV already."""

    def __init__(self, job: Job, session: Session, cached_tokens: int) -> None:
        self.job, self.session, self.cached_tokens = job, session, cached_tokens
        session.begin_prefill(job.prompt[cached_tokens:])
        session.before = None  # a session whose prefill fails is closed
        self._chunks = session.prefill_chunks()
        self._events: Generator[StreamEvent, None, None] = session.stream(job.sampling)  # type: ignore[assignment]
        self._watch = LayerWatch()
        self.n_new = 0
        self._closed = False

    @property
    def live(self) -> bool:
        """Whether anybody waits for its next token."""
        return not (self._closed or self.job.cancelled)

    @property
    def prefilling(self) -> bool:
        return self.session.unfinished

    def prefill_chunk(self) -> Progress | None:
        """Take in one chunk."""
        return next(self._chunks, None)

    def step(self) -> StreamEvent:
        """Generate one token."""
        event = next(self._events)
        self.n_new += 1
        return event

    def tell(self, event: StreamEvent) -> Done | None:
        """Send the client what a step gave; the end of the answer, if this was it."""
        layers = self._watch.take(self.session.cache.offloaded) if self.job.with_layers else None
        if event.text or layers:
            self.job.send(Piece(event.text, layers))
        if event.finish is None:
            return None
        self._events.close()
        return Done(event.finish, self.n_new, self.cached_tokens, self.session.stats())

    def close(self) -> None:
        """End the generation and give the session back."""
        self._closed = True
        self._events.close()
        give_back(self.session)


def give_back(session: Session) -> None:
    """Close a session; if its files cannot be given back, that is the log's matter and not the next request's."""
    try:
        session.close()
    except FAILURES as error:
        _log.error("a session was not closed cleanly", exc_info=error)


Stepped = tuple[Sequence, StreamEvent | Failure]


class Stepper(Protocol):
    """One decode step of several sequences that are all prefilled.

    Gives every sequence's token, or why it failed, as soon as it is there; between two of them the scheduler may close
    sequences, and those that are not ``live`` any more are left out.
    """

    def __call__(self, sequences: Iterable[Sequence]) -> Iterator[Stepped]: ...


def step_in_turn(sequences: Iterable[Sequence]) -> Iterator[Stepped]:
    """A forward a sequence, one after the other."""
    for sequence in sequences:
        if not sequence.live:
            continue
        try:
            yield sequence, sequence.step()
        except FAILURES as error:
            yield sequence, as_failure(error)


def step_together(runtime: Runtime) -> Stepper:
    """One forward of all that can share one, and then a token of each in turn."""

    def step(sequences: Iterable[Sequence]) -> Iterator[Stepped]:
        live = [sequence for sequence in sequences if sequence.live]
        runtime.feed_ahead([sequence.session for sequence in live])
        yield from step_in_turn(live)

    return step


def as_failure(error: BaseException) -> Failure:
    """What a client is told of an error that ended its request; paths and the like stay in the server's log."""
    _log.warning("a request failed", exc_info=error)
    if isinstance(error, KvoffloadError):
        return server_failure(" ".join(str(error).split()))
    return server_failure(f"the server failed at this request: {type(error).__name__}")
