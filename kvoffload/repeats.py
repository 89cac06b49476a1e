"""Work on the device that is done again and again, as replays of a captured graph."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Capture(Protocol):
    """How work is captured."""

    def __call__(self, call: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[T, Callable[[], None]]:
        """From work and the generators that it draws from to its results and what computes them anew; it is not run.
        Raises RuntimeError where that cannot be."""


def capture_cuda(call: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[T, Callable[[], None]]:
    """CUDA graphs of what the function does on the device, one after the other where it has work for the host."""
    pieces = Pieces(generators)
    with pieces.captured():
        results = call()
    return results, pieces.replay


class Cuts(Protocol):
    """A capture that the host's work can interrupt."""

    def cut(self, work: Callable[[], None]) -> None:
        """In every replay ``work`` is done between what was captured before and what is after."""


class _Running(threading.local):
    """The capture that this thread is in."""

    cuts: Cuts | None = None


_RUNNING = _Running()


@contextmanager
def interruptible(cuts: Cuts) -> Iterator[None]:
    """Inside this block the host's work interrupts a capture."""
    _RUNNING.cuts = cuts
    try:
        yield
    finally:
        _RUNNING.cuts = None


def on_host(work: Callable[[], None]) -> None:
    """Work of the host that reads what the device has made so far and changes what tensors hold: done now, or, inside
    of a capture, in every replay."""
    if _RUNNING.cuts is None:
        work()
    else:
        _RUNNING.cuts.cut(work)


class Pieces:
    """CUDA graphs in the order of their capture, and what the host does behind each but the last. They share memory."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators, self._pool = generators, torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._works: list[Callable[[], None]] = []

    @contextmanager
    def captured(self) -> Iterator[None]:
        """What the device is asked for inside this block is captured."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._begin()
            try:
                with interruptible(self):
                    yield
            finally:
                self._graphs[-1].capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def cut(self, work: Callable[[], None]) -> None:
        self._graphs[-1].capture_end()
        self._works.append(work)
        self._begin()

    def replay(self) -> None:
        """Raises what the host's work raises; the device has done what came before it then."""
        for graph, work in zip_longest(self._graphs, self._works):
            graph.replay()
            if work is not None:
                work()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)


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
