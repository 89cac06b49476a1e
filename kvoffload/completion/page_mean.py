"""``page_mean``: CompKV's compensation (arXiv:2609.26300): count, mean key and mean value of every page that was not
fetched, as n e^(q . kbar) and vbar; grows with the context. Its selection by residual is not part of this."""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.completion.pages import PagesCompletion
from kvoffload.geometry import Geometry


class PageMeanCompletionConfig(CompletionConfigBase):
    """Log count, mean key and mean value of each page, fp32."""

    kind: Literal["page_mean"] = "page_mean"

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return PageMeanCompletion(geometry.value_dim)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + value_dim + 1) * 4


class PageMeanCompletion(PagesCompletion):
    """Tilted page sums around the zero query are plain ones."""

    uses_anchor = False

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        super().reset(torch.zeros_like(anchor), n_pages=n_pages)
