"""Work that follows a layer's attention in a prefill, beside the next layer's computation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Behind:
    """Runs the work of one layer when the next one's attention was asked for.

    There is one thread. On a GPU the work is asked for on a stream of its own, one layer late: whatever makes the host
    wait in it (a fit, a copy into files) waits for that stream alone, while the compute stream still has a layer's
    attention and products to do. That stream begins behind the event recorded at ``follow``, so it sees the layer's
    keys; the compute stream goes on behind it at ``finish``, so nobody reads what is half made. ``made`` tensors, which
    belong to the compute stream, are told to the allocator (``record_stream``), so that their memory is not used again
    too early; what the work allocates belongs to the side stream, whose later work begins behind the compute stream's
    last use of it. Keys of two layers are held at most: of the work under way, and of the layer that computes.
    Elsewhere the order is the same, without streams.
    """

    def __init__(self) -> None:
        self._due: Callable[[], object] | None = None
        self._stream: torch.cuda.Stream | None = None

    def follow(self, work: Callable[[], object], made: Sequence[Tensor]) -> None:
        """Run what is due; then ``work``, which reads the ``made`` tensors, is due behind all that was asked for."""
        self._run()
        self._due = self._beside(work, made) if made[0].is_cuda else work

    def finish(self) -> None:
        """Run what is due; what is asked for on the compute stream from now on comes behind it."""
        self._run()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _run(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            due()

    def _beside(self, work: Callable[[], object], made: Sequence[Tensor]) -> Callable[[], object]:
        stream = self._stream = self._stream or torch.cuda.Stream(made[0].device, priority=-1)
        ready = torch.cuda.current_stream(made[0].device).record_event()
        for tensor in made:
            tensor.record_stream(stream)

        def beside() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                work()

        return beside
