"""Which pages a step reads: Top-K of the selector's scores, and the contract of whatever wraps that."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvoffload_kernels.dispatch import share_pages
from torch import Tensor

from kvoffload.values import Selection

if TYPE_CHECKING:
    from kvoffload.attention.layer import LayerCache

PageFilter = Callable[["LayerCache", Tensor], Tensor]
"""From scores fp32 [rows * Q, R, P] to those that pages are ranked by: -inf for pages that come last."""


class Chooser(ABC):
    """From the queries of a step to its selection. Wrappers keep what they remember of earlier steps themselves; they
    pass forwards of several queries a row on, since those are no steps in a row."""

    single_steps: bool = False
    """Whether a step depends on the one before it, so that a forward can decode one token only."""

    can_hold: bool = False
    """Whether it works in steps of fixed shapes: it keeps nothing and takes what ``layer.select_top`` gives."""

    resident_bytes: int = 0
    """Device bytes held between steps."""

    @abstractmethod
    def choose(self, layer: "LayerCache", query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        """Slices for scaled queries fp32 [rows * Q, R, D] whose anchors have mass anchor_lse [rows * Q, R], no more
        than the budget buys, with the scores of all pages fp32 [rows * Q, R, P] (anything of that shape where neither
        the completion nor the choice needs them). Called only when there are pages."""

    @abstractmethod
    def rank(self, layer: "LayerCache", scores: Tensor, anchor_lse: Tensor) -> Tensor:
        """What ``choose`` orders a row's pages by, fp32 [rows * Q, P], from scores [rows * Q, R, P]."""

    def forget(self, rows: Tensor) -> None:  # noqa: B027 - most have nothing to forget
        """The next step must score anew for the rows where bool [rows] is true."""

    def restart(self) -> None:  # noqa: B027 - as above
        """A prefill was summarised: forget the steps before it."""


class TopK(Chooser):
    """The largest shares of the total mass, anew in every step."""

    can_hold = True

    def choose(self, layer: "LayerCache", query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        scores = layer.score(query)
        return layer.select_top(layer.filtered(scores), anchor_lse), scores

    def rank(self, layer: "LayerCache", scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return share_pages(layer.filtered(scores), anchor_lse.to(scores.device))
