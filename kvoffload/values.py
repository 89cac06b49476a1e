"""The values that cross module borders: partial attentions, sealed pages, selections and fetched slices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from kvoffload_kernels.completion.reference import SliceSums
from kvoffload_kernels.dense_attention.reference import weigh
from kvoffload_kernels.dispatch import merge_parts
from torch import Tensor

from kvoffload.buffers import page_mask
from kvoffload.cross_sums import cross_sums


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: output [..., Dv] and log-sum-exp [...] of its logits, fp32; lse = -inf is
    empty."""

    output: Tensor
    lse: Tensor

    @staticmethod
    def empty(query: Tensor, value_dim: int) -> "Partial":
        """No keys at all, for queries [..., D]."""
        shape = query.shape[:-1]
        return Partial(query.new_zeros(*shape, value_dim), query.new_full(shape, -torch.inf))

    @staticmethod
    def weigh(logits: Tensor, values: Tensor) -> "Partial":
        """From logits [rows * Q, R, N] and values [rows, N, Dv]."""
        output, lse = weigh(by_row(logits, values.shape[0]), values)
        return Partial(output.view(*logits.shape[:2], -1), lse.view(logits.shape[:2]))

    def both(self) -> tuple[Tensor, Tensor]:
        return self.output, self.lse

    def masked(self, keep: Tensor) -> "Partial":
        """Empty wherever ``keep`` (bool, shape of lse) is false."""
        return Partial(self.output.masked_fill(~keep[..., None], 0.0), self.lse.masked_fill(~keep, -torch.inf))


@dataclass(frozen=True)
class Parts:
    """Partials of n disjoint key sets side by side, to be merged at the end of a step: output [rows, n, R, Dv], or
    [rows, n, 1, Dv] where all heads of a row have the same, and log-sum-exp [rows, n, R], fp32."""

    output: Tensor
    lse: Tensor

    @staticmethod
    def of(partial: Partial) -> "Parts":
        """A partial [rows, R] as the only one."""
        return Parts(partial.output[:, None], partial.lse[:, None])

    def both(self) -> tuple[Tensor, Tensor]:
        return self.output, self.lse


def merge(partials: Sequence[Partial]) -> Partial:
    """One partial over the union of disjoint key sets; empty ones change nothing, to the bit."""
    return Partial(*merge_parts([p.output for p in partials], [p.lse for p in partials]))


def query_rows(heads: Tensor) -> Tensor:
    """Q queries of each row as query rows: [rows, R, Q, ...] to [rows * Q, R, ...]; a view where Q = 1."""
    return heads.transpose(1, 2).flatten(0, 1)


def by_row(queries: Tensor, rows: int) -> Tensor:
    """The Q queries of each row beside its heads: [rows * Q, R, ...] to [rows, Q * R, ...], a view where it can be."""
    return queries.reshape(rows, -1, *queries.shape[2:])


@dataclass(frozen=True)
class Pages:
    """Consecutive sealed pages of one layer: keys [rows, P, S, D], values [rows, P, S, Dv], valid bool [rows, P, S]
    or None (every token counts). Views: who keeps them copies them."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None

    @property
    def n_pages(self) -> int:
        return self.keys.shape[1]

    @staticmethod
    def of_all(parts: Sequence["Pages"]) -> "Pages":
        """The pages of several layers, their rows below each other; copies where there are several."""
        if len(parts) == 1:
            return parts[0]
        valid = None if parts[0].valid is None else torch.cat([p.valid for p in parts if p.valid is not None])
        return Pages(torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]), valid)

    def run(self, start: int, stop: int) -> "Pages":
        """Pages start .. stop - 1 of these."""
        valid = None if self.valid is None else self.valid[:, start:stop]
        return Pages(self.keys[:, start:stop], self.values[:, start:stop], valid)

    def log_valid(self) -> Tensor:
        """0 where a token counts and -inf elsewhere, fp32 [rows, P, S]."""
        zeros = torch.zeros(self.keys.shape[:3], device=self.keys.device)
        return zeros if self.valid is None else zeros.masked_fill(~self.valid, -torch.inf)

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [rows, P * S] of these tokens, -inf where they do not count."""
        return logits if self.valid is None else logits.masked_fill(~self.valid.flatten(1), -torch.inf)

    def counts(self) -> Tensor:
        """Valid tokens of each page, fp32 [rows, P]."""
        if self.valid is None:
            return torch.full(self.keys.shape[:2], float(self.keys.shape[2]), device=self.keys.device)
        return self.valid.sum(-1, dtype=torch.float32)

    def to(self, device: torch.device) -> "Pages":
        valid = None if self.valid is None else self.valid.to(device)
        return Pages(self.keys.to(device), self.values.to(device), valid)


@dataclass(frozen=True)
class KeySample:
    """What an index is fitted to: keys [rows, n, D] from all over a prefill with ``valid`` bool [rows, n] (None: all),
    and the second moment fp32 [rows, D, D] of the scaled queries at its end (None: all directions alike)."""

    keys: Tensor
    valid: Tensor | None = None
    queries: Tensor | None = None

    def weights(self) -> Tensor:
        """1 for keys that count, fp32 [rows, n]."""
        return torch.ones_like(self.keys[..., 0], dtype=torch.float32) if self.valid is None else self.valid.float()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean fp32 [rows, D] and covariance fp32 [rows, D, D] of the keys."""
        keys, weights = self.keys.float(), self.weights()[..., None]
        n_valid = weights.sum(1).clamp_min(1)
        mean = (keys * weights).sum(1) / n_valid
        centred = (keys - mean[:, None]) * weights
        return mean, cross_sums(centred, centred) / n_valid[..., None]

    @property
    def query_moment(self) -> Tensor:
        """The second moment of the queries, fp32 [rows, D, D]."""
        size = self.keys.shape[-1]
        alike = torch.eye(size, device=self.keys.device).expand(self.keys.shape[0], size, size)
        return alike if self.queries is None else self.queries

    def to(self, device: torch.device) -> "KeySample":
        valid, queries = (None if t is None else t.to(device) for t in (self.valid, self.queries))
        return KeySample(self.keys.to(device), valid, queries)


@dataclass(frozen=True)
class Selection:
    """Slices to read in one layer and forward: int64 [F] each, distinct pairs, in no particular order unless they are
    ``by_row``. ``row_ids`` count query rows: the ``n_queries`` queries of row g are g * n_queries and those after it.
    Where ``wanted`` bool [F] is given, the others are no slices: they fill the lists of a step of fixed shapes."""

    row_ids: Tensor
    page_ids: Tensor
    n_queries: int = 1
    wanted: Tensor | None = None
    by_row: bool = False

    def __len__(self) -> int:
        return self.row_ids.shape[0]

    @property
    def store_rows(self) -> Tensor:
        """The rows whose pages are asked for, int64 [F]."""
        return self.row_ids if self.n_queries == 1 else self.row_ids // self.n_queries

    def to(self, device: torch.device) -> "Selection":
        wanted = None if self.wanted is None else self.wanted.to(device)
        return Selection(self.row_ids.to(device), self.page_ids.to(device), self.n_queries, wanted, self.by_row)

    def by_query(self) -> "list[Selection]":
        """One selection for each of a row's queries, as single steps would ask; waits for the device."""
        if self.n_queries == 1:
            return [self]
        mine = [self.row_ids % self.n_queries == i for i in range(self.n_queries)]
        return [Selection(self.row_ids[m], self.page_ids[m], self.n_queries) for m in mine]


@dataclass(frozen=True)
class Fetched:
    """Selected slices on the device: keys [F, S, D], values [F, S, Dv], valid bool [F, S] or None, ids int64 [F];
    ``row_ids`` count query rows. Where ``wanted`` bool [F] is given, the others are no slices, and nothing in them is
    valid. With ``places`` int64 [F] they lie at those among ``all_keys`` [C, S, D] and ``all_values`` [C, S, Dv], where
    kernels can read them; ``keys`` and ``values`` are copies then, made when they are first asked for. ``sums`` are
    their tilted sums, where the completion asked for them (``Completion.tilt``). ``row_ids`` ascend where they are
    ``by_row``."""

    all_keys: Tensor
    all_values: Tensor
    valid: Tensor | None
    row_ids: Tensor
    page_ids: Tensor
    wanted: Tensor | None = None
    places: Tensor | None = None
    sums: SliceSums | None = None
    by_row: bool = False

    @cached_property
    def keys(self) -> Tensor:
        return self.all_keys if self.places is None else self.all_keys.index_select(0, self.places)

    @cached_property
    def values(self) -> Tensor:
        return self.all_values if self.places is None else self.all_values.index_select(0, self.places)

    def log_valid(self) -> Tensor:
        """0 where a token counts and -inf elsewhere, fp32 [F, S]."""
        zeros = torch.zeros(self.row_ids.shape[0], self.all_keys.shape[1], device=self.all_keys.device)
        return zeros if self.valid is None else zeros.masked_fill(~self.valid, -torch.inf)

    def mask(self, rows: int, n_pages: int) -> Tensor:
        """Which pages of each query row these are, bool [rows * Q, P]."""
        return page_mask(self.page_ids, self.row_ids, rows, n_pages, self.wanted)

    def clone(self) -> "Fetched":
        """With slices of its own."""
        if self.places is not None:
            return replace(self, all_keys=self.keys, all_values=self.values, places=None)
        return replace(self, all_keys=self.keys.clone(), all_values=self.values.clone())

    @staticmethod
    def join(parts: Sequence["Fetched"]) -> "Fetched":
        """All slices in one; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        valid = None if parts[0].valid is None else torch.cat([p.valid for p in parts if p.valid is not None])
        wanted = None if parts[0].wanted is None else torch.cat([p.wanted for p in parts if p.wanted is not None])
        keys, values, rows, pages = (
            torch.cat(t) for t in zip(*[(p.keys, p.values, p.row_ids, p.page_ids) for p in parts], strict=True)
        )
        return Fetched(keys, values, valid, rows, pages, wanted)
