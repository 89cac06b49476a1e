"""Tickets that several stores hand out."""

from .store import Moved, Ticket


class DoneTicket(Ticket):
    """A read that was over before its ticket was made."""

    def __init__(self, moved: Moved) -> None:
        self._moved = moved

    def done(self, timeout_s: float | None) -> bool:
        return True

    def wait(self) -> Moved:
        return self._moved
