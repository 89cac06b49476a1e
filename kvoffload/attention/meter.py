"""What the decode steps of a layer did."""

from dataclasses import dataclass, field

import torch
from kvoffload_storage.store import Moved
from torch import Tensor


@dataclass
class Meter:
    """What the decode steps of a layer did, summed over steps; tensors stay on the device until ``stats`` asks."""

    steps: int = 0
    context_tokens: int = 0
    index_bytes_read: int = 0
    state_bytes_touched: int = 0
    masses: Tensor | None = None
    """The remainder's share of each head's mass, fp32 [rows, R]; they stay on the device."""
    scored_rows: int = 0
    """Rows whose pages were scored, once for each query: rows x steps where every step scores."""
    dropped: list[Tensor] = field(default_factory=list)
    """The mass that was not read in the steps that were audited, fp32 [rows, R] each, in host memory."""
    written: Moved = field(default_factory=Moved)

    def add_mass(self, mass: Tensor, n_steps: int) -> None:
        """The remainder's share of the mass in ``n_steps`` steps, [rows * n_steps, R]."""
        by_step = mass.unflatten(0, (-1, n_steps))
        self.masses_like(by_step[:, 0]).add_(by_step.sum(1))

    def masses_like(self, lse: Tensor) -> Tensor:
        """``masses``, which are counted from now on, for heads [rows, R]."""
        if self.masses is None:
            self.masses = torch.zeros_like(lse)
        return self.masses

    @property
    def completion_mass(self) -> Tensor | None:
        """The remainder's share of the mass, meant over heads, []."""
        return None if self.masses is None else self.masses.mean()

    def count_steps(self, n_steps: int, n_tokens: int, index_read: int, state_bytes: int) -> None:
        """Steps at a context of up to ``n_tokens``, each with one token more than the one before it, which read
        ``index_read`` bytes of a slow index together and touched ``state_bytes`` each."""
        self.steps += n_steps
        self.context_tokens += n_steps * n_tokens - n_steps * (n_steps - 1) // 2
        self.index_bytes_read += index_read
        self.state_bytes_touched += n_steps * state_bytes
