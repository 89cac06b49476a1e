"""Shared steps of several sequences as replays of one captured graph, for as long as the same ones take part.

As in step_graph.py, what differs from step to step is the host's, between two replays, each cache for itself; who joins
or leaves, and who gets a larger room, makes the graph void. The first step after that runs as it is, the second one is
captured.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvoffload.attention.fixed import ROOM_TOKENS, FixedSteps
from kvoffload.models.batch import FAILURES, Fed, batch_of, feed_together
from kvoffload.models.cache import OffloadCache
from kvoffload.models.compiled import Glue, fused
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.step_graph import Replayed, StepGraph, Stepped
from kvoffload.repeats import Capture

Key = tuple[tuple[int, int], ...]


class BatchSteps(Replayed):
    """The shared steps of sequences of one model. Without ``capture`` they are plain forwards. In those that can be
    captured the sequences' attention is spread over ``n_branches`` streams, and with ``glue`` the model's small
    operations are compiled."""

    def __init__(
        self, model: Any, capture: Capture | None, *, room_tokens: int = ROOM_TOKENS, n_branches: int = 8,
        glue: Glue | None = None,
    ) -> None:  # fmt: skip
        super().__init__(capture)
        self._model, self._capture, self._room_tokens, self._glue = model, capture, room_tokens, glue
        self._branches = tuple(
            torch.cuda.Stream(model.device)
            for _ in range(n_branches if n_branches > 1 and model.device.type == "cuda" else 0)
        )
        self._fixed: WeakKeyDictionary[OffloadCache, FixedSteps] = WeakKeyDictionary()
        self._numbers: WeakKeyDictionary[OffloadCache, int] = WeakKeyDictionary()  # an id would come again
        self._count = count()
        self._inputs = torch.zeros(2, 0, 1, dtype=torch.int64)  # what a replay reads its tokens and positions from

    @torch.inference_mode()
    def feed(self, caches: Sequence[OffloadCache], tokens: Sequence[int]) -> list[Fed | BaseException]:
        """``feed_together``, with those steps replayed that can be; the likeliest tokens come with them."""
        outcomes: dict[int, Fed | BaseException] = {}
        fixed = [] if self._capture is None or self.refusal else self._advance(caches, outcomes)
        plain = [i for i in range(len(caches)) if i not in fixed and i not in outcomes]
        if fixed:
            outcomes |= zip(fixed, self._step([caches[i] for i in fixed], [tokens[i] for i in fixed]), strict=True)
        if plain:
            given = feed_together(self._model, [caches[i] for i in plain], [tokens[i] for i in plain])
            outcomes |= zip(plain, given, strict=True)
        return [outcomes[i] for i in range(len(caches))]

    def _advance(self, caches: Sequence[OffloadCache], outcomes: dict[int, Fed | BaseException]) -> list[int]:
        """Count the new tokens of those whose steps can have fixed shapes; which they are."""
        fixed = []
        for i, cache in enumerate(caches):
            if not StepGraph.possible(cache) or any(layer.fetch.asks_host for layer in cache.offloaded):
                continue  # what goes wrong on the host in a replay would be everybody's
            if cache not in self._fixed:
                self._fixed[cache] = FixedSteps(cache.offloaded, room_tokens=self._room_tokens, capture=self._capture)
                self._numbers[cache] = next(self._count)
            try:
                with cache.whole_step():
                    if self._fixed[cache].advance():
                        fixed.append(i)
            except FAILURES as error:
                outcomes[i] = error
        return fixed

    def _step(self, caches: Sequence[OffloadCache], tokens: Sequence[int]) -> list[Fed]:
        steps = [self._fixed[cache] for cache in caches]
        key = tuple((self._numbers[cache], fixed.version) for cache, fixed in zip(caches, steps, strict=True))
        inputs = torch.tensor([tokens, [cache.get_seq_length() for cache in caches]])[..., None]
        with ExitStack() as whole:
            for cache in caches:
                whole.enter_context(cache.whole_step())
            stepped = self._run(key, caches, inputs)
        for cache, fixed in zip(caches, steps, strict=True):
            fixed.finish()
            for layer in cache.layers:
                if isinstance(layer, OffloadLayer) and layer.kv is not None:
                    layer.n_seen = layer.kv.n_tokens
        logits, picked = stepped.logits.clone(), stepped.picked[:, 0].tolist()
        return [Fed(logits[i : i + 1], picked[i]) for i in range(len(caches))]

    def _run(self, key: Key, caches: Sequence[OffloadCache], inputs: Tensor) -> Stepped:
        """A step of tokens and positions, int64 [2, B, 1]."""
        if key == self._repeats.key:
            self._inputs.copy_(inputs)
        else:
            self._inputs = inputs.to(self._model.device)
        return self._repeats.run(key, lambda: self._forward(caches))

    def _forward(self, caches: Sequence[OffloadCache]) -> Stepped:
        """The device's part of a step."""
        ids, positions = self._inputs
        batch = batch_of(caches, None, self._branches)
        for cache in caches:
            cache.fixed = True
        try:
            with fused(self._glue):
                output = self._model(ids, position_ids=positions, past_key_values=batch, use_cache=True)
        finally:
            for cache in caches:
                cache.fixed = False
        logits: Tensor = output.logits[:, -1]
        return Stepped(logits, logits.argmax(-1, keepdim=True))
