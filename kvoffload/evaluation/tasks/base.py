"""The contract of a task of the sweep: batches of sequences that are prefilled once, exactly, and then measured under
one configuration after another."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from kvoffload.config import RuntimeConfig
from kvoffload.models.cache import OffloadCache
from kvoffload.models.catalog import LoadedModel
from kvoffload.runtime.stats import Audited, Reads, scored_share


@dataclass(frozen=True)
class Metric:
    """A number that records hold: how it is read. Records of an ``exponential`` metric hold logarithms: e to their mean
    is what is reported (perplexity)."""

    name: str
    lower_is_better: bool
    exponential: bool = False


@dataclass(frozen=True)
class Record:
    """What one sample gave under one configuration: metric -> value, the mean over ``n`` positions. ``heads`` are
    columns of equal length, one entry a layer and query head, where a task measures heads."""

    sample: str
    values: Mapping[str, float]
    n: int = 1
    heads: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What the meter says of a cache after its decode steps: shares of the context read and charged, index bytes a
    token, layer and kv head, the share of heads whose gate abstains (None without a gate), the share of kv heads and
    steps that scored their pages, and of the audited ones the mean dropped mass and how many held the target (None
    without)."""

    read_share: float
    charged_share: float
    index_bytes_per_token: float
    gate_abstains: float | None = None
    scored_share: float | None = None
    dropped_mass: float | None = None
    dropped_mass_held: float | None = None

    @staticmethod
    def of(cache: OffloadCache) -> "Cost":
        """Waits for the device; all zero before the first step with pages."""
        layers = cache.offloaded
        reads = Reads.of(layers) or Reads(0.0, 0.0, 1.0)
        n_indexed = sum(layer.n_pages * layer.geometry.page_size * layer.geometry.rows for layer in layers)
        chosen = [layer.gate.choice for layer in layers if layer.gate is not None and layer.gate.choice is not None]
        audited = Audited.of(layers, cache.config.max_dropped_mass)
        return Cost(
            read_share=reads.read / reads.context,
            charged_share=reads.charged / reads.context,
            index_bytes_per_token=sum(layer.selector.index_bytes for layer in layers) / max(n_indexed, 1),
            gate_abstains=sum(float((c == 0).float().mean()) for c in chosen) / len(chosen) if chosen else None,
            scored_share=scored_share(layers),
            dropped_mass=audited.mean if audited else None,
            dropped_mass_held=audited.held if audited else None,
        )


@dataclass(frozen=True)
class Measured:
    """One batch under one configuration: a record for each of its samples, in their order, and what it cost (None for
    dense attention)."""

    records: tuple[Record, ...]
    cost: Cost | None


class OpenBatch(ABC):
    """A batch whose prompts are in: the source of every cell's cache."""

    @abstractmethod
    def measure(self, config: RuntimeConfig) -> Measured:
        """A cache of this configuration takes over the prefill (``OffloadCache.copy_prefill``, then ``prepare`` on
        each offloaded layer); nothing is left of it afterwards. Called any number of times, in any order."""

    @abstractmethod
    def dense(self) -> Measured:
        """The same records under dense attention, as far as they mean anything there."""

    @abstractmethod
    def close(self) -> None:
        """Give the prefill back; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Batch(ABC):
    """Sequences that are prefilled and decoded side by side; made without any work of the model."""

    samples: tuple[str, ...]
    """Names of its samples, different in all batches of a context. They are part of the key under which results are
    kept, so they end in ``fingerprint`` of what the sample consists of."""

    @abstractmethod
    def open(self, loaded: LoadedModel, anchors: RuntimeConfig) -> OpenBatch:
        """Prefill exactly, in a cache that keeps KV and anchors as ``anchors`` says (its policies do not matter). The
        model's attention is ours, and is so again afterwards. Called only if a cell needs it."""


class Task(BaseModel):
    """What is measured, checked at the border. Its fields are the options in ``--task kind:name=value,...``; the
    command's flags ``--text --texts --positions --batch --seed`` set the fields of these names and are refused where a
    task has none. One file and one name in the union of ``tasks/__init__.py`` make a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unkeyed: ClassVar[frozenset[str]] = frozenset({"text", "texts", "batch"})
    """Fields that change which samples there are or how they are grouped, but not the result of a sample."""

    kind: str
    seed: int = Field(default=0, ge=0)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What records may hold, the main one first."""
        raise NotImplementedError

    def check(self, contexts: Sequence[int]) -> None:
        """Raises UsageError for everything that can be refused without tokenizer and model."""

    def batches(self, tokenizer: Any, context: int) -> list[Batch]:
        """All the work of a context of ``context`` tokens, the same for the same fields; no work of the model. Raises
        UsageError where the material is too short, with the tokens that are needed."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Everything of the task that changes the result of a sample, as plain values."""
        return self.model_dump(mode="json", exclude=set(self.unkeyed))


def fingerprint(*parts: object) -> str:
    """A short hash of what a sample consists of: token ids, answers, ..."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())
