"""Time and memory on one device: warm-up, medians, CUDA graphs where there is a GPU, and plain clocks elsewhere."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

_GRAPH_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def p90(self) -> float:
        """The time that nine of ten runs keep."""
        return sorted(self.seconds)[max(0, -(-9 * len(self.seconds) // 10) - 1)]

    def as_ms(self) -> dict[str, float]:
        return {name: round(getattr(self, name) * 1e3, 4) for name in ("median", "mean", "p90")}


class Clock:
    """Measures on ``device``; ``has_graphs`` says whether runs can be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_graphs = device.type == "cuda"

    def settle(self) -> float:
        """The time when everything asked for so far is done."""
        if self.has_graphs:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wall(self, run: Callable[[], object], n: int, *, warm_up: int = 0) -> Timing:
        """Host time of ``n`` runs one by one, each until the device is done: what somebody who waits for it sees."""
        for _ in range(warm_up):
            run()
        times = []
        for _ in range(n):
            started = self.settle()
            run()
            times.append(self.settle() - started)
        return Timing(tuple(times))

    def on_device(self, run: Callable[[], object], n: int, *, warm_up: int = 2) -> Timing:
        """Device time of ``n`` runs that follow each other, by events; host time where there are none."""
        if not self.has_graphs:
            return self.wall(run, n, warm_up=warm_up)
        for _ in range(warm_up):
            run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        self.settle()
        return Timing(tuple(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)))

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """``run`` as one CUDA graph on the device's current memory; ``run`` itself where there are no graphs."""
        if not self.has_graphs:
            return run
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_GRAPH_WARM_UP):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def start_peak(self) -> None:
        """Forget the peak so far, and memory that nobody uses."""
        if self.has_graphs:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Most device bytes that were allocated at once since ``start_peak``; None where the device does not count."""
        return torch.cuda.max_memory_allocated(self.device) if self.has_graphs else None
