"""How a prefill or a generation is ended from outside: by another thread, or by the clock."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvoffload.errors import CancelledError, TimedOutError, UsageError


class Interrupt:
    """What the thread that runs a session asks before every chunk and every step.

    Any thread may call ``cancel``: an Event is all that it touches. Everything else belongs to the running thread.
    """

    def __init__(self) -> None:
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
        if self._cancelled.is_set():
            self._cancelled.clear()
            raise CancelledError("the session was cancelled; its tokens so far are kept")
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            raise TimedOutError(f"not done within {self._timeout_s:g} s; the tokens so far are kept")
