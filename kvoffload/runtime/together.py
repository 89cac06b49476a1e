"""Several sessions of one model, decoded in one forward a step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import torch

from kvoffload.config import SamplingConfig
from kvoffload.models.batch import FAILURES
from kvoffload.models.batch_graph import BatchSteps
from kvoffload.runtime.events import StreamEvent
from kvoffload.runtime.session import Session


def feed_ahead(sessions: Sequence[Session], steps: BatchSteps) -> None:
    """Feed the pending token of all that have exactly one, if there are two of them or more."""
    ready = [session for session in sessions if not session.unfinished and len(session.pending) == 1]
    if len(ready) < 2:
        return
    model, started_s = ready[0].model, time.perf_counter()
    assert all(session.model is model for session in ready), "sessions of one model share a forward"
    try:
        outcomes = steps.feed([s.cache for s in ready], [s.pending[0] for s in ready])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
    except FAILURES as error:  # outside attention: it was everybody's forward
        outcomes = [error for _ in ready]
    took_s = time.perf_counter() - started_s
    for session, outcome in zip(ready, outcomes, strict=True):
        session.take_fed(outcome, took_s)


def stream_together(
    sessions: Sequence[Session], sampling: SamplingConfig | None, feed: Callable[[Sequence[Session]], None]
) -> Iterator[tuple[Session, StreamEvent]]:
    """A token of each in turn until all have ended; raises the first error then."""
    errors = list[BaseException]()
    with ExitStack() as stack:
        going = [(s, stack.enter_context(closing(s.stream(sampling)))) for s in sessions]  # type: ignore[type-var]
        while going:
            feed([session for session, _ in going])
            for session, stream in list(going):
                try:
                    event = next(stream)
                except FAILURES as error:
                    errors.append(error)
                    going.remove((session, stream))
                    continue
                if event.finish is not None:
                    going.remove((session, stream))
                yield session, event
    if errors:
        raise errors[0]
