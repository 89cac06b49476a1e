"""Log-mass offsets for completions that need no training, kept where they lower the held-out error of the output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.calibration.examples import Example
from kvoffload.completion.base import Completion
from kvoffload.completion.offset import OffsetCompletion


@torch.no_grad()
def fit_offsets(completion: Completion, train: Sequence[Example], held_out: Sequence[Example]) -> Tensor:
    """The offset of each query head, fp32 [rows, R]: of nothing and what would undo the training examples' median
    error, half of it, and the mean error, the one with the least held-out error (nothing where equal)."""
    errors = torch.cat([example.log_mass_errors(example.estimate(completion)) for example in train], dim=-1)
    median = errors.median(-1).values
    candidates = torch.stack([torch.zeros_like(median), -median, -median / 2, -errors.mean(-1)])  # [4, rows, R]
    found = torch.stack([_output_errors(completion, held_out, candidate) for candidate in candidates])
    return candidates.gather(0, found.argmin(0, keepdim=True))[0]


def _output_errors(completion: Completion, examples: Sequence[Example], offset: Tensor) -> Tensor:
    moved = OffsetCompletion(completion, offset)
    errors = [example.output_errors(example.estimate(moved)).mean(-1) for example in examples]
    return torch.stack(errors).mean(0)
