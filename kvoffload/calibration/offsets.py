"""Log-mass offsets for completions that need no training, kept where they lower the error of the output on sequences
that they were not fitted to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.calibration.examples import Example
from kvoffload.completion.base import Completion
from kvoffload.completion.offset import OffsetCompletion


@torch.no_grad()
def fit_offsets(completion: Completion, fitted: Sequence[Example], choosing: Sequence[Example]) -> Tensor:
    """The offset of each query head, fp32 [rows, R]: of nothing and what would undo the median error of the ``fitted``
    examples, half of it, and the mean error, the one with the least error in the ``choosing`` ones (nothing where
    equal)."""
    errors = torch.cat([example.log_mass_errors(example.estimate(completion)) for example in fitted], dim=-1)
    median = errors.median(-1).values
    candidates = torch.stack([torch.zeros_like(median), -median, -median / 2, -errors.mean(-1)])  # [4, rows, R]
    found = torch.stack([_output_errors(completion, choosing, candidate) for candidate in candidates])
    return candidates.gather(0, found.argmin(0, keepdim=True))[0]


def _output_errors(completion: Completion, examples: Sequence[Example], offset: Tensor) -> Tensor:
    moved = OffsetCompletion(completion, offset)
    errors = [example.output_errors(example.estimate(moved)).mean(-1) for example in examples]
    return torch.stack(errors).mean(0)
