"""Means with bootstrap intervals over texts, and curves of quality against what was read.

Texts are drawn with replacement, the same ones for everything that is compared (a paired bootstrap). Where a value lies
beyond the ends of a curve, infinities say on which side; nothing is extrapolated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

N_RESAMPLES = 1000
LEVEL = 0.95
_EDGE = 0.02  # a share this near to an end of the curve, relative to it, counts as the end


def draws(n: int, *, seed: int, times: int = N_RESAMPLES) -> NDArray[np.int64]:
    """Which of ``n`` texts each resample has: int64 [times, n]."""
    return np.random.default_rng(seed).integers(0, n, (times, n))


def interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The central interval of resampled values, each end one of them; infinities stay what they are, NaNs are left out
    (all NaN gives NaN)."""
    kept = values[~np.isnan(values)]
    if len(kept) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def standard_error(values: Floats) -> float | None:
    """Of the mean; None for fewer than two values."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


@dataclass(frozen=True)
class Curve:
    """Quality of one method at growing shares: ``shares`` [K] ascending and positive, ``values`` [..., K].

    Between points it is linear in log share and, with ``log_values``, in log value (linear in both logarithms: a power
    law); values that are not positive are then taken as they are, linearly.
    """

    shares: Floats
    values: Floats
    log_values: bool

    def at(self, share: float) -> Floats:
        """Values [...] at a share; NaN beyond the ends."""
        first, last = self.shares[0], self.shares[-1]
        if not first * (1 - _EDGE) <= share <= last * (1 + _EDGE):
            return np.full(self.values.shape[:-1], np.nan)
        if len(self.shares) == 1:
            return self.values[..., 0]
        k = int(np.clip(np.searchsorted(self.shares, share) - 1, 0, len(self.shares) - 2))
        span = np.log(self.shares[k + 1] / self.shares[k])
        weight = float(np.clip(np.log(share / self.shares[k]) / span, 0.0, 1.0))
        left, right = self.values[..., k], self.values[..., k + 1]
        mixed = left + weight * (right - left)
        if not self.log_values:
            return mixed
        positive = (left > 0) & (right > 0)
        a, b = np.where(positive, left, 1.0), np.where(positive, right, 1.0)
        return np.where(positive, np.exp(np.log(a) + weight * np.log(b / a)), mixed)

    def reaches(self, value: float, *, lower_is_better: bool) -> float:
        """The smallest share at which one curve (values [K]) is as good as ``value``: 0 if it is at the first point
        already, infinity if it is at none."""
        sign = 1.0 if lower_is_better else -1.0
        good = np.flatnonzero(sign * self.values <= sign * value)
        if len(good) == 0:
            return float("inf")
        k = int(good[0])
        if k == 0:
            return float(self.shares[0]) if self.values[0] == value else 0.0
        left, right = float(self.values[k - 1]), float(self.values[k])
        if self.log_values and min(left, right, value) > 0:
            left, right, value = np.log(left), np.log(right), np.log(value)
        weight = (value - left) / (right - left)
        return float(self.shares[k - 1] * (self.shares[k] / self.shares[k - 1]) ** weight)


def ratio_of_means(above: Floats, below: Floats) -> Floats:
    """mean(above) / mean(below) over the last axis; NaN where the lower one is not positive."""
    numerator, denominator = above.mean(-1), below.mean(-1)
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), np.nan)
