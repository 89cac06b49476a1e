"""report.md: what a sweep found, in tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvoffload.evaluation.cells import DENSE
from kvoffload.evaluation.comparison import Comparison, Estimate, compare, estimate, over_contexts, worst
from kvoffload.evaluation.entropy import entropy_bins
from kvoffload.evaluation.summary import CellResult
from kvoffload.evaluation.tasks.base import Metric

_MANY = 4  # with more metrics than this only the main one is compared
Baseline = Callable[[CellResult], list[CellResult]]


@dataclass(frozen=True)
class Report:
    """The cells of a sweep, and how they are to be told."""

    title: str
    notes: Sequence[str]
    cells: Sequence[CellResult]
    metrics: Sequence[Metric]
    baseline: str
    seed: int

    def markdown(self) -> str:
        parts = [f"# {self.title}", "\n".join(f"- {note}" for note in self.notes)]
        parts += [self._means(metric) for metric in self._known()]
        compared = self._known() if len(self.metrics) <= _MANY else self._known()[:1]
        for metric in compared:
            parts.append(self._against(metric, f"`{self.baseline}`", self._named))
            parts.append(self._against(metric, "the same selector alone", self._alone))
        parts += [self._costs(), self._entropy()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _known(self) -> list[Metric]:
        return [m for m in self.metrics if any(cell.column(m) for cell in self.cells)]

    def _named(self, cell: CellResult) -> list[CellResult]:
        return [c for c in self.cells if (c.context, c.method) == (cell.context, self.baseline)]

    def _alone(self, cell: CellResult) -> list[CellResult]:
        """Selection-only cells with a cell's selector and pool; none for a cell that is one."""
        if cell.is_selection_only:
            return []
        same = [c for c in self.cells if c.is_selection_only and c.context == cell.context]
        same = [c for c in same if (c.selector, c.pool) == (cell.selector, cell.pool)]
        return [c for c in same if c.method == same[0].method]

    def _means(self, metric: Metric) -> str:
        """A table a context: methods down, budgets across."""
        parts = [f"## {metric.name}"]
        for context in sorted({c.context for c in self.cells}):
            mine = [c for c in self.cells if c.context == context and c.column(metric)]
            found = {(c.method, c.budget): _number(estimate(c, metric, seed=self.seed)) for c in mine}
            budgets = list(dict.fromkeys(c.budget for c in mine if c.method != DENSE))
            if (DENSE, "100%") in found:
                parts.append(f"{context:,} tokens; dense {found[DENSE, '100%']}")
            else:
                parts.append(f"{context:,} tokens")
            methods = [m for m in dict.fromkeys(c.method for c in mine) if m != DENSE]
            lines = [[f"`{m}`", *(found.get((m, b), "") for b in budgets)] for m in methods]
            parts.append(table(["method", *budgets], lines))
        return "\n\n".join(parts)

    def _against(self, metric: Metric, name: str, baseline: Baseline) -> str:
        compared = [
            found
            for cell in self.cells
            if cell.method not in (DENSE, self.baseline) and cell.column(metric)
            if (found := compare(cell, baseline(cell), metric, seed=self.seed)) is not None
        ]
        if not compared:
            return ""
        how = "ratios" if metric.lower_is_better else "differences"
        parts = [f"## {metric.name} against {name}", f"Means over contexts at equal read ({how}), and the worst one."]
        parts.append(table(["method", "budget", "mean", "worst", "at"], list(_overall(compared, metric))))
        parts.append(f"Every cell ({how}); `needs` is what the baseline reads for the same {metric.name}.")
        header = ["context", "method", "budget", metric.name, "read", "charged", "at equal read", "at equal charged",
                  "needs", "read ratio"]  # fmt: skip
        return "\n\n".join([*parts, table(header, [_line(c) for c in compared])])

    def _costs(self) -> str:
        cells = {c.method: c for c in self.cells if c.method != DENSE}
        lines = [
            [f"`{name}`", _plain(cell.cost("index_bytes_per_token")), _plain(cell.cost("gate_abstains"))]
            for name, cell in cells.items()
        ]
        header = ["method", "index bytes a token, layer and kv head", "share of heads that abstain"]
        return "## Index and gate\n\n" + table(header, lines)

    def _entropy(self) -> str:
        bins = entropy_bins(self.cells)
        if not bins:
            return ""
        lines = [
            [f"`{b.method}`", f"{b.low:.2f} to {b.high:.2f}", str(b.n_heads), f"{b.selection_error:.4f}",
             f"{b.error:.4f}", f"{b.gain:.2f}", _plain(b.mass_error)]
            for b in bins
        ]  # fmt: skip
        header = ["method", "entropy [nats]", "heads", "error without", "error with", "gain", "log-mass error [nats]"]
        return "## By the heads' entropy\n\n" + table(header, lines)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def _overall(compared: Sequence[Comparison], metric: Metric) -> Iterable[list[str]]:
    for method, budget in dict.fromkeys((c.cell.method, c.cell.budget) for c in compared):
        mine = [c for c in compared if (c.cell.method, c.cell.budget) == (method, budget)]
        at = worst(mine, metric)
        told = (_number(at.at_read), f"{at.cell.context:,}") if at else ("beyond", "")
        yield [f"`{method}`", budget, _number(over_contexts(mine, metric)), *told]


def _line(c: Comparison) -> list[str]:
    cell = c.cell
    return [
        f"{cell.context:,}", f"`{cell.method}`", cell.budget, _number(c.value), f"{cell.read_share:.2%}",
        f"{cell.charged_share:.2%}", _number(c.at_read), _number(c.at_charged), _needs(c), _read_ratio(c),
    ]  # fmt: skip


def _number(e: Estimate) -> str:
    """``0.12 [0.10, 0.15]``; "beyond" where the baseline's curve does not reach."""
    if math.isnan(e.value):
        return "beyond"
    return f"{e.value:.4g}" if math.isnan(e.low) or e.low == e.high else f"{e.value:.4g} [{e.low:.4g}, {e.high:.4g}]"


def _needs(c: Comparison) -> str:
    smallest, largest = c.baseline_shares
    if c.needed_share == 0:
        return f"< {smallest:.2%}"
    return f"> {largest:.2%}" if math.isinf(c.needed_share) else f"{c.needed_share:.2%}"


def _read_ratio(c: Comparison) -> str:
    """Ends of the curve stand in where the ratio lies beyond them."""

    def told(ratio: float) -> str:
        smallest, largest = c.baseline_shares
        if ratio == 0:
            return f"< {c.cell.read_share / largest:.3g}"
        return f"> {c.cell.read_share / smallest:.3g}" if math.isinf(ratio) else f"{ratio:.3g}"

    e = c.read_ratio
    if math.isnan(e.value):
        return "unknown"
    return told(e.value) if e.low == e.high else f"{told(e.value)} [{told(e.low)}, {told(e.high)}]"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
