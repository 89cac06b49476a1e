"""One attention layer's KV: anchors on the device, sealed pages in the store, and what selector and completion keep
of them."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from kvoffload_storage.store import Store
from torch import Tensor

from kvoffload.attention.ahead import Asked, Choice, LookAhead
from kvoffload.attention.choosing import Chooser, PageFilter, TopK
from kvoffload.attention.meter import Meter
from kvoffload.attention.prefetch import Prefetch
from kvoffload.attention.upkeep import Upkeep
from kvoffload.buffers import Room
from kvoffload.cache.anchors import Anchors
from kvoffload.cache.arrived import Arrival
from kvoffload.cache.fetch import Fetch
from kvoffload.cache.packed import pack_pages
from kvoffload.completion.base import Completion
from kvoffload.completion.gated import GatedCompletion
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector
from kvoffload.selection.topk import UNBOUNDED, Pool, select_top
from kvoffload.units import Budget
from kvoffload.values import Pages, Selection, by_row

if TYPE_CHECKING:
    from kvoffload.attention.reading import Reading

TAIL_QUERIES = 256
"""Queries of a prefill that are remembered: their mean is the anchor query."""


class PageBudget(Protocol):
    """How much a step may read."""

    def tokens(self, n_tokens: int) -> float:
        """Token-equivalents per kv head at a context of ``n_tokens``."""

    def spending(self, budget: Budget) -> "PageBudget":
        """The same layer's part of another budget."""

    def __call__(self, n_tokens: int) -> int:
        """Slices per sequence and layer at a context of ``n_tokens``."""


@dataclass(frozen=True)
class Anchored:
    """What summaries were built around: an anchor query, scaled, fp32 [rows, D], when there were ``n_pages``."""

    query: Tensor
    n_pages: int


@dataclass(frozen=True, eq=False)
class Fixed:
    """What steps of fixed shapes (attention/fixed.py) find in the same place every time: the room for pages, where in
    the anchors the new token goes (int64 [1]), which places are seen then and which were seen before (bool [rows or 1,
    1, A]), the length of a selection, how much of each list is wanted (int64 []; None: all), and the step's scaled
    queries (fp32 [rows, R, D])."""

    room: Room
    place: Tensor
    seen: Tensor
    seen_before: Tensor
    n_slices: int
    n_wanted: Tensor | None
    query: Tensor


class LayerCache:
    """Every token is in exactly one of the anchors and the sealed pages; a page that seals enters the store, the
    selector and the completion in one call, so no token is ever in none or in two of them.

    ``gate`` is the completion itself where it is a per-head choice that the end of prefill has to make. ``ready``
    says that selector and completion know every sealed page. A prefill makes it false (its pages are summarised in
    one pass when the anchor query is known), ``attention.prepare`` makes it true. ``n_revised`` of a forward's queries
    are older tokens that are computed anew; the others are its steps.
    """

    reading: "Reading"

    def __init__(
        self,
        geometry: Geometry,
        store: Store,
        layer: int,
        *,
        anchors: Anchors,
        fetch: Fetch,
        selector: Selector,
        completion: Completion,
        budget: PageBudget,
        pool: Pool,
        index_on_host: bool,
        index_is_read: bool,
    ) -> None:
        self.geometry, self.store, self.layer = geometry, store, layer
        self.anchors, self.fetch, self.selector, self.completion = anchors, fetch, selector, completion
        self.budget, self.pool, self.index_on_host = budget, pool, index_on_host
        self._index_is_read = index_is_read
        self.meter = Meter()
        self.ready = True
        self.held: Tensor | None = None  # all sealed pages as the store has them, while they are on the device still
        self.tail_queries: Tensor | None = None  # in host memory
        self.n_prefilled = 0  # pages when the last prefill was summarised
        self.n_estimated: int | None = None  # pages at the first estimate after that
        self.anchored: Anchored | None = None  # where summaries were rebuilt since
        self.gate: GatedCompletion | None = None
        self.upkeep: tuple[Upkeep, ...] = ()
        self.head_bounds = UNBOUNDED
        self.prefetch = Prefetch(0.0)
        self.ahead = LookAhead()
        self.chooser: Chooser = TopK()
        self.page_filter: PageFilter | None = None
        self.n_revised = 0
        self.fixed: Fixed | None = None
        self.n_scorings = self.n_estimates = 1  # of a step
        self.n_coming = 0  # tokens of the step that is chosen for and are not here yet
        self._early: Asked | None = None  # what was asked for the step before it began
        self._n_scored_before = 0
        self._scored: tuple[Tensor, Tensor] | None = None  # the step's queries and scores, until it is over

    @property
    def n_tokens(self) -> int:
        return self.anchors.n_tokens

    @property
    def n_pages(self) -> int:
        return self.store.n_pages(self.layer)

    def append(self, keys: Tensor, values: Tensor) -> Tensor | None:
        """Add tokens [rows, n, D], [rows, n, Dv]; pages that seal leave for the store and are given as by ``seal``.
        Steps have no fixed shapes after this."""
        self.fix(None)
        return self.seal(self.anchors.append(keys, values))

    def seal(self, pages: Pages | None) -> Tensor | None:
        """Take in pages that have left the window, if any have; they are given as the store has them, on the device:
        uint8 [P, rows, slice_bytes]."""
        if pages is None:
            return None
        packed = pack_pages(pages)
        self.meter.written += self.store.append(self.layer, packed)
        if self.ready:
            self.absorb(pages)
        return packed

    def absorb(self, pages: Pages) -> None:
        self.selector.absorb(pages)
        self.completion.absorb(pages)
        self.reading.sealed(pages)

    @property
    def can_fix(self) -> bool:
        """Whether steps can have fixed shapes as this layer is now; it has pages then."""
        parts = (self.reading, self.chooser, self.fetch, self.selector, self.completion)
        plain = self.page_filter is None and self.gate is None and self.selector.device == self.anchors.keys.device
        plain = plain and self.head_bounds == UNBOUNDED  # a list that is not read to its end would be another one
        plain = plain and self.prefetch.share == 0
        return self.ready and plain and self.n_pages > 0 and all(part.can_hold for part in parts)

    def fix(self, fixed: Fixed | None) -> None:
        """Give steps fixed shapes, or (None) end that."""
        if fixed is not None or self.fixed is not None:
            room = None if fixed is None else fixed.room
            self.selector.hold(room)
            self.completion.hold(room)
        self.fixed = fixed

    def remember_queries(self, query: Tensor) -> None:
        """Keep the newest prefill queries [rows, R, Q, D] for the anchor and the gate; what was summarised is stale
        now."""
        self.ready = False
        newest = query[:, :, -TAIL_QUERIES:].cpu()
        kept = newest if self.tail_queries is None else torch.cat([self.tail_queries, newest], dim=2)
        self.tail_queries = kept[:, :, -TAIL_QUERIES:].clone()

    def tail_weights(self) -> Tensor:
        """1 for every remembered query of a real token and 0 for those of padding, fp32 [rows, T] in host memory; asked
        for before anything follows the prefill."""
        assert self.tail_queries is not None, "a prefill leaves its last queries behind"
        n_queries = self.tail_queries.shape[2]
        if self.anchors.padding is None:
            return torch.ones(self.geometry.rows, n_queries)
        slots = torch.arange(self.n_tokens - n_queries, self.n_tokens)
        return (slots >= self.anchors.padding.cpu()[:, None]).float()

    def run_length(self, limit: int) -> int:
        """How many of the next ``limit`` tokens one forward can decode as single steps would: none but the first seals
        a page, the steps read the same number of slices, and no upkeep comes between them."""
        if self.chooser.single_steps or self.reading.single_steps:
            return min(limit, 1)
        free = self.anchors.n_unsealing
        n_pages = self.anchors.n_sealed + (free == 0)
        steps = min((upkeep.run_length(self, n_pages) for upkeep in self.upkeep), default=limit)
        longest = min(limit, free or self.geometry.page_size, steps if n_pages else limit)
        n_slices = n_pages * self.geometry.n_kv_heads
        reads = [min(self.budget(self.n_tokens + 1 + i), n_slices) for i in range(longest)]
        return next((i for i in range(1, longest) if reads[i] != reads[0]), longest)

    def ask_ahead(self) -> None:
        """At the first layer of a step, ask for what all layers will probably select."""
        if self.layer == 0:
            self.prefetch.begin()

    @property
    def can_look_ahead(self) -> bool:
        """Whether the pages of the next step can be chosen before its queries are known."""
        return self.ready and self.n_pages > 0

    def take_early(self) -> Asked | None:
        """What was asked for this step early, and is waited for: nothing of it may move before. It is what ``choose``
        gives next."""
        self._early, self._scored, self.n_scorings = self.ahead.take(self), None, 1
        return self._early

    def choose(self, query: Tensor, anchor_lse: Tensor, *, early: bool = False) -> Choice:
        """Ask for the slices that are chosen for queries as in ``select``, if they were not asked for already; with the
        scores of all pages, which are those of these queries where the completion uses them. ``early`` is for a step to
        come."""
        asked, self._early = None if early else self._early, None
        if asked is None or asked.choice is None:
            selection, scores = self.select(query, anchor_lse)
            if not early:
                return self.ask(selection), scores
            with self.ahead.beside(query.device, waits=self.fetch.asks_host):
                return self.ask(selection, early=True), scores
        arrivals, scores = asked.choice
        if self.completion.uses_scores:
            self.n_scorings, scores = 2, self.score(query).to(query.device)
        return arrivals, scores

    def select(self, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        """The chooser's slices for scaled queries fp32 [rows * Q, R, D] whose anchors have mass anchor_lse [rows * Q,
        R], with the scores of all pages fp32 [rows * Q, R, P]; ids are on the selector's device, and so are the scores
        unless the completion uses them."""
        selection, scores = self.chooser.choose(self, query, anchor_lse)
        self.prefetch.expect(self.fetch, lambda: self.select_top(scores, anchor_lse, more=self.prefetch.share))
        return selection, scores.to(query.device) if self.completion.uses_scores else scores

    def select_top(self, scores: Tensor, anchor_lse: Tensor, *, more: float = 0.0) -> Selection:
        """The best slices by scores fp32 [rows * Q, R, P], as many as the budget buys and a share of it ``more``."""
        fixed = self.fixed
        selection = select_top(
            scores,
            anchor_lse.to(scores.device),
            n_sequences=self.geometry.n_sequences,
            n_slices=int(self.budget(self.n_tokens + self.n_coming) * (1 + more)) if fixed is None else fixed.n_slices,
            pool=self.pool,
            n_queries=scores.shape[0] // self.geometry.rows,
            n_wanted=None if fixed is None else fixed.n_wanted,
            bounds=self.head_bounds,
        )
        if fixed is None or self.anchors.padding is None:
            return selection
        # pages of padding score -inf too, so that what is no page yet may come before them
        wanted = ~fixed.room.beyond[selection.page_ids]
        if selection.wanted is not None:
            wanted &= selection.wanted
        return replace(selection, page_ids=selection.page_ids.where(wanted, 0), wanted=wanted)

    def ask(self, selection: Selection, *, early: bool = False) -> list[Arrival]:
        """Ask for the slices of a selection; steps of fixed shapes count them elsewhere."""
        if self.fixed is None:
            return self.fetch.start(selection)
        return self.fetch.move(selection, early=early, in_place=not early and not self.completion.reads_slices)

    def slices_valid(self, part: Selection) -> Tensor | None:
        """Which tokens of slices count, bool [F, S]; None when all do."""
        valid = self.anchors.page_valid(part.page_ids, part.store_rows)
        if part.wanted is None:
            return valid
        wanted = part.wanted[:, None]
        return wanted.expand(-1, self.geometry.page_size) if valid is None else valid & wanted

    def score(self, query: Tensor, n_rows: int | None = None) -> Tensor:
        """Log masses of all pages for scaled queries [rows * Q, R, D], fp32 [rows * Q, R, P] on the selector's device;
        counted for the ``n_rows`` rows that need them, all where it is None; those of one step are made once."""
        if self._scored is not None and self._scored[0] is query:
            return self._scored[1]
        rows = by_row(query, self.geometry.rows).to(self.selector.device)
        scores = self.selector.score(rows).reshape(*query.shape[:2], -1)
        if self.fixed is not None:
            return scores
        self.meter.scored_rows += query.shape[0] if n_rows is None else n_rows
        self._scored = (query, scores) if n_rows is None else None
        return scores

    def filtered(self, scores: Tensor) -> Tensor:
        """The scores that pages are ranked by."""
        return scores if self.page_filter is None else self.page_filter(self, scores)

    @property
    def reads_everything(self) -> bool:
        """Whether the budget buys every page there is."""
        return self.budget(self.n_tokens) >= self.n_pages * self.geometry.n_kv_heads

    def count_steps(self, query: Tensor, mass: Tensor) -> None:
        """Account for decode steps of scaled queries [rows * Q, R, D] in which the remainder had this share of the
        total mass, [rows * Q, R]; then comes the upkeep that is due."""
        if self.n_revised:
            query, mass = (
                t.unflatten(0, (self.geometry.rows, -1))[:, self.n_revised :].flatten(0, 1) for t in (query, mass)
            )
        n_steps = mass.shape[0] // self.geometry.rows
        self.meter.add_mass(mass, n_steps)
        self.end_steps(query, n_steps)

    def end_steps(self, query: Tensor, n_steps: int) -> None:
        """The host's part of ``count_steps``, and the upkeep."""
        self.n_estimated = self.n_pages if self.n_estimated is None else self.n_estimated
        index_bytes, state_bytes = self.selector.index_bytes, self.completion.state_bytes * self.n_estimates
        if self.completion.uses_scores and not self._index_is_read:
            state_bytes += index_bytes * (self.n_scorings + self.n_estimates - 1)
        self.n_estimates = 1
        n_scored, self._n_scored_before = self.meter.scored_rows - self._n_scored_before, self.meter.scored_rows
        index_read = index_bytes * n_scored // self.geometry.rows if self._index_is_read else 0
        self.meter.count_steps(n_steps, self.n_tokens, index_read, state_bytes)
        self._scored = None
        for upkeep in self.upkeep:
            upkeep.after_steps(self, query.unflatten(0, (self.geometry.rows, n_steps)))

    @property
    def resident_bytes(self) -> int:
        """Device bytes kept for this layer: anchors, index (where it lives on the device), completion state, page
        cache, and the pages themselves where their tier is the device."""
        index = self.selector.resident_bytes - self.index_host_bytes
        pages = self.n_pages * self.store.shape.page_bytes if self.store.tier == "gpu" else 0
        summaries = index + self.completion.resident_bytes
        upkeep = sum(upkeep.resident_bytes for upkeep in self.upkeep)
        upkeep += self.chooser.resident_bytes + self.reading.resident_bytes
        return self.anchors.resident_bytes + summaries + upkeep + self.fetch.slots.resident_bytes + pages

    @property
    def index_link_bytes(self) -> int:
        """Bytes of a streamed index that a step reads across the link: to score, and to complete from it."""
        index = self.selector.index
        n_readings = self.n_scorings + self.completion.uses_scores
        return 0 if index is None or not index.streamed else index.index_bytes * n_readings

    @property
    def index_host_bytes(self) -> int:
        """Bytes of an index that was put into host memory, be it scored there or streamed."""
        if self.selector.index is not None and self.selector.device.type != "cpu":
            return self.selector.index.streamed_bytes
        return self.selector.resident_bytes if self.index_on_host else 0
