"""A selector over a token-level index: the page score is the log-sum-exp of its tokens' approximate logits."""

from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.index.base import KeyIndex
from kvoffload.selection.base import Selector
from kvoffload.values import KeySample, Pages


class IndexedSelector(Selector):
    """Scores pages of ``page_size`` tokens by whatever index it is given."""

    index: KeyIndex
    row_state = ("index",)

    def __init__(self, index: KeyIndex, page_size: int, *, uses_sample: bool) -> None:
        self.index, self.device, self.uses_sample = index, index.device, uses_sample
        self._page_size = page_size

    def reset(self, anchor: Tensor) -> None:
        self.index.reset()

    def fit(self, sample: KeySample) -> None:
        self.index.reset(sample)

    def absorb(self, pages: Pages) -> None:
        self.index.absorb(pages)

    def score(self, query: Tensor) -> Tensor:
        return self.index.score_pages(query, self._page_size)

    @property
    def can_hold(self) -> bool:
        return self.index.can_hold

    def hold(self, room: Room | None) -> None:
        self.index.hold(room)

    def note(self) -> None:
        self.index.note()

    def put(self, page: Pages) -> None:
        self.index.put(page)

    @property
    def index_bytes(self) -> int:
        return self.index.index_bytes

    @property
    def resident_bytes(self) -> int:
        return self.index.resident_bytes
