"""Work on the device that is done again and again, as replays of a captured graph."""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Capture(Protocol):
    """How work is captured."""

    def __call__(self, call: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[T, Callable[[], None]]:
        """From work and the generators that it draws from to its results and what computes them anew; it is not run.
        Raises RuntimeError where that cannot be."""


def capture_cuda(call: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[T, Callable[[], None]]:
    """A CUDA graph of what the function does on the device."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = call()
    return results, graph.replay


def capture_of(device: torch.device) -> Capture | None:
    """How work is captured on a device; None where it is not."""
    return capture_cuda if device.type == "cuda" else None


class Repeats(Generic[T]):
    """Work that does the same on the same tensors for as long as its ``key`` is the same: it runs as it is the first
    time, so that kernels are compiled and memory is taken; the second time it is captured, which does not run it, and
    replayed from then on. ``n_replays`` counts the replays, ``refusal`` says why there are none any more. Without a
    way to capture there are none."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._captured: tuple[T, Callable[[], None]] | None = None
        self.key: object = None
        self.n_replays, self.refusal = 0, ""

    def run(self, key: object, call: Callable[[], T], generators: Sequence[torch.Generator] = ()) -> T:
        """The work's results, valid until it is done again."""
        if key != self.key:
            self.key, self._captured = key, None
            return call()
        if self._captured is None:
            self._captured = self._capture_now(call, generators)
        if self._captured is None:
            return call()
        results, replay = self._captured
        replay()
        self.n_replays += 1
        return results

    def _capture_now(
        self, call: Callable[[], T], generators: Sequence[torch.Generator]
    ) -> tuple[T, Callable[[], None]] | None:
        if self._capture is None or self.refusal:
            return None
        try:
            return self._capture(call, generators)
        except RuntimeError as error:
            self.refusal = next(iter(str(error).splitlines()), type(error).__name__)
            return None
