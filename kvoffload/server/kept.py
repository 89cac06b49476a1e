"""Finished conversations, kept for a while: a prompt that begins like one copies its KV instead of prefilling."""

from collections import deque
from dataclasses import dataclass

from kvoffload.runtime.session import Session
from kvoffload.server.room import Room
from kvoffload.server.sequence import give_back


@dataclass(frozen=True)
class Kept:
    """A session and what it takes; ``prefix`` are the tokens in its KV."""

    session: Session
    prefix: list[int]
    need: Room


class KeptSessions:
    """At most ``most`` of them, the least recently used one goes first. Belongs to the scheduler's thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: deque[Kept] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> Room:
        return sum((kept.need for kept in self._kept), Room())

    def keep(self, session: Session, need: Room) -> None:
        """Take a session over; it is closed here when it has to go."""
        prefix = session.token_ids[: session.cache.get_seq_length()]
        copyable = session.cache.n_offloaded == len(session.cache.layers) and session.cache.freezing is None
        if self._most == 0 or not copyable:
            give_back(session)
            return
        for same in [kept for kept in self._kept if kept.prefix == prefix]:
            self._drop(same)
        self._kept.append(Kept(session, prefix, need))
        if len(self._kept) > self._most:
            self.drop_oldest()

    def longest(self, prompt: list[int]) -> Kept | None:
        """The longest one that a prompt begins with all of."""
        fitting = [k for k in self._kept if len(k.prefix) < len(prompt) and prompt[: len(k.prefix)] == k.prefix]
        return max(fitting, key=lambda kept: len(kept.prefix), default=None)

    def copy_into(self, session: Session, prompt: list[int]) -> int:
        """Let an empty session begin with the longest kept prefix of a prompt; the number of its tokens, 0 for none."""
        best = self.longest(prompt)
        if best is None:
            return 0
        self._kept.remove(best)
        self._kept.append(best)
        session.copy_prefill(best.session)
        session.token_ids = list(best.prefix)
        return len(best.prefix)

    def drop_oldest(self) -> bool:
        """Give one back; False if there is none."""
        if not self._kept:
            return False
        self._drop(self._kept[0])
        return True

    def close(self) -> None:
        while self.drop_oldest():
            pass

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        give_back(kept.session)
