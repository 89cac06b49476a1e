"""A method against selection-only reading: at equal reads, at equal charge, and how much the other reads for the same
quality. Everything is paired: the same texts, and the same resamples of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvoffload.evaluation.statistics import Curve, Floats, draws, interval, ratio_of_means
from kvoffload.evaluation.summary import CellResult, final
from kvoffload.evaluation.tasks.base import Metric


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval; NaN where it is not known, infinite where it lies beyond a curve's end."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(resampled: Floats) -> "Estimate":
        """From the number itself, first, and its resamples."""
        return Estimate(float(resampled[0]), *interval(resampled[1:]))


@dataclass(frozen=True)
class Comparison:
    """One cell against a baseline. Effects are ratios of means (method / baseline) where lower is better and
    differences (method - baseline) elsewhere.

    ``needed_share`` is what the baseline reads to be as good: 0 if its smallest budget already is, infinite if its
    largest is not; ``read_ratio`` is the method's read share by that. ``baseline_shares`` are its smallest and largest.
    """

    cell: CellResult
    value: Estimate
    at_read: Estimate
    at_charged: Estimate
    needed_share: float
    read_ratio: Estimate
    baseline_shares: tuple[float, float]
    own: Floats
    """Resampled means of the method, [1 + resamples], the mean itself first."""
    baseline_at_read: Floats
    """The same of the baseline at the method's reads."""


def estimate(cell: CellResult, metric: Metric, *, seed: int) -> Estimate:
    """A cell's mean over its samples."""
    values = np.array(list(cell.column(metric).values()))
    return Estimate.of(final(metric, values[_picks(len(values), seed)].mean(-1)))


def compare(cell: CellResult, baseline: Sequence[CellResult], metric: Metric, *, seed: int) -> Comparison | None:
    """A cell against the baseline's cells of the same context; None where they have no sample in common or the baseline
    reads nothing."""
    points = _ascending(baseline)
    columns = [point.column(metric) for point in (cell, *points)]
    common = sorted(set(columns[0]).intersection(*columns[1:]))
    if not points or not common:
        return None
    picks = _picks(len(common), seed)
    means = [final(metric, np.array([column[s] for s in common])[picks].mean(-1)) for column in columns]
    own, others = means[0], np.stack(means[1:], -1)
    shares = np.array([point.read_share for point in points])
    curve = Curve(shares, others, log_values=metric.lower_is_better)
    at_read = curve.at(cell.read_share)
    needed = np.array(
        [Curve(shares, o, curve.log_values).reaches(v, lower_is_better=metric.lower_is_better)
         for o, v in zip(others, own, strict=True)]
    )  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        read_ratio = cell.read_share / needed
    return Comparison(
        cell=cell,
        value=Estimate.of(own),
        at_read=Estimate.of(effect(metric, own, at_read)),
        at_charged=Estimate.of(effect(metric, own, curve.at(cell.charged_share))),
        needed_share=float(needed[0]),
        read_ratio=Estimate.of(read_ratio),
        baseline_shares=(float(shares[0]), float(shares[-1])),
        own=own,
        baseline_at_read=at_read,
    )


def over_contexts(comparisons: Sequence[Comparison], metric: Metric) -> Estimate:
    """The effect at equal reads of the means over contexts; texts of the same number are drawn together in all of
    them."""
    own = np.stack([c.own for c in comparisons], -1)
    return Estimate.of(effect(metric, own.mean(-1), np.stack([c.baseline_at_read for c in comparisons], -1).mean(-1)))


def worst(comparisons: Sequence[Comparison], metric: Metric) -> Comparison | None:
    """The context with the worst effect at equal reads; None where none is known."""
    known = [c for c in comparisons if not np.isnan(c.at_read.value)]
    pick = max if metric.lower_is_better else min
    return pick(known, key=lambda c: c.at_read.value) if known else None


def effect(metric: Metric, own: Floats, other: Floats) -> Floats:
    """Ratio or difference, NaN where the other is not known."""
    return ratio_of_means(own[..., None], other[..., None]) if metric.lower_is_better else own - other


def _picks(n: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The samples as they are, then as they are resampled: [1 + resamples, n]."""
    return np.concatenate([np.arange(n)[None], draws(n, seed=seed)])


def _ascending(cells: Sequence[CellResult]) -> list[CellResult]:
    """By read share; cells that read as much as the one before (or nothing) are left out."""
    points: list[CellResult] = []
    for cell in sorted(cells, key=lambda c: c.read_share):
        if cell.read_share > (points[-1].read_share * (1 + 1e-6) if points else 0.0):
            points.append(cell)
    return points
