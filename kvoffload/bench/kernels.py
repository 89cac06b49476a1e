"""Where the time of a step goes on a GPU, kernel by kernel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvoffload.bench.clock import Clock
from kvoffload.bench.output import Table

_RUNS = 3


@dataclass(frozen=True)
class Kernel:
    """One kernel's part of a run: device milliseconds and launches."""

    name: str
    ms: float
    launches: float


def kernel_table(what: str, kernels: Sequence[Kernel]) -> Table:
    """The kernels for people."""
    rows = [(f"{kernel.ms:.3f}", f"{kernel.launches:g}", kernel.name) for kernel in kernels]
    return Table(f"kernels of {what}", ("ms", "launches", "kernel"), rows)


def kernels_of(run: Callable[[], object], clock: Clock, n_kernels: int) -> tuple[Kernel, ...]:
    """The ``n_kernels`` kernels that take most of a run's time; none where there is no GPU."""
    if not n_kernels or not clock.has_graphs:
        return ()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_RUNS):
            run()
        clock.settle()
    found = [
        Kernel(event.key[:120], round(event.device_time_total / _RUNS / 1e3, 4), event.count / _RUNS)
        for event in profiler.key_averages()
        if event.device_time_total
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.ms)[:n_kernels])
