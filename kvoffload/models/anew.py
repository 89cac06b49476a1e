"""What a cache's policies compute anew: which of the newest decoded tokens, and when."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.policies.base import Policy


class Anew:
    """The newest decoded tokens, as far as policies may want them again. Only tokens that were decoded since the last
    prefill or dense pass and are in every layer's window can come again."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = policies
        self._n_revised = max((policy.n_revised for policy in policies), default=0)
        self._n_kept = max([self._n_revised, *(policy.max_dense for policy in policies)])
        self.forget()

    @property
    def is_wanted(self) -> bool:
        return self._n_kept > 0

    def forget(self) -> None:
        """Other tokens than decoded ones come, or decoded ones go: nothing before them is computed anew."""
        self._ids: Tensor | None = None
        self._n_since_pass = 0
        for policy in self._policies:
            policy.restart()

    def note(self, ids: Tensor) -> None:
        """These tokens were decoded, int64 [B, n]."""
        if self._n_kept:
            self._n_since_pass += ids.shape[1]
            self._ids = (ids if self._ids is None else torch.cat([self._ids, ids], 1))[:, -self._n_kept :]

    def note_pass(self) -> None:
        """A dense pass is over."""
        self._n_since_pass = 0

    def newest(self, n: int) -> Tensor:
        """The newest ``n`` decoded tokens, int64 [B, n]."""
        assert self._ids is not None, "tokens were decoded"
        return self._ids[:, self._ids.shape[1] - n :]

    def run_length(self, limit: int) -> int:
        """How many of the next ``limit`` tokens one forward can decode."""
        return min((policy.run_length(limit) for policy in self._policies), default=limit)

    def revised(self, layers: Sequence[LayerCache]) -> int:
        """How many tokens the next forward computes anew."""
        return self._possible(self._n_revised, layers)

    def dense(self, layers: Sequence[LayerCache], n_new: int) -> int:
        """How many tokens a dense pass must compute anew now that ``n_new`` were decoded."""
        wanted = max((policy.dense_tokens(layers, n_new) for policy in self._policies), default=0)
        return self._possible(wanted, layers)

    def _possible(self, wanted: int, layers: Sequence[LayerCache]) -> int:
        if wanted == 0:
            return 0
        return min(wanted, self._n_since_pass, *(layer.anchors.n_window for layer in layers))
