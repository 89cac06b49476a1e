"""The contract of a policy: what it wraps around the parts of a cache's layers, and which tokens it computes anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kvoffload.attention.layer import LayerCache


@dataclass(frozen=True)
class Depth:
    """The ``place``-th of ``count`` offloaded layers, counted from 0."""

    place: int
    count: int


@dataclass(frozen=True)
class Freezing:
    """What a prefill freezes of early tokens (models/freeze.py), from layer ``start`` on."""

    what: Literal["hidden", "kv"]
    start: int
    keep: float
    power: float


class Policy:
    """One policy at work on one cache. What it does to a layer it does by wrapping ``layer.chooser`` or
    ``layer.reading``, or by setting ``layer.page_filter``, when the layer begins; policies are attached in the order in
    which they were given. A policy that attaches nothing costs nothing."""

    n_revised: int = 0
    """Newest decoded tokens that every forward computes anew beside its own."""

    freezing: Freezing | None = None
    """What prefills freeze of early tokens."""

    max_dense: int = 0
    """Newest decoded tokens that a dense pass may compute anew; 0 where there is none."""

    replaces_chooser: bool = False
    """Whether it brings a chooser of its own, which others then wrap: it is attached before them."""

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        """Wrap the parts of an empty layer."""

    def run_length(self, limit: int) -> int:
        """How many of the next ``limit`` tokens one forward can decode as far as this policy goes; at least 1."""
        return limit

    def dense_tokens(self, layers: Sequence[LayerCache], n_new: int) -> int:
        """Told of every forward that decoded ``n_new`` tokens: how many of the newest decoded tokens a dense pass must
        compute anew now."""
        return 0

    def restart(self) -> None:
        """A prefill came in: there are no decoded tokens."""


class PolicyConfigBase(BaseModel):
    """Fields of one kind of policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    def build(self) -> Policy:
        """A policy for one cache."""
        raise NotImplementedError

    def check(self, *, recent: int, kinds: tuple[str, ...]) -> None:
        """Raises ValueError where it cannot work with this window of ``recent`` tokens or beside these other
        policies."""
