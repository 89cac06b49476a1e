"""Before anything is timed: with everything read, a runtime gives what dense attention gives, as far as rounding lets
any two attentions agree (in bf16 the library's own two are some percent apart behind 32 random layers)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.bench.runs import Case, Contender, Run
from kvoffload.errors import KvoffloadError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest distance of a step's logits from dense ones, as a share of their norm."""
OF_ROUNDING = 1.5
"""And as a multiple of the distance between the library's fused and eager attention, where that allows more."""


class GateError(KvoffloadError):
    """What was to be timed computes something else."""


@dataclass(frozen=True)
class Dense:
    """The library's logits [n, B, vocabulary] by its fused attention and by its eager one."""

    fused: Tensor
    eager: Tensor


def dense_steps(reference: Contender, eager: Contender, case: Case, ids: Tensor) -> Dense:
    """What the library's own two give for the steps of int64 ``ids`` [n, B, 1]."""
    return Dense(_opened(reference, case, ids), _opened(eager, case, ids))


def check(contender: Contender, expected: Dense, case: Case, ids: Tensor) -> float:
    """The largest relative error over the steps of int64 ``ids`` [n, B, 1]. In fp32 the likeliest token of every step
    must be the same too. Raises GateError by name."""
    n = min(len(ids), contender.exact_steps)
    rounding = distance(expected.eager[:n], expected.fused[:n])
    return compare(contender.name, _opened(contender, case, ids[:n]), expected.fused[:n], rounding)


def _opened(contender: Contender, case: Case, ids: Tensor) -> Tensor:
    with contender.open(case) as run:
        return _logits(run, ids)


def _logits(run: Run, ids: Tensor) -> Tensor:
    return torch.stack([run.step(token).clone() for token in ids])


def compare(name: str, given: Tensor, expected: Tensor, rounding: float = 0.0) -> float:
    """The largest relative distance of logits [n, B, vocabulary]; raises GateError where it, or a token, tells against
    ``name``. ``rounding`` is how far the library's own attentions are apart."""
    tolerance = TOLERANCE[expected.dtype]
    if expected.dtype != torch.float32:
        tolerance = max(tolerance, OF_ROUNDING * rounding)
    error = distance(given, expected)
    if not error <= tolerance:
        raise GateError(
            f"{name} differs from dense attention by {error:.1e} of the logits with everything read (allowed: "
            f"{tolerance:.1e}): nothing was timed"
        )
    if expected.dtype == torch.float32 and not torch.equal(given.argmax(-1), expected.argmax(-1)):
        raise GateError(f"{name} gives other tokens than dense attention with everything read: nothing was timed")
    return error


def distance(given: Tensor, expected: Tensor) -> float:
    """Of logits [n, B, vocabulary], the largest of all as a share of the norm."""
    difference, norm = (t.float().norm(dim=-1) for t in (given.float() - expected.float(), expected))
    return float((difference / norm).max())
