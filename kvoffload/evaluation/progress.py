"""What people see of a sweep while it runs: a bar on a terminal, a line a cell elsewhere, all of it on stderr."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvoffload.evaluation.cells import DENSE, Cell
from kvoffload.evaluation.sweep import Work
from kvoffload.evaluation.tasks.base import Measured, Metric


class SweepView:
    """Follows a sweep of ``n_cells`` measurements."""

    def __init__(self, console: Console, n_cells: int, metrics: Sequence[Metric]) -> None:
        self._console, self._n_cells, self._done = console, n_cells, 0
        self._metrics = metrics
        self._bar: Progress | None = None

    @contextmanager
    def showing(self) -> Iterator[Self]:
        """The bar lives inside this block."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("sweep", total=self._n_cells)
            yield self
        self._bar = None

    def cell(self, work: Work, cell: Cell, measured: Measured, took_s: float) -> None:
        """A measurement is done, in so many seconds, and on disk."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        name = DENSE if cell.method == DENSE else f"{cell.method} {cell.budget}"
        told = [f"{self._done}/{self._n_cells}", f"{work.context:,} tok", name, _values(measured, self._metrics)]
        line = " · ".join([*filter(None, told), f"{took_s:.1f} s"])
        self._console.print(line, markup=False, soft_wrap=True)


def _values(measured: Measured, metrics: Sequence[Metric]) -> str:
    """Means over the batch's samples, and what the batch cost."""
    told = []
    for metric in metrics:
        found = [record.values[metric.name] for record in measured.records if metric.name in record.values]
        if found:
            mean = sum(found) / len(found)
            told.append(f"{metric.name} {math.exp(mean) if metric.exponential else mean:.4g}")
    if measured.cost is not None:
        told.append(f"read {measured.cost.read_share:.2%}, charged {measured.cost.charged_share:.2%}")
    return ", ".join(told)
