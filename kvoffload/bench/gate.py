"""Before anything is timed: with everything read, a runtime gives what dense attention gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.bench.runs import Case, Contender, Run
from kvoffload.errors import KvoffloadError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest distance of a step's logits from dense ones, as a share of their norm."""


class GateError(KvoffloadError):
    """What was to be timed computes something else."""


def check(reference: Contender, contenders: Sequence[Contender], case: Case, ids: Tensor) -> dict[str, float]:
    """The largest relative error of each contender over the steps of int64 ``ids`` [n, B, 1]; in fp32 the likeliest
    token of every step must be the same too. Raises GateError by name."""
    with reference.open(case) as run:
        expected = _logits(run, ids)
    errors = {}
    for contender in contenders:
        n = min(len(ids), contender.exact_steps)
        with contender.open(case) as run:
            given = _logits(run, ids[:n])
        errors[contender.name] = compare(contender.name, given, expected[:n])
    return errors


def _logits(run: Run, ids: Tensor) -> Tensor:
    return torch.stack([run.step(token).clone() for token in ids])


def compare(name: str, given: Tensor, expected: Tensor) -> float:
    """The largest relative distance of logits [n, B, vocabulary]; raises GateError where it, or a token, tells against
    ``name``."""
    tolerance = TOLERANCE[expected.dtype]
    difference, norm = (t.float().norm(dim=-1) for t in (given.float() - expected.float(), expected))
    error = float((difference / norm).max())
    if not error <= tolerance:
        raise GateError(
            f"{name} differs from dense attention by {error:.1e} of the logits with everything read (allowed: "
            f"{tolerance:.0e}): nothing was timed"
        )
    if expected.dtype == torch.float32 and not torch.equal(given.argmax(-1), expected.argmax(-1)):
        raise GateError(f"{name} gives other tokens than dense attention with everything read: nothing was timed")
    return error
