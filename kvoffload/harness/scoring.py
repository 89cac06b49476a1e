"""How likely continuations are: contexts are prefilled exactly, and what follows is fed under the budget, several rows
and several tokens a forward."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.teacher import prefill, teacher_forced
from kvoffload.models.cache import OffloadCache
from kvoffload.models.catalog import LoadedModel
from kvoffload.runtime.stats import Reads

_NO_SUMMARIES: dict[str, Any] = {"offload": "cpu", "selector": "uniform", "completion": "none"}


@dataclass(frozen=True)
class Question:
    """Tokens to score behind tokens that are given; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, and whether each of its tokens is the likeliest; ``reads`` are those of the
    forwards that it was scored in (None without a step that had pages)."""

    log_likelihood: float
    is_greedy: bool
    reads: Reads | None


def score(
    loaded: LoadedModel, config: RuntimeConfig, questions: Sequence[Question], *, batch: int
) -> Iterator[tuple[int, Score]]:
    """The number and score of every question, those of one context beside each other, ``batch`` of them a forward.

    Every scored token but the first behind a context of one comes from a step under the budget: the last token of a
    context is not prefilled but fed. Rows of a forward share their context, so that no score depends on ``batch``.
    Models with layers outside the tiers, whose prefill cannot be copied, have a forward a row.
    """
    if loaded.ranks.several:  # what one of them could not capture would leave the others waiting
        config = config.model_copy(update={"cuda_graph": "off"})
    rows_at_once = batch if _can_copy(loaded, config) else 1
    numbers = sorted(range(len(questions)), key=lambda i: (questions[i].context, i))
    for context, same in groupby(numbers, key=lambda i: questions[i].context):
        group = list(same)
        for first in range(0, len(group), rows_at_once):
            part = group[first : first + rows_at_once]
            continuations = [questions[i].continuation for i in part]
            yield from zip(part, _score_rows(loaded, config, context, continuations), strict=True)


@torch.inference_mode()
def _score_rows(
    loaded: LoadedModel, config: RuntimeConfig, context: tuple[int, ...], rows: Sequence[tuple[int, ...]]
) -> list[Score]:
    given, device = context[:-1] or context, loaded.model.device
    targets = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    fed = [torch.tensor([*context[len(given) :], *row[:-1]], dtype=torch.int64) for row in rows]
    ids = pad_sequence(fed, batch_first=True)  # what is fed behind a row's end changes nothing before it
    with _prefilled(loaded, config, given, len(rows), ids.shape[1]) as (cache, logits):
        blocks = chain([logits[:, None]] if given == context else [], teacher_forced(loaded.model, cache, ids))
        chosen, likeliest = _weigh(blocks, targets)
        reads = Reads.of(cache.offloaded)
    lengths = [len(row) for row in rows]
    return [Score(float(chosen[i, :n].sum()), bool(likeliest[i, :n].all()), reads) for i, n in enumerate(lengths)]


def _weigh(blocks: Iterable[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets int64 [B, n], and whether each is the likeliest, from logits fp32
    [B, q, vocabulary] in order."""
    chosen, likeliest, done = [], [], 0
    for block in blocks:
        wanted = targets[:, done : done + block.shape[1], None]
        done += block.shape[1]
        chosen.append(block.log_softmax(-1).gather(-1, wanted)[..., 0])
        likeliest.append(block.argmax(-1) == wanted[..., 0])
    return torch.cat(chosen, 1), torch.cat(likeliest, 1)


@contextmanager
def _prefilled(
    loaded: LoadedModel, config: RuntimeConfig, context: tuple[int, ...], n_rows: int, n_more: int
) -> Iterator[tuple[OffloadCache, Tensor]]:
    """A cache that holds a context in each of its rows and is ready to decode, and logits [rows, vocabulary]."""
    model, ids, n_tokens = loaded.model, torch.tensor([context]), len(context) + n_more
    with OffloadCache(model.config, config, expected_tokens=n_tokens) as cache:
        if n_rows == 1:
            logits = prefill(model, cache, ids)
        else:
            with OffloadCache(model.config, _plain(config), expected_tokens=len(context)) as source:
                logits = prefill(model, source, ids)
                cache.copy_prefill(*[source] * n_rows)
            for layer in cache.offloaded:
                prepare(layer)
        yield cache, logits.expand(n_rows, -1)


def _plain(config: RuntimeConfig) -> RuntimeConfig:
    """What a prefill that others take over needs: the same pages and anchors, and no summaries."""
    same: dict[str, Any] = {name: getattr(config, name) for name in ("page_size", "sinks", "recent", "prefill_chunk")}
    return RuntimeConfig(**same, **_NO_SUMMARIES)


def _can_copy(loaded: LoadedModel, config: RuntimeConfig) -> bool:
    with OffloadCache(loaded.model.config, config) as cache:
        return cache.n_offloaded == len(cache.layers) and cache.freezing is None
