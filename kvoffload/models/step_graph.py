"""Decode steps as replays of one captured graph: the model's layers, selection, reads, completion and sampling.

Between two replays the host seals pages, does the upkeep and counts (attention/fixed.py). The first step in a new room
runs as it is, so that kernels are compiled and memory is taken; the second one is captured, which does not run it, and
replayed from then on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from kvoffload_storage.errors import CapacityError
from torch import Tensor

from kvoffload.attention.fixed import ROOM_TOKENS, FixedSteps
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError
from kvoffload.models.cache import OffloadCache
from kvoffload.models.compiled import Glue, fused
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.sampling import Sampler
from kvoffload.repeats import Capture, Repeats, capture_of


@dataclass(frozen=True)
class Stepped:
    """What a step gave: logits [B, vocabulary] and the tokens picked from them, int64 [B, 1]; valid until the next
    step."""

    logits: Tensor
    picked: Tensor


class Replayed:
    """Steps that are captured and replayed. ``n_replays`` counts those that were replays; ``refusal`` says why none are
    any more, if they could not be captured."""

    def __init__(self, capture: Capture | None) -> None:
        self._repeats: Repeats[Stepped] = Repeats(capture)

    @property
    def n_replays(self) -> int:
        return self._repeats.n_replays

    @property
    def refusal(self) -> str:
        return self._repeats.refusal


class StepGraph(Replayed):
    """The decode steps of one cache whose layers have all begun. With ``glue`` their small operations are compiled."""

    def __init__(
        self, model: Any, cache: OffloadCache, capture: Capture, *, room_tokens: int = ROOM_TOKENS,
        glue: Glue | None = None,
    ) -> None:  # fmt: skip
        self._model, self.cache, self._glue = model, cache, glue
        super().__init__(capture)
        self._steps = FixedSteps(cache.offloaded, room_tokens=room_tokens, capture=capture)
        shape = (cache.offloaded[0].geometry.n_sequences, 1)
        self._ids, self._positions = (torch.zeros(shape, dtype=torch.int64, device=model.device) for _ in range(2))

    @staticmethod
    def possible(cache: OffloadCache) -> bool:
        """Whether there may be steps of fixed shapes: all layers are ours, and nothing is computed anew."""
        return len(cache.offloaded) == len(cache.layers) and not cache.anew.is_wanted

    @torch.inference_mode()
    def step(self, ids: Tensor | int, position: Tensor | int, sampler: Sampler | None = None) -> Stepped | None:
        """Decode int64 [B, 1] (or one id for all) at these positions, and pick what comes next, the likeliest without a
        sampler. None, and nothing was done, where the step cannot have fixed shapes."""
        with self.cache.whole_step():
            if self.refusal or not self._advance():
                return None
            for buffer, new in ((self._ids, ids), (self._positions, position)):
                buffer.copy_(new) if isinstance(new, Tensor) else buffer.fill_(new)
            stepped = self._run(None if sampler is None or sampler.greedy else sampler)
        self._steps.finish()
        for layer in self.cache.layers:
            if isinstance(layer, OffloadLayer) and layer.kv is not None:
                layer.n_seen = layer.kv.n_tokens
        return stepped

    def _advance(self) -> bool:
        try:
            return self._steps.advance()
        except CapacityError as error:
            raise OutOfRoomError(str(error)) from error

    def _run(self, sampler: Sampler | None) -> Stepped:
        key = (self._steps.version, sampler)
        generators = () if sampler is None else sampler.generators
        return self._repeats.run(key, lambda: self._forward(sampler), generators)

    def _forward(self, sampler: Sampler | None) -> Stepped:
        """The device's part of a step."""
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        with _fixed(self.cache), fused(self._glue):
            output = self._model(self._ids, position_ids=self._positions, **options)
        logits: Tensor = output.logits[:, -1]
        return Stepped(logits, logits.argmax(-1, keepdim=True) if sampler is None else sampler.pick(logits))


@contextmanager
def _fixed(cache: OffloadCache) -> Iterator[None]:
    """Inside this block a forward of one token is the device's part of a step of fixed shapes."""
    cache.fixed = True
    try:
        yield
    finally:
        cache.fixed = False


class Replays:
    """Feeds the tokens of whatever cache there is by steps of fixed shapes, where that can be; nowhere without a way to
    capture them. Close it (or use a ``with`` block) to give the memory of the newest graph back."""

    def __init__(self, model: Any, capture: Capture | None, glue: Glue | None = None) -> None:
        self._model, self.capture, self.glue = model, capture, glue
        self.graph: StepGraph | None = None
        self._n_before = 0  # replays of the graphs before this one

    @classmethod
    def of(cls, model: Any, config: RuntimeConfig) -> Self:
        """Where the configuration and the model's device allow them."""
        return cls(model, capture_of(model.device) if config.replays_steps else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the graph, whose results are void then; a later step makes another one."""
        if self.graph is None:
            return
        on_cuda = self._model.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._model.device)  # a replay may be under way
        self._n_before, self.graph = self.count, None
        if on_cuda:
            torch.cuda.empty_cache()  # nothing else may use a graph's memory before

    @property
    def compiled(self) -> str:
        """What of the model's own operations is compiled; see ``Glue.note``."""
        return "" if self.glue is None else self.glue.note

    @property
    def count(self) -> int:
        """Steps that were replays."""
        return self._n_before + (0 if self.graph is None else self.graph.n_replays)

    def step(
        self, cache: OffloadCache, ids: Tensor | int, sampler: Sampler | None = None, *, position: Tensor | None = None
    ) -> Stepped | None:
        """As ``StepGraph.step``, behind what the cache holds; ``position`` int64 [B, 1] is for rows that are padded."""
        if self.capture is None or not StepGraph.possible(cache):
            return None
        if self.graph is None or self.graph.cache is not cache:
            self._n_before = self.count
            self.graph = StepGraph(self._model, cache, self.capture, glue=self.glue)
        return self.graph.step(ids, cache.get_seq_length() if position is None else position, sampler)
