"""How a step reads: from the attention to its anchors to the exact part and the remainder."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from kvoffload_kernels.dispatch import attend_slices_in_parts
from torch import Tensor

from kvoffload.attention.decode import attend_selected, land
from kvoffload.attention.layer import LayerCache
from kvoffload.values import Fetched, Pages, Partial, Parts


@dataclass(frozen=True)
class Read:
    """What a step has of its queries [rows * Q, R]: the exact part (anchors and pages), the remainder, and the slices
    behind the exact part with the selector's scores. ``fetched`` is valid until the layer's next request."""

    exact: Partial
    remainder: Partial
    fetched: Fetched
    scores: Tensor


class Reading(ABC):
    """The reading of one layer. Wrappers hold another one and add to what it gives."""

    single_steps: bool = False
    """Whether a step depends on the one before it, so that a forward can decode one token only."""

    can_hold: bool = False
    """Whether it works in steps of fixed shapes: nothing in it changes from step to step but what tensors hold."""

    resident_bytes: int = 0
    """Device bytes held between steps."""

    n_capped: int = 0
    """Kv heads and steps that dropped more than their target by the estimate, as they might not read more."""

    @abstractmethod
    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        """For scaled queries fp32 [rows * Q, R, D] with their attention to the anchors; called only when there are
        pages."""

    def attend_fixed(self, layer: LayerCache, query: Tensor, anchors: Partial) -> tuple[Parts, Parts | None]:
        """The same in steps of fixed shapes, where it ``can_hold``: the pages, and what stands for the remainder, for
        queries [rows, R, D], in parts that are merged at the end of the step."""
        raise NotImplementedError

    def sealed(self, pages: Pages) -> None:  # noqa: B027 - most do not care
        """These pages left the window in the append before the next ``attend``; views, valid until then."""

    def restart(self) -> None:  # noqa: B027 - as above
        """The tokens behind the prefill, or the newest of them, were computed anew: forget what was kept of them."""


def estimate_again(layer: LayerCache, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
    """Another estimate of the remainder in one step, which is charged as the first is."""
    layer.n_estimates += 1
    return layer.completion.estimate(query, fetched, scores)


class SelectedPages(Reading):
    """The chooser's pages exactly, the completion for the rest."""

    can_hold = True

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        exact, fetched, scores = attend_selected(layer, query, anchors)
        return Read(exact, layer.completion.estimate(query, fetched, scores), fetched, scores)

    def attend_fixed(self, layer: LayerCache, query: Tensor, anchors: Partial) -> tuple[Parts, Parts | None]:
        arrivals, scores = layer.choose(query, anchors.lse)
        fetched = Fetched.join([land(layer, arrive) for arrive in arrivals])
        slices = fetched.all_keys, fetched.all_values, fetched.row_ids, fetched.valid
        softcap, tilt = layer.geometry.softcap, layer.completion.tilt
        pages, sums = attend_slices_in_parts(query, *slices, softcap, fetched.places, tilt, by_row=fetched.by_row)
        return Parts(*pages), layer.completion.estimate_parts(query, replace(fetched, sums=sums), scores)


class WrapperReading(Reading):
    """Passes everything on to another reading."""

    def __init__(self, inner: Reading) -> None:
        self.inner = inner

    @property
    def n_capped(self) -> int:  # type: ignore[override]
        return self.inner.n_capped

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        return self.inner.attend(layer, query, anchors)

    def sealed(self, pages: Pages) -> None:
        self.inner.sealed(pages)

    def restart(self) -> None:
        self.inner.restart()
