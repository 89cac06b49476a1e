"""A per-head choice among completions, abstaining included; made at the end of prefill."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.completion.base import Completion
from kvoffload.values import Fetched, Pages, Partial

ABSTAIN = 0


class GatedCompletion(Completion):
    """Keeps every candidate; ``choice`` int64 [rows, R] says whose estimate a query head uses: 0 abstains (which
    leaves the merge bit-identical to plain Top-K), i takes candidate i - 1."""

    def __init__(self, candidates: Sequence[Completion], value_dim: int) -> None:
        self.candidates = tuple(candidates)
        self._value_dim = value_dim
        self.choice: Tensor | None = None

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self.choice = None
        for candidate in self.candidates:
            candidate.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        for candidate in self.candidates:
            candidate.absorb(pages)

    def estimates(self, query: Tensor, fetched: Fetched) -> list[Partial]:
        """What each choice would give: abstaining first, then the candidates in order."""
        return [Partial.empty(query, self._value_dim), *(c.estimate(query, fetched) for c in self.candidates)]

    def estimate(self, query: Tensor, fetched: Fetched) -> Partial:
        options = self.estimates(query, fetched)
        if self.choice is None:
            return options[ABSTAIN]
        outputs, lses = torch.stack([o.output for o in options]), torch.stack([o.lse for o in options])
        index = self.choice[None]
        spread = index[..., None].expand(-1, -1, -1, self._value_dim)
        return Partial(outputs.gather(0, spread)[0], lses.gather(0, index)[0])

    @property
    def state_bytes(self) -> int:
        return sum(candidate.state_bytes for candidate in self.candidates)
