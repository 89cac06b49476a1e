"""``output``: the error of every head's attention output, against the entropy of its attention."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.observed import ObservedCompletion
from kvoffload.evaluation.tasks.base import Batch, Cost, Measured, Metric, Record
from kvoffload.evaluation.tasks.continuation import ContinuationBatch, ContinuationTask, OpenContinuation
from kvoffload.evaluation.teacher import teacher_forced
from kvoffload.models.catalog import LoadedModel


class OutputTask(ContinuationTask):
    """Relative L2 error of the attention output with the completion (``error``) and without (``selection_error``),
    error of the remainder's log mass in nats, and the share of the mass that was not read; means over layers and query
    heads. Every head's own figures and its entropy are kept beside."""

    kind: Literal["output"] = "output"
    positions: int = Field(default=32, ge=2, le=512)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        names = ("error", "selection_error", "mass_error", "remainder")
        return tuple(Metric(name, lower_is_better=True) for name in names)

    def batches(self, tokenizer: Any, context: int) -> list[Batch]:
        return [OutputBatch(pieces, self.positions) for pieces in self.pieces(tokenizer, context)]


class OutputBatch(ContinuationBatch):
    def open(self, loaded: LoadedModel, anchors: RuntimeConfig) -> "OpenOutput":
        return OpenOutput(self, loaded, anchors)


class OpenOutput(OpenContinuation):
    def dense(self) -> Measured:
        """Nothing is off."""
        return Measured(tuple(Record(sample, {}) for sample in self.batch.samples), None)

    def measure(self, config: RuntimeConfig) -> Measured:
        with self.taken_over(config) as cache:
            watched = []
            for layer in cache.offloaded:
                watched.append(ObservedCompletion(layer))
                layer.completion = watched[-1]
            for _ in teacher_forced(self.loaded.model, cache, self.continuation):
                pass
            cost = Cost.of(cache)
        n_sequences = len(self.batch.samples)
        heads = _by_sequence([completion.means() for completion in watched], n_sequences)
        return Measured(tuple(self._record(i, heads) for i in range(n_sequences)), cost)

    def _record(self, i: int, heads: dict[str, Tensor]) -> Record:
        known = {name: column[i] for name, column in heads.items() if not column[i].isnan().any()}
        values = {name: float(column.mean()) for name, column in known.items() if name != "entropy"}
        columns = {name: [round(number, 6) for number in column.tolist()] for name, column in known.items()}
        return Record(self.batch.samples[i], values, n=self.continuation.shape[1], heads=columns)


def _by_sequence(layers: list[dict[str, Tensor]], n_sequences: int) -> dict[str, Tensor]:
    """Figures [rows, R] of every layer as [B, layers x query heads]; none at all where no layer has pages."""
    names = layers[0] if layers else {}
    return {name: torch.cat([layer[name].view(n_sequences, -1) for layer in layers], 1) for name in names}
