"""Who gets the model when: one thread owns it, and every request has a turn in every round.

A round is one prefill chunk of one sequence (they take turns) and then one step of every sequence that is prefilled, so
a long prompt delays nobody by more than a chunk. Admission is first come, first served: nothing overtakes, so nothing
starves.

Threads: ``_waiting``, ``_running`` and ``_closing_at_s`` are read and written under ``_changed`` alone, by any thread;
sequences, sessions and the model belong to the worker. Signal handlers may call ``drain``, since the lock is reentrant.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from kvoffload.models.batch import FAILURES
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.session import Session
from kvoffload.server.errors import STOPPING, TIMED_OUT, Failure, RequestError, refuse, server_failure
from kvoffload.server.job import Done, Job, Queued
from kvoffload.server.kept import KeptSessions
from kvoffload.server.metrics import Metrics
from kvoffload.server.room import Room
from kvoffload.server.sequence import Sequence, Stepper, as_failure, step_together
from kvoffload.server.stored import StoredSessions


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once."""

    max_running: int
    max_queue: int
    keep_sessions: int
    room: Room


class Scheduler:
    """Runs jobs until it is closed; ``stepper`` makes one decode step of all that are prefilled, in one forward where
    none is given."""

    def __init__(
        self, runtime: Runtime, limits: Limits, metrics: Metrics, *,
        stepper: Stepper | None = None, stored: StoredSessions | None = None,
    ) -> None:  # fmt: skip
        self._runtime, self._limits, self._metrics, self._stored = runtime, limits, metrics, stored
        self._stepper = stepper or step_together(runtime)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Sequence] = []
        self._kept = KeptSessions(limits.keep_sessions)
        self._closing_at_s: float | None = None
        self._last_s = 1.0  # how long the newest finished request took
        self._worker = threading.Thread(target=self._work, name="kvoffload-scheduler", daemon=True)
        metrics.watch("running_requests", "Requests that have a session.", lambda: self.n_running)
        metrics.watch("queued_requests", "Requests that wait for one.", lambda: self.n_waiting)
        metrics.watch("kept_sessions", "Finished conversations kept for reuse.", lambda: len(self._kept))

    def start(self) -> None:
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted; not any more once the end has begun, or the worker has died."""
        return self._closing_at_s is None

    @property
    def shares_forwards(self) -> bool:
        """Whether a step of several requests is one forward; tried on the model the first time."""
        return self._runtime.shares_forwards

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> int:
        """Queue a job; how many go before it. Raises RequestError if it can never fit, or not now."""
        if short := self._limits.room.short_of(job.need):
            raise refuse(f"the request needs {short}", code="insufficient_room")
        with self._changed:
            if not self.alive:
                raise RequestError(STOPPING)
            if job.store_as is not None and job.store_as in self._names():
                raise refuse(f"session {job.store_as!r} is in use", code="session_in_use", status=409)
            if self.n_running + self.n_waiting >= self._limits.max_running + self._limits.max_queue:
                raise RequestError(self._queue_full())
            self._waiting.append(job)
            self._changed.notify()
            return self.n_waiting - 1

    def drain(self, grace_s: float) -> None:
        """Accept nothing more, send away who waits, and let who runs go on for so long."""
        with self._changed:
            if self._closing_at_s is None:
                self._closing_at_s = time.monotonic() + grace_s
            self._changed.notify()

    def close(self, grace_s: float = 0.0) -> None:
        """``drain``, and wait until all sessions are given back."""
        with self._changed:
            self.drain(grace_s)
            assert self._closing_at_s is not None
            self._closing_at_s = min(self._closing_at_s, time.monotonic() + grace_s)
        if self._worker.ident is not None:
            self._worker.join()

    def _names(self) -> set[str | None]:
        """Under which sessions will be stored that run or wait now."""
        return {job.store_as for job in (*self._waiting, *(sequence.job for sequence in self._running))}

    def _queue_full(self) -> Failure:
        rounds = 1 + self.n_waiting / self._limits.max_running
        retry_after_s = min(max(round(self._last_s * rounds), 1), 300)
        return Failure(503, f"{self.n_waiting} requests wait already", kind="server_error", code="queue_full",
                       retry_after_s=retry_after_s)  # fmt: skip

    def _work(self) -> None:
        failure = server_failure("the scheduler stopped", status=503)
        try:
            while self._wait():
                self._drop_dead()
                self._admit()
                self._prefill()
                self._decode()
            failure = STOPPING
        finally:  # also where a bug ends the thread: nobody waits for ever
            with self._changed:
                self._closing_at_s = self._closing_at_s or time.monotonic()
                left = list(self._waiting)
                self._waiting.clear()
            for job in left:
                self._fail(job, failure)
            for sequence in list(self._running):
                self._end(sequence, failure)
            self._kept.close()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when it is time to go."""
        with self._changed:
            while not (self._waiting or self._running or self._closing_at_s is not None):
                self._changed.wait()
            if self._closing_at_s is None:
                return True
            return bool(self._running) and time.monotonic() < self._closing_at_s

    def _drop_dead(self) -> None:
        """Let go of what was cancelled or is too late, and of who waits for a server that goes."""
        with self._changed:
            closing = self._closing_at_s is not None
            gone = [job for job in self._waiting if job.cancelled or job.late or closing]
            self._waiting = deque(job for job in self._waiting if job not in gone)
        for job in gone:
            self._fail(job, STOPPING if closing else TIMED_OUT)
        for sequence in [s for s in self._running if s.job.cancelled or s.job.late]:
            self._end(sequence, TIMED_OUT)

    def _admit(self) -> None:
        """Begin with those who have waited longest, as far as they fit."""
        admitted = False
        while job := self._next():
            admitted = True
            try:
                self._begin(job)
            except FAILURES as error:
                self._fail(job, as_failure(error))
        if admitted:
            with self._changed:
                waiting = list(self._waiting)
            for position, job in enumerate(waiting):
                job.send(Queued(position))

    def _next(self) -> Job | None:
        """The oldest job out of the queue, if there is room for it; kept sessions make room."""
        with self._changed:
            if not self._waiting or self.n_running >= self._limits.max_running:
                return None
            need = self._waiting[0].need
            used = sum((sequence.job.need for sequence in self._running), Room())
            while not (self._limits.room - used - self._kept.used).holds(need):
                if not self._kept.drop_oldest():
                    return None
            return self._waiting.popleft()

    def _begin(self, job: Job) -> None:
        session, cached = self._open(job)
        try:
            sequence = Sequence(job, session, cached)
        except BaseException:
            session.close()
            raise
        with self._changed:
            self._running.append(sequence)

    def _open(self, job: Job) -> tuple[Session, int]:
        """A session with as much of the prompt as is known: from a stored one, or else from a kept one."""
        options: dict[str, Any] = {
            "expected_tokens": len(job.prompt) + job.sampling.max_new_tokens,
            "budget": job.budget,
        }
        if self._stored is not None:
            path, n_stored = self._stored.longest(job.prompt)
            kept = self._kept.longest(job.prompt)
            better = kept is None or n_stored > len(kept.prefix)
            if path is not None and better and (found := self._stored.begin(path, job.prompt, **options)):
                return found
        session = self._runtime.session(**options)
        try:
            return session, self._kept.copy_into(session, job.prompt)
        except BaseException:
            session.close()
            raise

    def _prefill(self) -> None:
        """One chunk of the sequence that has waited longest for one."""
        sequence = next((s for s in self._running if s.prefilling), None)
        if sequence is None:
            return
        with self._changed:  # its next chunk comes after the others'
            self._running.remove(sequence)
            self._running.append(sequence)
        try:
            progress = sequence.prefill_chunk()
        except FAILURES as error:
            self._end(sequence, as_failure(error))
            return
        if progress is not None:
            sequence.job.send(progress)

    def _decode(self) -> None:
        """One token of everyone who is prefilled."""
        self._drop_dead()
        ready = [sequence for sequence in self._running if not sequence.prefilling]
        for sequence, outcome in self._stepper(ready):
            if isinstance(outcome, Failure):
                self._end(sequence, outcome)
            else:
                if sequence.n_new == 1:
                    self._metrics.first_token(time.monotonic() - sequence.job.arrived_s)
                if done := sequence.tell(outcome):
                    self._finish(sequence, done)
            self._drop_dead()

    def _finish(self, sequence: Sequence, done: Done) -> None:
        """An answer is whole: its slot is free before its client hears of it."""
        job = sequence.job
        with self._changed:
            self._running.remove(sequence)
        self._last_s = time.monotonic() - job.arrived_s
        if self._stored is not None and job.store_as is not None:
            done = replace(done, stored=self._stored.store(sequence.session, job.store_as))
        self._kept.keep(sequence.session, job.need)
        self._metrics.ended(done.finish)
        self._metrics.finished(done.stats, prompt_tokens=len(job.prompt), cached_tokens=done.cached_tokens,
                               new_tokens=done.new_tokens)  # fmt: skip
        job.send(done)

    def _end(self, sequence: Sequence, failure: Failure) -> None:
        """A sequence goes before its answer is whole."""
        with self._changed:
            self._running.remove(sequence)
        sequence.close()
        self._fail(sequence.job, failure)

    def _fail(self, job: Job, failure: Failure) -> None:
        self._metrics.ended("cancelled" if job.cancelled else "failed")
        job.send(failure)
