"""``kl``: how far the next-token distributions are from dense attention's, on given text."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from pydantic import Field, model_validator
from torch import Tensor

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.base import Batch, Cost, Measured, Metric, Record
from kvoffload.evaluation.tasks.continuation import ContinuationBatch, ContinuationTask, OpenContinuation
from kvoffload.evaluation.teacher import teacher_forced
from kvoffload.evaluation.texts import Piece
from kvoffload.models.catalog import LoadedModel
from kvoffload.models.self_test import own_attention, switch_attention

_BLOCK = 256  # rows of logits that are fp32 at a time


class KlTask(ContinuationTask):
    """Mean KL(dense || sparse) in nats, share of equal top-1 tokens, and the text's perplexity, teacher-forced; with
    ``parts`` also the KL of each of so many equal parts of the positions, in order."""

    kind: Literal["kl"] = "kl"
    parts: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _whole_parts(self) -> "KlTask":
        if self.positions % self.parts:
            raise ValueError(f"positions: {self.positions} cannot be cut into {self.parts} equal parts")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("kl", lower_is_better=True),
            Metric("top1", lower_is_better=False),
            Metric("ppl", lower_is_better=True, exponential=True),
            *(Metric(name, lower_is_better=True) for name in part_names(self.parts)),
        )

    def batches(self, tokenizer: Any, context: int) -> list[Batch]:
        return [KlBatch(pieces, self.positions, self.parts) for pieces in self.pieces(tokenizer, context)]


def part_names(n_parts: int) -> list[str]:
    """Metrics of the parts of the positions; none where they are not cut."""
    return [f"kl_part{i + 1}" for i in range(n_parts if n_parts > 1 else 0)]


class KlBatch(ContinuationBatch):
    def __init__(self, pieces: Sequence[Piece], positions: int, parts: int) -> None:
        super().__init__(pieces, positions)
        self.parts = parts

    def open(self, loaded: LoadedModel, anchors: RuntimeConfig) -> "OpenKl":
        return OpenKl(self, loaded, anchors)


class OpenKl(OpenContinuation):
    """Beside the prefill it keeps the dense log-probabilities fp32 [B, positions, vocabulary] in host memory."""

    def __init__(self, batch: KlBatch, loaded: LoadedModel, anchors: RuntimeConfig) -> None:
        self._dense = torch.stack(
            [dense_log_probabilities(loaded.model, ids, batch.positions) for ids in batch.token_ids.tolist()]
        )
        self._parts = part_names(batch.parts)
        super().__init__(batch, loaded, anchors)

    def dense(self) -> Measured:
        surprise = _surprise(self._dense, self.continuation, 0).sum(1) / (self.continuation.shape[1] - 1)
        return Measured(tuple(self._record(i, ppl=float(value)) for i, value in enumerate(surprise)), None)

    def measure(self, config: RuntimeConfig) -> Measured:
        with self.taken_over(config) as cache:
            found, done = [], 0
            for logits in teacher_forced(self.loaded.model, cache, self.continuation):
                found.append(self._figures(logits.log_softmax(-1), done).double().cpu())
                done += logits.shape[1]
            cost = Cost.of(cache)
        figures = torch.cat(found, 2)  # [3, B, positions]
        kl, same = figures[:2].mean(2)
        surprise = figures[2].sum(1) / (done - 1)
        parts = figures[0].unflatten(1, (max(len(self._parts), 1), -1)).mean(2)
        return Measured(
            tuple(
                self._record(
                    i, kl=float(kl[i]), top1=float(same[i]), ppl=float(surprise[i]),
                    **dict(zip(self._parts, parts[i].tolist(), strict=False)),
                )
                for i in range(len(kl))
            ),
            cost,
        )  # fmt: skip

    def _figures(self, given: Tensor, first: int) -> Tensor:
        """KL, whether top-1 is equal, and surprise (0 behind the end) of log-probabilities [B, q, vocabulary] from
        position ``first`` on: fp32 [3, B, q]."""
        dense = self._dense[:, first : first + given.shape[1]].to(given.device)
        kl = (dense.exp() * (dense - given)).sum(2)
        same = (dense.argmax(-1) == given.argmax(-1)).float()
        surprise = _surprise(given, self.continuation, first)
        return torch.stack([kl, same, F.pad(surprise, (0, kl.shape[1] - surprise.shape[1]))])

    def _record(self, i: int, **values: float) -> Record:
        return Record(self.batch.samples[i], values, n=self.continuation.shape[1])


@torch.inference_mode()
def dense_log_probabilities(model: Any, token_ids: list[int], n_steps: int) -> Tensor:
    """The model's own attention over everything at once: fp32 [n_steps, vocabulary] in host memory, after each
    continuation token."""
    before = switch_attention(model)
    model.set_attn_implementation(own_attention(model, before))
    ids = torch.tensor([token_ids], device=model.device)
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=n_steps).logits[0]
    switch_attention(model)
    return torch.cat([block.float().log_softmax(-1).cpu() for block in logits.split(_BLOCK)])


def _surprise(log_probabilities: Tensor, continuation: Tensor, first: int) -> Tensor:
    """-log p of the tokens that follow positions ``first`` and on, [B, q]; one less where the text ends."""
    following = continuation[:, first + 1 : first + 1 + log_probabilities.shape[1], None].to(log_probabilities.device)
    return -log_probabilities[:, : following.shape[1]].gather(-1, following)[..., 0]
