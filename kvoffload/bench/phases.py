"""Where the time of a benchmark goes, told phase by phase, so that a slow run explains itself."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

STARTED = "start"
KERNELS = "of these, Triton kernels compiled"


class Phases:
    """Seconds by name. A phase ends when the device is done; one that comes again adds to what it had. ``watch`` also
    counts what compiling Triton kernels takes, which is part of the phases and told in each."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self.seconds: dict[str, float] = {}
        self.n_compiled, self.compiled_s = 0, 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside this block, also where it fails."""
        started, n_before, s_before = time.perf_counter(), self.n_compiled, self.compiled_s
        try:
            yield
            _settle()
        finally:
            self._add(name, time.perf_counter() - started, self.n_compiled - n_before, self.compiled_s - s_before)

    def start(self) -> None:
        """The process until now is a phase, where the system tells when it began."""
        with suppress(OSError, AttributeError, ValueError):
            self._add(STARTED, _process_s(), 0, 0.0)

    def watch(self) -> None:
        """Count the Triton kernels that this process compiles from now on."""
        with suppress(ImportError):
            from triton import knobs

            knobs.compilation.listener = self._count

    def as_dict(self) -> dict[str, float]:
        """Seconds of each phase, and of all kernels in them."""
        compiled = {KERNELS: self.compiled_s} if self.n_compiled else {}
        return {name: round(seconds, 3) for name, seconds in (self.seconds | compiled).items()}

    def _add(self, name: str, seconds: float, n_compiled: int, compiled_s: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        kernels = f", {compiled_s:.1f} of them for compiling {n_compiled} kernels" if n_compiled else ""
        self._say(f"{name} {seconds:.1f} s{kernels}")

    def _count(self, *, times: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            self.n_compiled += 1
            self.compiled_s += times.total / 1e6


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _process_s() -> float:
    """How long this process has run."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
