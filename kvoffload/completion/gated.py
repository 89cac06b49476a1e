"""A per-head choice among completions, abstaining included; made at the end of prefill and, if asked for, again while
generating."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.completion.base import Completion, per_query
from kvoffload.values import Fetched, Pages, Partial

ABSTAIN = 0


class GatedCompletion(Completion):
    """Keeps every candidate; ``choice`` int64 [rows, R] says whose estimate a query head uses: 0 abstains (which
    leaves the merge bit-identical to plain Top-K), i takes candidate i - 1.

    The choice is made on ``n_queries`` queries. A candidate must have less than 1 - ``margin`` of the error of
    abstaining; the first listed wins among equals.
    """

    def __init__(
        self, candidates: Sequence[Completion], value_dim: int, *, n_queries: int = 64, margin: float = 0.0
    ) -> None:
        self.candidates = tuple(candidates)
        self.uses_scores = any(candidate.uses_scores for candidate in self.candidates)
        self.uses_anchor = any(candidate.uses_anchor for candidate in self.candidates)
        self._value_dim, self.n_queries, self._margin = value_dim, n_queries, margin
        self.choice: Tensor | None = None

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self.choice = None
        for candidate in self.candidates:
            candidate.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        for candidate in self.candidates:
            candidate.absorb(pages)

    def refresh(self) -> None:
        for candidate in self.candidates:
            candidate.refresh()

    def choose(self, errors: Tensor) -> None:
        """Take each head's best: errors of every choice fp32 [choices, rows, R], abstaining first."""
        self.choice = torch.cat([errors[:1] * (1 - self._margin), errors[1:]]).argmin(0)

    def estimates(self, query: Tensor, fetched: Fetched, scores: Tensor) -> list[Partial]:
        """What each choice would give: abstaining first, then the candidates in order."""
        return [Partial.empty(query, self._value_dim), *(c.estimate(query, fetched, scores) for c in self.candidates)]

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        options = self.estimates(query, fetched, scores)
        if self.choice is None:
            return options[ABSTAIN]
        outputs, lses = torch.stack([o.output for o in options]), torch.stack([o.lse for o in options])
        index = per_query(self.choice, query)[None]
        spread = index[..., None].expand(-1, -1, -1, self._value_dim)
        return Partial(outputs.gather(0, spread)[0], lses.gather(0, index)[0])

    @property
    def n_clamped(self) -> int:
        return sum(candidate.n_clamped for candidate in self.candidates)

    @property
    def state_bytes(self) -> int:
        return sum(candidate.state_bytes for candidate in self.candidates)

    @property
    def resident_bytes(self) -> int:
        return sum(candidate.resident_bytes for candidate in self.candidates)
