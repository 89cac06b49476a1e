"""Before anything is timed: with everything read, a runtime gives what dense attention gives, as far as rounding lets
any two attentions agree (in bf16 the library's own two are some percent apart behind 32 random layers)."""

from collections.abc import Sequence

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


def check(
    reference: Contender, eager: Contender, contenders: Sequence[Contender], case: Case, ids: Tensor
) -> dict[str, float]:
    """The largest relative error of each contender over the steps of int64 ``ids`` [n, B, 1]; ``reference`` and
    ``eager`` are the library's own. In fp32 the likeliest token of every step must be the same too. Raises GateError by
    name."""
    expected, rounded = (_opened(library, case, ids) for library in (reference, eager))
    errors = {}
    for contender in contenders:
        n = min(len(ids), contender.exact_steps)
        given = _opened(contender, case, ids[:n])
        errors[contender.name] = compare(contender.name, given, expected[:n], distance(rounded[:n], expected[:n]))
    return errors


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
