"""Re-anchoring: while tokens are generated, what was tilted by the prefill's mean query is rebuilt around the mean of
the newest ones.

The pass over the tier runs beside the steps, a block of pages after each. A second selector or completion takes the
pages in; steps go on with the first until the second knows every sealed page, and then with the second.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvoffload.attention.layer import Anchored, LayerCache
from kvoffload.attention.upkeep import Rhythm, Upkeep
from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion
from kvoffload.completion.gated import GatedCompletion
from kvoffload.selection.base import Selector
from kvoffload.values import Pages

_N_QUERIES = 256
_PASS_STEPS = 64  # steps that a pass is spread over, or half of what lies between two of them


@dataclass(frozen=True)
class Rebuild:
    """How to make what depends on the anchor anew: a selector, a completion with its gate; None for what does not."""

    selector: Callable[[], Selector] | None
    completion: Callable[[], tuple[Completion, GatedCompletion | None]] | None


class _Pass:
    """One pass under way. A block is asked for after one step and taken in after the next."""

    def __init__(self, layer: LayerCache, rebuild: Rebuild, anchor: Tensor, n_steps: int) -> None:
        self._selector = rebuild.selector() if rebuild.selector else None
        self._completion: Completion | None = None
        self._gate: GatedCompletion | None = None
        if rebuild.completion is not None:
            self._completion, self._gate = rebuild.completion()
        if self._selector is not None:
            self._selector.reset(anchor)
        if self._completion is not None:
            self._completion.reset(anchor, n_pages=layer.n_pages)
        self._anchored = Anchored(anchor, layer.n_pages)
        self._block = -(-layer.n_pages // n_steps)
        self._first = 0
        self._ask(layer)

    @property
    def resident_bytes(self) -> int:
        """Of the second summaries."""
        index = 0 if self._selector is None else self._selector.resident_bytes
        return index + (0 if self._completion is None else self._completion.state_bytes)

    def steps_left(self, n_pages: int) -> int:
        """Steps up to the one behind which the pass is over, with ``n_pages`` sealed by then."""
        return 1 + -(-max(n_pages - self._first - self._n_coming, 0) // self._block)

    def advance(self, layer: LayerCache) -> bool:
        """Take in the block that was asked for; whether that was the last one. Then the layer goes on with the new
        summaries."""
        pages = self._coming()
        valid = layer.anchors.run_valid(self._first, pages.n_pages)
        for summary in (self._selector, self._completion):
            if summary is not None:
                summary.absorb(Pages(pages.keys, pages.values, valid))
        self._first += pages.n_pages
        if self._first < layer.n_pages:
            self._ask(layer)
            return False
        self._hand_over(layer)
        return True

    def _ask(self, layer: LayerCache) -> None:
        self._n_coming = min(self._block, layer.n_pages - self._first)
        self._coming = layer.fetch.ask_pages(self._first, self._n_coming, layer.fetch.refresh)

    def _hand_over(self, layer: LayerCache) -> None:
        layer.anchored, layer.n_estimated = self._anchored, None
        if self._selector is not None:
            layer.selector = self._selector
        if self._completion is not None:
            layer.completion = self._completion
        if self._gate is not None and layer.gate is not None:
            self._gate.choice, layer.gate = layer.gate.choice, self._gate


class Reanchoring(Upkeep):
    """A pass every ``every`` generated tokens, unless one is still under way; the anchor is the mean of the newest 256
    queries, of which only the sum is kept."""

    def __init__(self, every: int, rebuild: Rebuild) -> None:
        self._every, self._rebuild = every, rebuild
        self.restart()

    def restart(self) -> None:
        self._rhythm = Rhythm(self._every, _N_QUERIES)
        self._sum: Tensor | None = None  # of the queries to be kept, meant over heads: fp32 [rows, D]
        self._n_summed = 0
        self._pass: _Pass | None = None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        own = 0 if self._sum is None else tensor_bytes(self._sum)
        return own + (0 if self._pass is None else self._pass.resident_bytes)

    def run_length(self, layer: LayerCache, n_pages: int) -> int:
        left = self._rhythm.left
        return left if self._pass is None else min(left, self._pass.steps_left(n_pages))

    def after_steps(self, layer: LayerCache, query: Tensor) -> None:
        self._add(self._rhythm.count(query))
        for _ in range(query.shape[1]):
            if self._pass is not None and self._pass.advance(layer):
                self._pass = None
        if not self._rhythm.due:
            return
        if self._pass is None and self._sum is not None:
            n_steps = min(_PASS_STEPS, self._every // 2)
            self._pass = _Pass(layer, self._rebuild, self._sum / self._n_summed, n_steps)
        self._sum, self._n_summed = None, 0

    def _add(self, query: Tensor) -> None:
        if query.shape[1] == 0:
            return
        total = query.mean(2).sum(1)
        self._sum = total if self._sum is None else self._sum + total
        self._n_summed += query.shape[1]
