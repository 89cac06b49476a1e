"""``resa``: Rectified Sparse Attention (arXiv:2506.04108, official code read): every ``every`` tokens one dense causal
forward over the newest ``every`` decoded tokens gives them new keys and values in every layer; its logits are dropped.

The earlier pages stream through the device once a layer and pass, whatever ``every`` is: n / every tokens a step beside
the selection's own reads, counted with them. Selection is whatever is configured (the paper's is ``bounds`` with one
set a group). Page digests need no rebuild, since the tokens of a pass are in the window still: ``every`` may not exceed
``recent``. With ``mass`` a pass comes as soon as the dropped mass that the completion estimates, meant over layers
and heads and summed over steps, exceeds it (ours), and after ``every`` tokens at the latest.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from kvoffload.attention.layer import LayerCache
from kvoffload.policies.base import Policy, PolicyConfigBase


class ResaPolicyConfig(PolicyConfigBase):
    """A pass every ``every`` decoded tokens, or as soon as the estimated dropped mass adds up to ``mass``."""

    kind: Literal["resa"] = "resa"
    every: int = Field(32, ge=1)
    mass: float | None = Field(None, gt=0)

    def build(self) -> Policy:
        return Resa(self.every, self.mass)

    def check(self, *, recent: int, kinds: tuple[str, ...]) -> None:
        if self.every > recent:
            raise ValueError(
                f"policy resa: every={self.every} must not exceed recent={recent}: sealed pages never change"
            )


class Resa(Policy):
    def __init__(self, every: int, mass: float | None) -> None:
        self._every, self._mass, self.max_dense = every, mass, every
        self.n_passes = 0
        self.restart()

    def restart(self) -> None:
        self._n_tokens, self._dropped_before = 0, 0.0

    def run_length(self, limit: int) -> int:
        return min(limit, 1 if self._mass is not None else self._every - self._n_tokens)

    def dense_tokens(self, layers: Sequence[LayerCache], n_new: int) -> int:
        self._n_tokens += n_new
        if self._n_tokens < self._every and not self._exceeded(layers):
            return 0
        n_tokens, self._n_tokens, self._dropped_before = self._n_tokens, 0, dropped_mass(layers)
        self.n_passes += 1
        return n_tokens

    def _exceeded(self, layers: Sequence[LayerCache]) -> bool:
        return self._mass is not None and dropped_mass(layers) - self._dropped_before > self._mass


def dropped_mass(layers: Sequence[LayerCache]) -> float:
    """The completion's share of the total mass, meant over layers and heads and summed over steps; waits for the
    device."""
    masses = [float(x.meter.completion_mass) for x in layers if x.meter.completion_mass is not None]
    return sum(masses) / len(masses) if masses else 0.0
