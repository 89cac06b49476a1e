"""Time of a decode step: ours and its peers, in turn, against the floor of the machine."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from kvoffload.bench.ceilings import Ceilings, StepBytes
from kvoffload.bench.clock import Clock, Timing
from kvoffload.bench.gate import check, dense_steps
from kvoffload.bench.kernels import Kernel, kernels_of
from kvoffload.bench.phases import Phases
from kvoffload.bench.runs import Case, Contender, Run
from kvoffload.errors import OutOfRoomError

_GATE_STEPS = 8
WARM_UP = 8


@dataclass(frozen=True)
class DecodePlan:
    """What is measured: ``context`` is what the last step sees."""

    context: int
    batch: int
    steps: int
    gate_context: int
    n_kernels: int = 0
    hit_share: float | None = None

    def case(self, n_sequences: int) -> Case:
        n_steps = self.steps + WARM_UP
        return Case(self.context - n_steps, n_sequences, n_steps, hit_share=self.hit_share)

    @property
    def gate_case(self) -> Case:
        return Case(self.gate_context - _GATE_STEPS, self.batch, _GATE_STEPS, exactly=True)


@dataclass(frozen=True)
class Measured:
    """One contender's figures; ``peak_bytes`` of the device while it decoded, weights included."""

    name: str
    n_sequences: int
    step: Timing
    bytes: StepBytes
    floor_s: float
    kv_bytes: int
    peak_bytes: int | None
    told: dict[str, Any]
    kernels: tuple[Kernel, ...] = ()

    @property
    def ratio(self) -> float:
        """The step as a multiple of its floor."""
        return self.step.median / self.floor_s

    @property
    def tokens_per_s(self) -> float:
        return self.n_sequences / self.step.median

    def as_dict(self) -> dict[str, Any]:
        return {
            "batch": self.n_sequences, "steps": len(self.step.seconds), "step_ms": self.step.as_ms(),
            "tokens_per_s": round(self.tokens_per_s, 2), "floor_ms": round(self.floor_s * 1e3, 4),
            "ratio_to_floor": round(self.ratio, 3), "bytes_a_step": vars(self.bytes),
            "device_kv_bytes": self.kv_bytes, "device_peak_bytes": self.peak_bytes, **self.told,
            "kernels": [vars(kernel) for kernel in self.kernels],
        }  # fmt: skip


class DecodeBench:
    """Gate first, then one contender after the other; what one leaves behind is given back before the next."""

    def __init__(
        self, plan: DecodePlan, clock: Clock, ceilings: Ceilings, vocabulary: int, phases: Phases | None = None
    ) -> None:
        self._plan, self._clock, self._ceilings, self._phases = plan, clock, ceilings, phases or Phases()
        draws = torch.randint(vocabulary, (_GATE_STEPS, plan.batch, 1), generator=torch.Generator().manual_seed(1))
        self._ids = self._fed = draws.to(clock.device)

    def gate(self, reference: Contender, eager: Contender, contenders: list[Contender]) -> dict[str, float]:
        """Relative errors of those that claim to be exact; raises GateError where one is not."""
        exact = [c for c in contenders if c.exact_steps and not c.lacks]
        with self._phases.phase("gate: the library's own"):
            expected = dense_steps(reference, eager, self._plan.gate_case, self._ids)
        errors = {}
        for contender in exact:
            with self._phases.phase(f"gate: {contender.name}"):
                errors[contender.name] = check(contender, expected, self._plan.gate_case, self._ids)
        self._clock.give_back()
        return errors

    def measure(self, contender: Contender) -> Measured:
        """Raises OutOfRoomError when not even one sequence fits (or not all of them, where the KV is offloaded)."""
        error = None
        for n_sequences in self._batches(contender):
            try:
                return self._measure(contender, n_sequences)
            except torch.OutOfMemoryError as caught:
                error = str(caught).partition(". ")[0]
        raise OutOfRoomError(f"{contender.name}: {self._plan.context:,} tokens do not fit on the device: {error}")

    def _batches(self, contender: Contender) -> Iterator[int]:
        yield self._plan.batch
        if contender.is_dense:
            yield from range(self._plan.batch - 1, 0, -1)

    def _measure(self, contender: Contender, n_sequences: int) -> Measured:
        n_steps, phase = min(self._plan.steps, contender.most_steps), self._phases.phase
        with ExitStack() as stack:
            with phase(f"{contender.name}: KV"):
                self._clock.give_back()
                run = stack.enter_context(contender.open(self._plan.case(n_sequences)))
            self._fed = self._ids[0, :n_sequences]
            with phase(f"{contender.name}: warm-up"):
                for _ in range(min(WARM_UP, contender.most_steps)):
                    self._go_on(run)
            run.start()
            self._clock.start_peak()
            with phase(f"{contender.name}: timing"):
                step = self._clock.wall(lambda: self._go_on(run), n_steps)
            peak = self._clock.peak_bytes()
            touched = run.step_bytes(n_steps)
            kernels = self._kernels(contender.name, run)
            floor_s = touched.floor_s(self._ceilings, contender.tier)
            return Measured(
                contender.name, n_sequences, step, touched, floor_s, run.kv_bytes, peak, run.told(), kernels
            )

    def _kernels(self, name: str, run: Run) -> tuple[Kernel, ...]:
        if not self._plan.n_kernels:
            return ()
        with self._phases.phase(f"{name}: kernels"):
            return kernels_of(lambda: self._go_on(run), self._clock, self._plan.n_kernels)

    def _go_on(self, run: Run) -> None:
        self._fed = run.step(self._fed).argmax(-1, keepdim=True)
