"""From samples to cells: every metric's mean with its error, and the rows of sweep.json."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvoffload.evaluation.cells import DENSE
from kvoffload.evaluation.results import Result
from kvoffload.evaluation.statistics import Floats, standard_error
from kvoffload.evaluation.tasks.base import Metric
from kvoffload.units import Budget


@dataclass(frozen=True)
class CellResult:
    """All samples of a cell, with the mean of what they cost."""

    context: int
    method: str
    budget: str
    results: tuple[Result, ...]

    def column(self, metric: Metric) -> dict[str, float]:
        """Sample -> value, of the samples that have one."""
        return {r.sample: r.values[metric.name] for r in self.results if metric.name in r.values}

    def cost(self, name: str) -> float | None:
        """Mean of a column of Cost over samples; None where it is not there."""
        found = [value for r in self.results if r.cost is not None and (value := r.cost.get(name)) is not None]
        return sum(found) / len(found) if found else None

    @property
    def read_share(self) -> float:
        return self.cost("read_share") or 0.0

    @property
    def charged_share(self) -> float:
        return self.cost("charged_share") or 0.0

    @property
    def is_selection_only(self) -> bool:
        return bool(self.results[0].cell["completion"] == "none")

    @property
    def selector(self) -> str:
        return str(self.results[0].cell["selector"])

    @property
    def pool(self) -> str:
        return str(self.results[0].cell["pool"])


@dataclass(frozen=True)
class Row:
    """One cell and metric, as sweep.json and sweep.csv have it; ``n`` positions or answers of ``samples`` texts or
    prompts. ``stderr`` is that of the mean over samples."""

    model: str
    task: str
    context: int
    method: str
    selector: str
    completion: str
    gate: bool
    pool: str
    budget: str
    charged_share: float | None
    read_share: float | None
    index_bytes_per_token: float | None
    gate_abstains: float | None
    scored_share: float | None
    dropped_mass: float | None
    dropped_mass_held: float | None
    metric: str
    value: float
    stderr: float | None
    n: int
    samples: int
    seed: int
    commit: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_cell_results(results: Iterable[Result], order: Sequence[str]) -> list[CellResult]:
    """By context, then methods in this order (others after them by name), then budget."""
    grouped: dict[tuple[int, str, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.context, result.cell["method"], result.cell["budget"]), []).append(result)
    places = {name: place for place, name in enumerate([DENSE, *order])}

    def place(key: tuple[int, str, str]) -> tuple[int, int, str, float]:
        context, method, budget = key
        amount = Budget.parse(budget).tokens(context, token_bytes=1, n_heads_total=1)
        return context, places.get(method, len(places)), method, amount

    return [CellResult(*key, tuple(grouped[key])) for key in sorted(grouped, key=place)]


def make_rows(cells: Iterable[CellResult], metrics: Sequence[Metric]) -> list[Row]:
    """A row for every metric that a cell has."""
    return [_row(cell, metric) for cell in cells for metric in metrics if cell.column(metric)]


def final(metric: Metric, means: Floats) -> Floats:
    """Means of what records hold as the number that is reported."""
    return np.exp(means) if metric.exponential else means


def _row(cell: CellResult, metric: Metric) -> Row:
    values = np.array(list(cell.column(metric).values()))
    error, value = standard_error(values), float(final(metric, values.mean()))
    if error is not None and metric.exponential:
        error *= value  # first order
    first = cell.results[0]
    return Row(
        model=first.model, task=first.task, context=cell.context, method=cell.method,
        selector=first.cell["selector"], completion=first.cell["completion"], gate=first.cell["gate"],
        pool=first.cell["pool"], budget=cell.budget, charged_share=cell.cost("charged_share"),
        read_share=cell.cost("read_share"), index_bytes_per_token=cell.cost("index_bytes_per_token"),
        gate_abstains=cell.cost("gate_abstains"), scored_share=cell.cost("scored_share"),
        dropped_mass=cell.cost("dropped_mass"), dropped_mass_held=cell.cost("dropped_mass_held"),
        metric=metric.name, value=value, stderr=error,
        n=sum(r.n for r in cell.results if metric.name in r.values), samples=len(values), seed=first.seed,
        commit=",".join(sorted({r.commit for r in cell.results})),
    )  # fmt: skip
