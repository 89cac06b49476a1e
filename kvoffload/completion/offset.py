"""A calibrated log-mass offset per query head around any completion."""

from pathlib import Path

import torch
from kvoffload_kernels.completion.reference import Tilt
from pydantic import model_validator
from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.completion.calibrated import CalibrationFile, read_calibration, read_tensors, tensor_shapes
from kvoffload.geometry import Geometry
from kvoffload.index.base import KeyIndex
from kvoffload.values import Fetched, Pages, Partial, Parts


class OffsetCompletion(Completion):
    """The inner completion's estimate with its mass times e^offset, offset fp32 [rows, R]."""

    row_state = ("_inner",)

    def __init__(self, inner: Completion, offset: Tensor) -> None:
        self._inner, self._offset = inner, offset
        self.uses_scores, self.uses_anchor = inner.uses_scores, inner.uses_anchor
        self.reads_slices = inner.reads_slices

    @property
    def index(self) -> KeyIndex | None:
        """The inner completion's index."""
        return self._inner.index

    @index.setter
    def index(self, index: KeyIndex | None) -> None:
        self._inner.index = index

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._inner.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        self._inner.absorb(pages)

    def refresh(self) -> None:
        self._inner.refresh()

    def hold(self, room: Room | None) -> None:
        self._inner.hold(room)

    def note(self) -> None:
        self._inner.note()

    def put(self, page: Pages) -> None:
        self._inner.put(page)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        rest = self._inner.estimate(query, fetched, scores)
        return Partial(rest.output, rest.lse + per_query(self._offset, query))

    def estimate_parts(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Parts | None:
        rest = self._inner.estimate_parts(query, fetched, scores)
        return None if rest is None else Parts(rest.output, rest.lse + self._offset[:, None])

    @property
    def tilt(self) -> Tilt | None:
        return self._inner.tilt

    @property
    def can_hold(self) -> bool:
        return self._inner.can_hold

    @property
    def state_bytes(self) -> int:
        return self._inner.state_bytes

    @property
    def resident_bytes(self) -> int:
        return self._inner.resident_bytes


def offset_name(layer: int) -> str:
    """The tensor's name in a calibration file, fp32 [G, R]."""
    return f"layers.{layer}.offset"


class OffsetsConfigBase(CompletionConfigBase):
    """A completion that takes calibrated offsets from ``file``, if there is one."""

    file: Path | None = None

    @model_validator(mode="after")
    def _file_has_offsets(self) -> "OffsetsConfigBase":
        if (found := self.calibration) is None:
            return self
        shapes, layers = tensor_shapes(found.path), found.header.layers
        if not layers or any(len(shapes.get(offset_name(layer), ())) != 2 for layer in layers):
            raise ValueError(f"file {str(found.path)!r} has no offsets")
        for name, value in self.model_dump(mode="json", exclude={"kind", "file"}).items():
            if (made := found.header.options.get(name)) != value:
                raise ValueError(f"file {str(found.path)!r} was calibrated with {name}={made}, not {name}={value}")
        return self

    @property
    def calibration(self) -> CalibrationFile | None:
        return None if self.file is None else read_calibration(self.file, type(self).model_fields["kind"].default)

    def with_offsets(self, inner: Completion, layer: int, geometry: Geometry, device: torch.device) -> Completion:
        """The completion with the layer's offsets, or as it is without a file. Raises UsageError if the offsets are
        made for other sizes."""
        if self.file is None:
            return inner
        shape = (geometry.n_kv_heads, geometry.group_size)
        [offset] = read_tensors(self.file, {offset_name(layer): shape}, device)
        return OffsetCompletion(inner, offset.repeat(geometry.n_sequences, 1))
