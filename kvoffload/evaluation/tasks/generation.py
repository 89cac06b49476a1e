"""Greedy answers of a batch of prompts: exact prefills that every cell takes over, then all rows side by side under
the cell's budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.base import Cost
from kvoffload.evaluation.teacher import prefill
from kvoffload.models.cache import OffloadCache
from kvoffload.models.catalog import LoadedModel
from kvoffload.models.feed import feed
from kvoffload.models.sampling import end_tokens
from kvoffload.models.step_graph import Replays


@dataclass(frozen=True)
class Prefilled:
    """One prompt in a cache of its own, and the token that dense attention answers first."""

    cache: OffloadCache
    n_tokens: int
    first_token: int
    max_new_tokens: int


@dataclass(frozen=True)
class Answers:
    """Text of every row, and what the decode steps cost."""

    texts: tuple[str, ...]
    cost: Cost


def prefill_prompt(
    loaded: LoadedModel, prompt_ids: Sequence[int], anchors: RuntimeConfig, *, max_new_tokens: int
) -> Prefilled:
    """Take in one prompt exactly, where ``anchors`` says; close its cache when all cells are done."""
    cache = OffloadCache(loaded.model.config, anchors, expected_tokens=len(prompt_ids))
    try:
        logits = prefill(loaded.model, cache, torch.tensor([list(prompt_ids)]))
    except BaseException:
        cache.close()
        raise
    return Prefilled(cache, len(prompt_ids), int(logits.argmax(-1)), max_new_tokens)


@torch.inference_mode()
def answer(loaded: LoadedModel, prompts: Sequence[Prefilled], config: RuntimeConfig) -> Answers:
    """Greedy answers under one policy: every row until its end token or its number of new tokens.

    Prompts of different length are padded at the left; a row that has ended is stepped on (and counted by the meter)
    until the last one has.
    """
    longest = max(p.n_tokens for p in prompts)
    n_steps = max(p.max_new_tokens for p in prompts)
    with OffloadCache(loaded.model.config, config, expected_tokens=longest + n_steps) as cache:
        cache.copy_prefill(*(p.cache for p in prompts))
        for layer in cache.offloaded:
            prepare(layer)
        rows = _Rows(prompts, end_tokens(loaded.model, loaded.tokenizer))
        positions = torch.tensor([[p.n_tokens] for p in prompts], device=loaded.model.device)
        tokens = torch.tensor([[p.first_token] for p in prompts], device=loaded.model.device)
        with Replays.of(loaded.model, config) as replays:
            while not rows.ended():
                tokens = _step(replays, loaded.model, cache, tokens, positions + rows.n_steps)
                rows.add(tokens[:, 0].tolist())
        decode = loaded.tokenizer.decode
        texts = tuple(str(decode(ids, skip_special_tokens=True)) for ids in rows.answers)
        return Answers(texts, Cost.of(cache))


def _step(replays: Replays, model: Any, cache: OffloadCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Feed int64 [B, 1] at positions [B, 1], by a replay where that can be; the likeliest next tokens, int64 [B, 1],
    valid until the next step."""
    stepped = replays.step(cache, tokens, position=positions)
    if stepped is not None:
        return stepped.picked
    return feed(model, cache, tokens, first=positions)[:, -1].argmax(-1, keepdim=True)


class _Rows:
    """What every row has answered so far, its end token not included."""

    def __init__(self, prompts: Sequence[Prefilled], ends: set[int]) -> None:
        self._limits, self._ends = [p.max_new_tokens for p in prompts], ends
        self.answers: list[list[int]] = [[] for _ in prompts]
        self._open = [True] * len(prompts)
        self.n_steps = -1
        self.add([p.first_token for p in prompts])

    def add(self, tokens: list[int]) -> None:
        self.n_steps += 1
        for i, token in enumerate(tokens):
            if not self._open[i]:
                continue
            if token not in self._ends:
                self.answers[i].append(token)
            self._open[i] = token not in self._ends and len(self.answers[i]) < self._limits[i]

    def ended(self) -> bool:
        return not any(self._open)
