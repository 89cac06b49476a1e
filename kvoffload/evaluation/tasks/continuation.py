"""Pieces of text of which the first tokens are prefilled and the others fed one by one: what ``kl`` and ``output``
have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.base import Batch, OpenBatch, Task, fingerprint
from kvoffload.evaluation.teacher import prefill
from kvoffload.evaluation.texts import Piece, cut_pieces, text_files
from kvoffload.models.cache import OffloadCache
from kvoffload.models.catalog import LoadedModel


class ContinuationTask(Task):
    """``texts`` disjoint pieces of context + ``positions`` tokens, ``batch`` of them side by side."""

    text: tuple[Path, ...] = ()
    texts: int = Field(default=8, ge=1)
    positions: int = Field(default=256, ge=2)
    batch: int = Field(default=1, ge=1)

    def check(self, contexts: Sequence[int]) -> None:
        text_files(self.text)

    def pieces(self, tokenizer: Any, context: int) -> list[list[Piece]]:
        """The pieces of a context in batches."""
        files = text_files(self.text)
        found = cut_pieces(tokenizer, files, n_tokens=context + self.positions, n_pieces=self.texts)
        return [found[i : i + self.batch] for i in range(0, len(found), self.batch)]


class ContinuationBatch(Batch):
    """Pieces of equal length, the last ``positions`` tokens of which are fed under the budget."""

    def __init__(self, pieces: Sequence[Piece], positions: int) -> None:
        self.samples = tuple(f"{piece.name}#{fingerprint(piece.token_ids)}" for piece in pieces)
        self.token_ids = torch.tensor([piece.token_ids for piece in pieces])
        self.positions = positions


class OpenContinuation(OpenBatch):
    """The pieces' beginnings in a cache that every cell starts from."""

    def __init__(self, batch: ContinuationBatch, loaded: LoadedModel, anchors: RuntimeConfig) -> None:
        self.batch, self.loaded = batch, loaded
        self.prompt = batch.token_ids[:, : -batch.positions]
        self.continuation = batch.token_ids[:, -batch.positions :]
        self._source = self._cache(anchors)
        prefill(loaded.model, self._source, self.prompt)

    def close(self) -> None:
        self._source.close()

    @contextmanager
    def taken_over(self, config: RuntimeConfig) -> Iterator[OffloadCache]:
        """A cache of this configuration that holds the prompts and is ready to decode."""
        with torch.inference_mode(), self._cache(config) as cache:
            cache.copy_prefill(self._source)
            for layer in cache.offloaded:
                prepare(layer)
            yield cache

    def _cache(self, config: RuntimeConfig) -> OffloadCache:
        return OffloadCache(self.loaded.model.config, config, expected_tokens=self.batch.token_ids.shape[1])
