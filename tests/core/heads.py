"""Random heads and a plain softmax to compare with."""

from typing import get_args

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.index.base import KeyIndex, Padding
from kvoffload.values import Fetched, Pages, Partial

CPU = torch.device("cpu")


def geometry(**sizes: int) -> Geometry:
    """Two rows of three query heads; key and value sizes differ on purpose."""
    defaults = {"n_sequences": 1, "n_kv_heads": 2, "group_size": 3, "key_dim": 8, "value_dim": 16, "page_size": 4}
    return Geometry(**(defaults | sizes), dtype=torch.float32, scale=1.0)


def random_pages(shape: Geometry, n_pages: int, *, padded: bool = False, seed: int = 0) -> Pages:
    """Pages of normal keys and values; with ``padded`` the first six tokens of row 0 do not count."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.rows, n_pages, shape.page_size)
    keys, values = (torch.randn(*size, d, generator=generator) for d in (shape.key_dim, shape.value_dim))
    valid = None
    if padded:
        valid = torch.ones(size, dtype=torch.bool)
        valid.view(shape.rows, -1)[0, :6] = False
    return Pages(keys, values, valid)


def random_query(shape: Geometry, seed: int = 1) -> Tensor:
    return torch.randn(shape.rows, shape.group_size, shape.key_dim, generator=torch.Generator().manual_seed(seed))


def fetch(pages: Pages, pairs: list[tuple[int, int]]) -> Fetched:
    """The slices at (row, page) pairs."""
    rows, ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    valid = None if pages.valid is None else pages.valid[rows, ids]
    return Fetched(pages.keys[rows, ids], pages.values[rows, ids], valid, rows, ids)


def masses(query: Tensor, pages: Pages) -> Tensor:
    """The true log masses of all pages for queries of each row, fp32 [rows * Q, R, P]: the scores of a perfect
    selector."""
    logits = torch.einsum("grd,gpsd->grps", query.view(pages.keys.shape[0], -1, query.shape[-1]), pages.keys.float())
    return (logits + pages.log_valid()[:, None]).logsumexp(-1).view(*query.shape[:2], -1)


def all_pairs(pages: Pages) -> list[tuple[int, int]]:
    return [(row, page) for row in range(pages.keys.shape[0]) for page in range(pages.n_pages)]


def softmax_over(query: Tensor, pages: Pages, pairs: list[tuple[int, int]]) -> Partial:
    """Plain attention of each row's queries over the tokens of its pages among ``pairs``, in fp64."""
    keep = torch.zeros(pages.keys.shape[:3], dtype=torch.bool)
    for row, page in pairs:
        keep[row, page] = True if pages.valid is None else pages.valid[row, page]
    keys, values = pages.keys.double().flatten(1, 2), pages.values.double().flatten(1, 2)
    logits = (query.double() @ keys.transpose(-1, -2)).masked_fill(~keep.flatten(1)[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0.0)
    return Partial((weights @ values).float(), lse.float())


class ExactIndex(KeyIndex):
    """An index without error: it keeps the keys."""

    def __init__(self) -> None:
        self.device = CPU
        self.reset()

    def reset(self, sample=None) -> None:
        self._runs: list[Tensor] = []
        self._padding = Padding()
        self.n_tokens = 0

    def absorb(self, pages: Pages) -> None:
        self._padding.absorb(pages)
        self._runs.append(pages.keys.float().flatten(1, 2).clone())
        self.n_tokens += self._runs[-1].shape[1]

    def logits(self, query: Tensor) -> Tensor:
        return self._padding.mask(query @ self.keys(0, self.n_tokens).transpose(-1, -2))

    def keys(self, start: int, stop: int) -> Tensor:
        return torch.cat(self._runs, 1)[:, start:stop]

    @property
    def index_bytes(self) -> int:
        return sum(run.nbytes for run in self._runs)


def indexed(completion):
    """The completion with an index without error, which takes in every page just before it."""
    completion.index = index = ExactIndex()
    reset, absorb = completion.reset, completion.absorb
    completion.reset = lambda anchor, **options: (index.reset(), reset(anchor, **options))
    completion.absorb = lambda pages: (index.absorb(pages), absorb(pages))
    return completion


def kinds(union: object) -> list[type]:
    """The configuration classes of a discriminated union."""
    return list(get_args(get_args(union)[0]))


__all__ = [
    "CPU",
    "ExactIndex",
    "all_pairs",
    "fetch",
    "geometry",
    "indexed",
    "kinds",
    "masses",
    "random_pages",
    "random_query",
    "softmax_over",
]
