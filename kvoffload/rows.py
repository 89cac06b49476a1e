"""Several layers' rows below each other, so that one operation does the work of all of them.

Who keeps something of each row knows no number of rows where it takes pages in, and so can stand for all layers.
"""

from collections.abc import MutableMapping, Sequence
from copy import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kvoffload.buffers import Growing


class Rowwise:
    """``row_state`` names what is kept of each row: tensors [rows, ...], ``Growing`` buffers, others that are rowwise,
    tuples of them, or None."""

    row_state: ClassVar[tuple[str, ...]] = ()

    @property
    def host_state(self) -> object:
        """What else must be the same in all that are joined."""
        return None


T = TypeVar("T", bound=Rowwise)


def kind(part: Any) -> object:
    """Those of one kind can be joined."""
    if isinstance(part, Rowwise):
        return type(part), part.host_state, *(kind(getattr(part, name)) for name in part.row_state)
    if isinstance(part, Tensor):
        return part.dtype, part.shape[1:]
    return tuple(kind(each) for each in part) if isinstance(part, tuple) else type(part)


def join(parts: Sequence[T], known: MutableMapping[int, Any]) -> T:
    """One that stands for all of them, in whose place it puts pages: the tensors of each are views of its own from now
    on. What was joined before is ``known``, by the id of its first part."""
    known[id(parts[0])] = whole = copy(parts[0])
    for name in whole.row_state:
        joined, views = _below([getattr(part, name) for part in parts], known)
        setattr(whole, name, joined)
        for part, view in zip(parts, views, strict=True):
            setattr(part, name, view)
    return whole


def _below(values: Sequence[Any], known: MutableMapping[int, Any]) -> tuple[Any, Sequence[Any]]:
    """All of them in one, and what each is then."""
    first = values[0]
    if isinstance(first, Tensor):
        joined = torch.cat(list(values))
        return joined, joined.split([len(value) for value in values])
    if isinstance(first, tuple):
        each = [_below(column, known) for column in zip(*values, strict=True)]
        return tuple(joined for joined, _ in each), list(zip(*(views for _, views in each), strict=True))
    if isinstance(first, Growing):
        return GrowingRows(values), values
    if first is None or id(first) in known:
        return known.get(id(first)), values
    return join(values, known), values


class GrowingRows(Growing):
    """Buffers of several layers, which stay where they are: what is put is shared out."""

    def __init__(self, parts: Sequence[Growing]) -> None:
        super().__init__()
        self._parts = parts

    def put(self, at: Tensor, rows: Tensor) -> None:
        for part, own in zip(self._parts, rows.chunk(len(self._parts)), strict=True):
            part.put(at, own)

    def take(self, at: Tensor) -> Tensor:
        return torch.cat([part.take(at) for part in self._parts])
