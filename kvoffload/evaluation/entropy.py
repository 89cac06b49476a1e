"""The errors of heads by the entropy of their attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvoffload.evaluation.statistics import Floats
from kvoffload.evaluation.summary import CellResult

N_BINS = 6
_FIGURES = ("entropy", "error", "selection_error", "mass_error")


@dataclass(frozen=True)
class EntropyBin:
    """Heads of one method with entropies from ``low`` to ``high`` nats: mean entropy, mean errors with the completion
    and without, and the log-mass error (None where nothing was estimated)."""

    method: str
    low: float
    high: float
    n_heads: int
    entropy: float
    error: float
    selection_error: float
    mass_error: float | None

    @property
    def gain(self) -> float:
        """How many times smaller the completion makes the error."""
        return self.selection_error / self.error if self.error > 0 else float("inf")


def entropy_bins(cells: Sequence[CellResult], n_bins: int = N_BINS) -> list[EntropyBin]:
    """Methods with a completion, each with its heads (those of every sample) in bins of equal number. Every cell has as
    many heads in a bin as it has in the others, so that bins differ in entropy and not in budget or context. Empty
    where no heads were measured."""
    methods = dict.fromkeys(c.method for c in cells if not c.is_selection_only and c.results[0].heads)
    return [one for method in methods for one in _bins(method, [c for c in cells if c.method == method], n_bins)]


def _bins(method: str, cells: Sequence[CellResult], n_bins: int) -> list[EntropyBin]:
    parts: list[list[dict[str, Floats]]] = [[] for _ in range(n_bins)]
    for cell in cells:
        columns = _columns(cell)
        order = np.argsort(columns["entropy"], kind="stable")
        for place, part in enumerate(np.array_split(order, n_bins)):
            parts[place].append({name: column[part] for name, column in columns.items()})
    return [_bin(method, part) for part in parts if any(len(columns["entropy"]) for columns in part)]


def _bin(method: str, parts: Sequence[dict[str, Floats]]) -> EntropyBin:
    names = [name for name in parts[0] if all(name in part for part in parts)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    entropy = columns["entropy"]
    return EntropyBin(
        method=method,
        low=float(entropy.min()),
        high=float(entropy.max()),
        n_heads=len(entropy),
        entropy=float(entropy.mean()),
        error=float(columns["error"].mean()),
        selection_error=float(columns["selection_error"].mean()),
        mass_error=float(columns["mass_error"].mean()) if "mass_error" in columns else None,
    )


def _columns(cell: CellResult) -> dict[str, Floats]:
    """The figures that all samples of a cell have, over its heads and samples."""
    names = [name for name in _FIGURES if all(name in result.heads for result in cell.results)]
    return {name: np.array([v for result in cell.results for v in result.heads[name]]) for name in names}
