"""What the newest steps did in each layer, told while they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvoffload.attention.layer import LayerCache


@dataclass(frozen=True)
class LayerFigures:
    """A value a layer: token-equivalents read per step and kv head, the share of the selected slices that the page
    cache had (None where none were asked for), and the share of the attention mass that the completion gave."""

    read: list[float]
    hits: list[float | None]
    completed: list[float]


@dataclass(frozen=True)
class _Total:
    steps: int
    n_bytes: int
    asked: int
    hits: int
    mass: float

    @staticmethod
    def of(layer: LayerCache) -> "_Total":
        meter, fetch = layer.meter, layer.fetch
        moved = fetch.decode.total()
        mass = 0.0 if meter.completion_mass is None else float(meter.completion_mass)
        n_bytes = moved.cpu + moved.nvme + meter.index_bytes_read
        return _Total(meter.steps, n_bytes, fetch.n_asked, int(fetch.n_hits), mass)


class LayerWatch:
    """Remembers where the counters stood. ``take`` waits for the device: it is for who looks on, not for every run."""

    def __init__(self) -> None:
        self._before: list[_Total] = []

    def take(self, layers: Sequence[LayerCache]) -> LayerFigures | None:
        """Means of the steps since the last time; None where there were none with pages."""
        now = [_Total.of(layer) for layer in layers]
        before = self._before or [_Total(0, 0, 0, 0, 0.0)] * len(now)
        self._before = now
        pairs = list(zip(before, now, layers, strict=True))
        if not pairs or any(b.steps <= a.steps for a, b, _ in pairs):
            return None
        return LayerFigures(
            read=[round((b.n_bytes - a.n_bytes) / (b.steps - a.steps) / _unit(x), 2) for a, b, x in pairs],
            hits=[_share(b.hits - a.hits, b.asked - a.asked) for a, b, _ in pairs],
            completed=[round((b.mass - a.mass) / (b.steps - a.steps), 4) for a, b, _ in pairs],
        )


def _unit(layer: LayerCache) -> int:
    """Bytes of one token-equivalent in every row."""
    return layer.geometry.rows * layer.geometry.token_bytes


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
