"""How a prefill or a generation is ended from outside: by another thread, or by the clock."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvoffload.errors import CancelledError, TimedOutError, UsageError

_GOES_ON, _LATE, _CANCELLED = range(3)


class Interrupt:
    """What the thread that runs a session asks before every chunk and every step.

    Any thread may call ``cancel``: an Event is all that it touches. Everything else belongs to the running thread.
    Where several processes run one model, ``agree`` gives the largest of what they say, so that all end or none.
    """

    def __init__(self, agree: Callable[[int], int] = lambda code: code) -> None:
        self._agree = agree
        self._cancelled = threading.Event()
        self._deadline_s: float | None = None
        self._timeout_s = 0.0

    def cancel(self) -> None:
        """The next ``check`` raises, once."""
        self._cancelled.set()

    @contextmanager
    def within(self, timeout_s: float | None) -> Iterator[None]:
        """Inside this block ``check`` also watches the clock; None is no limit of its own."""
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s: {timeout_s} is not above 0")
        before = self._deadline_s, self._timeout_s
        if timeout_s is not None:
            self._deadline_s, self._timeout_s = time.monotonic() + timeout_s, timeout_s
        try:
            yield
        finally:
            self._deadline_s, self._timeout_s = before

    def check(self) -> None:
        """Raise CancelledError if ``cancel`` was called since the last time, TimedOutError past the deadline."""
        found = _GOES_ON
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            found = _LATE
        if self._cancelled.is_set():
            found = _CANCELLED
        agreed = self._agree(found)
        if agreed == _CANCELLED:
            self._cancelled.clear()
            raise CancelledError("the session was cancelled; its tokens so far are kept")
        if agreed == _LATE:
            raise TimedOutError(f"not done within {self._timeout_s:g} s; the tokens so far are kept")
