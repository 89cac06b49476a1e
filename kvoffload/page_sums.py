"""Tilted page sums: what ``anchored`` selection and the ``pages`` completion keep of every page.

With weights w_j = e^(q0 . k_j), q0 the mean query of the prefill (the anchor), a page keeps log sum w and the
w-weighted means of k and v; to first order in (q - q0) its mass is s0 e^((q - q0) . kbar) (kernels/README.md).
"""

import torch
from torch import Tensor

from kvoffload.buffers import Growing
from kvoffload.values import Pages


class PageSums:
    """Per page and row: log mass under the anchor, mean key and mean value, fp32."""

    def __init__(self, *, keep_values: bool) -> None:
        self._keep_values = keep_values
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        """Forget every page; the next ones are tilted by ``anchor`` fp32 [rows, D] (already scaled)."""
        self._anchor = anchor
        self._log_mass, self._keys, self._values = Growing(), Growing(), Growing()

    def __len__(self) -> int:
        return len(self._log_mass)

    def absorb(self, pages: Pages) -> None:
        logits = torch.einsum("gd,gpsd->gps", self._anchor, pages.keys.float()) + pages.log_valid()
        log_mass = logits.logsumexp(-1)
        weights = (logits - log_mass.masked_fill(log_mass.isneginf(), 0.0)[..., None]).exp()[..., None, :]
        self._log_mass.append(log_mass)
        self._keys.append((weights @ pages.keys.float())[..., 0, :])
        if self._keep_values:
            self._values.append((weights @ pages.values.float())[..., 0, :])

    def log_masses(self, query: Tensor) -> Tensor:
        """Estimated log mass of every page, fp32 [rows, R, P], for scaled queries [rows, R, D]."""
        tilt = query - self._anchor[:, None]
        return tilt @ self._keys.view.transpose(-1, -2) + self._log_mass.view[:, None]

    @property
    def values(self) -> Tensor:
        """Weighted mean values, fp32 [rows, P, Dv]."""
        return self._values.view

    @property
    def used_bytes(self) -> int:
        return self._log_mass.used_bytes + self._keys.used_bytes + self._values.used_bytes
