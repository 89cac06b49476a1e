"""From captures to examples: runs of queries, what a step of the runtime would read for them, and the exact rest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from kvoffload_kernels.sparse_decode.reference import attend_slices
from torch import Tensor

from kvoffload.attention.build import SliceBudget
from kvoffload.buffers import page_mask
from kvoffload.cache.anchors import sealed_pages
from kvoffload.calibration.capture import LayerCapture
from kvoffload.completion.base import Completion
from kvoffload.config import RuntimeConfig
from kvoffload.geometry import Geometry
from kvoffload.selection.topk import select_top
from kvoffload.units import Budget
from kvoffload.values import Fetched, Pages, Partial, Selection, by_row, merge, query_rows

_HUBER_NATS = 1.0


@dataclass(frozen=True)
class Example:
    """One run of queries of one sequence under one budget.

    query fp32 [rows * T, R, D] in query rows; the exact partials of what is ``read`` (anchors and selected pages) and
    of the ``rest``, the pages that are not; ``dense`` fp32 [rows * T, R, Dv] is the output over both.
    """

    anchor: Tensor
    pages: Pages
    query: Tensor
    scores: Tensor
    selection: Selection
    read: Partial
    rest: Partial
    dense: Tensor

    def fetched(self) -> Fetched:
        """The selected slices, as a step would have them."""
        rows, ids = self.selection.store_rows, self.selection.page_ids
        return Fetched(self.pages.keys[rows, ids], self.pages.values[rows, ids], None, self.selection.row_ids, ids)

    def estimate(self, completion: Completion) -> Partial:
        """The rest as a completion estimates it that is shown these pages and no others."""
        completion.reset(self.anchor, n_pages=self.pages.n_pages)
        completion.absorb(self.pages)
        return completion.estimate(self.query, self.fetched(), self.scores)

    def by_head(self, figures: Tensor) -> Tensor:
        """[rows * T, R] as [rows, R, T]."""
        return figures.view(self.anchor.shape[0], -1, figures.shape[-1]).transpose(1, 2)

    def log_mass_errors(self, rest: Partial) -> Tensor:
        """Estimated minus true log mass of the rest in nats, [rows, R, T]; 0 where either is empty."""
        both = rest.lse.isfinite() & self.rest.lse.isfinite()
        return self.by_head(torch.where(both, rest.lse, 0.0) - torch.where(both, self.rest.lse, 0.0))

    def output_errors(self, rest: Partial) -> Tensor:
        """L2 error of the merged output relative to the mean norm of the head's dense outputs, [rows, R, T]."""
        error = (merge([self.read, rest]).output - self.dense).square().sum(-1).add(1e-12).sqrt()
        norms = self.by_head(self.dense.norm(dim=-1)).mean(-1, keepdim=True).clamp_min(1e-6)
        return self.by_head(error) / norms


@dataclass(frozen=True)
class Losses:
    """Means over heads and examples: ``log_mass`` in nats (absolute), ``output`` relative, and their Huber sum
    ``loss`` that a map is trained on."""

    log_mass: float
    output: float
    loss: float


def head_losses(example: Example, rest: Partial) -> Tensor:
    """What a map is trained on: Huber of the rest's log mass plus the relative error of the output, [rows, R]."""
    log_mass = example.log_mass_errors(rest)
    huber = torch.nn.functional.huber_loss(log_mass, torch.zeros_like(log_mass), reduction="none", delta=_HUBER_NATS)
    return (huber + example.output_errors(rest)).mean(-1)


@torch.no_grad()
def measure(completion: Completion, examples: Sequence[Example]) -> Losses:
    """A completion's mean errors."""
    found = []
    for example in examples:
        rest = example.estimate(completion)
        mass, output = example.log_mass_errors(rest).abs().mean(), example.output_errors(rest).mean()
        found.append(torch.stack([mass, output, head_losses(example, rest).mean()]))
    return Losses(*torch.stack(found).mean(0).tolist())


def n_pages_at(n_tokens: int, config: RuntimeConfig) -> int:
    """Pages that are sealed at a context of ``n_tokens``."""
    return sealed_pages(n_tokens, sinks=config.sinks, recent=config.recent, page_size=config.page_size)


@torch.no_grad()
def make_examples(
    found: LayerCapture, config: RuntimeConfig, budgets: Sequence[Budget], device: torch.device
) -> Iterator[Example]:
    """One example for each run and budget.

    Pages are those sealed at the run's first position; the window of a later query is longer by the tokens between.
    """
    keys, values = found.keys.to(device), found.values.to(device)
    for run, positions in enumerate(found.positions):
        query = query_rows(found.queries[:, :, run].to(device))
        yield from _of_run(found, config, budgets, positions, query, found.anchors[run].to(device), keys, values)


def _of_run(
    found: LayerCapture,
    config: RuntimeConfig,
    budgets: Sequence[Budget],
    positions: Tensor,
    query: Tensor,
    anchor: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Iterator[Example]:
    geometry, n_tokens = found.geometry, int(positions[0]) + 1
    start, n_pages = config.sinks, n_pages_at(n_tokens, config)
    end = start + n_pages * geometry.page_size
    shape = (geometry.rows, n_pages, geometry.page_size, -1)
    pages = Pages(keys[:, start:end].reshape(shape), values[:, start:end].reshape(shape), None)
    places = torch.cat([torch.arange(start), torch.arange(end, int(positions[-1]) + 1)])
    seen = (places <= positions[:, None]).to(query.device)
    held = places.to(query.device)
    exact = _attend_anchors(query, keys[:, held], values[:, held], seen, geometry)
    selector = config.selector.build(geometry, torch.device("cpu") if config.selector.reads_slow_tier else query.device)
    selector.reset(anchor.to(selector.device))
    selector.absorb(pages)
    scores = selector.score(by_row(query, geometry.rows).to(selector.device))
    scores = scores.to(query.device).view(*query.shape[:2], -1)
    for budget in budgets:
        n_slices = SliceBudget(budget, geometry, 1, geometry.slice_bytes)(n_tokens)
        yield _example(geometry, config, anchor, pages, query, scores, exact, n_slices)


def _attend_anchors(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, geometry: Geometry) -> Partial:
    """Exact partial of anchors [rows, A, ...] of which query t of a row sees those in seen bool [T, A]."""
    logits = soft_cap(by_row(query, geometry.rows) @ keys.float().transpose(-1, -2), geometry.softcap)
    by_query = logits.view(geometry.rows, len(seen), -1, keys.shape[1])
    return Partial.weigh(by_query.masked_fill(~seen[:, None], -torch.inf).flatten(0, 1), values)


def _example(
    geometry: Geometry,
    config: RuntimeConfig,
    anchor: Tensor,
    pages: Pages,
    query: Tensor,
    scores: Tensor,
    exact: Partial,
    n_slices: int,
) -> Example:
    n_queries = query.shape[0] // geometry.rows
    selection = select_top(scores, exact.lse, n_sequences=1, n_slices=n_slices, pool=config.pool, n_queries=n_queries)
    rows, ids = selection.store_rows, selection.page_ids
    slices = attend_slices(
        query, pages.keys[rows, ids], pages.values[rows, ids], selection.row_ids, None, geometry.softcap
    )
    read = merge([exact, Partial(*slices)])
    taken = page_mask(ids, selection.row_ids, query.shape[0], pages.n_pages).repeat_interleave(geometry.page_size, 1)
    logits = by_row(query, geometry.rows) @ pages.keys.flatten(1, 2).float().transpose(-1, -2)
    logits = soft_cap(logits, geometry.softcap).view(*query.shape[:2], -1).masked_fill(taken[:, None], -torch.inf)
    rest = Partial.weigh(logits, pages.values.flatten(1, 2))
    return Example(anchor, pages, query, scores, selection, read, rest, merge([read, rest]).output)
