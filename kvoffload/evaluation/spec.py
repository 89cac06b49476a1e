"""What a sweep is told, merged from a TOML file and flags and checked before anything loads."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvoffload.config import BudgetField, explain, parse_variant, variants
from kvoffload.errors import UsageError
from kvoffload.evaluation.methods import COMMON, Method, cross, parse_settings, split_list
from kvoffload.evaluation.tasks import TaskConfig
from kvoffload.settings import read_toml
from kvoffload.units import parse_count

TASKS = variants(TaskConfig)
TASK_FLAGS = ("text", "texts", "positions", "batch", "seed")
"""Top-level names that are fields of the task."""


def _listed(value: Any) -> Any:
    return split_list(value) if isinstance(value, str) else value


def _settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = [f"{name}={_plain(setting)}" for name, setting in value.items()]
    return parse_settings(value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Budgets = Annotated[tuple[BudgetField, ...], BeforeValidator(_listed)]
Contexts = Annotated[
    tuple[Annotated[int, BeforeValidator(parse_count)], ...], BeforeValidator(_listed), Field(min_length=1)
]


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of ``count`` of the work."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(value: Any) -> "Shard":
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{value!r} is not a part of the work such as 1/4")
        return Shard(int(match[1]), int(match[2]))


class SweepSpec(BaseModel):
    """One model, one task, and the cells: methods x budgets at every context. Methods are those named and the cross
    product of selectors and completions (and pools)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    task: TaskConfig
    contexts: Contexts
    budgets: Annotated[Budgets, Field(min_length=1)]
    baseline_budgets: Budgets = ()
    methods: Names = ()
    selectors: Names = ()
    completions: Names = ()
    pools: Names = ()
    policies: Names = ()
    baseline: str = "bounds/none"
    offload: str = "cpu"
    page_size: int = 16
    sinks: int = 16
    recent: int = 64
    dtype: str = "auto"
    device: str = "auto"
    set: Annotated[dict[str, Any], BeforeValidator(_settings)] = Field(default_factory=dict)
    out: Path
    shard: Annotated[Shard, BeforeValidator(Shard.parse)] = Shard()
    plots: bool = True

    @property
    def common(self) -> dict[str, Any]:
        """The RuntimeConfig fields of every cell."""
        return {name: getattr(self, name) for name in COMMON}

    @cached_property
    def compared(self) -> tuple[Method, ...]:
        """The methods, each once."""
        if bool(self.selectors) != bool(self.completions):
            raise UsageError("selectors and completions are combined: give both, or --methods")
        for several, one, given in (("pools", "pool", self.pools), ("policies", "policy", self.policies)):
            if given and not self.selectors:
                raise UsageError(
                    f"{several} are combined with selectors and completions: write @{one}= behind a method instead"
                )
        names = [*self.methods, *cross(self.selectors, self.completions, self.pools, self.policies)]
        if not names:
            raise UsageError("nothing to compare: give --selectors and --completions, or --methods")
        methods = [Method.parse(name).with_settings(self.set) for name in names]
        return tuple({method.name: method for method in methods}.values())

    @cached_property
    def baseline_method(self) -> Method:
        return Method.parse(self.baseline).with_settings(self.set)

    def budgets_of(self, method: Method) -> tuple[str, ...]:
        """The budgets of a method; selection-only ones also run at ``baseline_budgets``, so that their curve reaches
        what others are charged. Those with a policy or a page cache do not."""
        is_plain = method.completion == "none" and not method.fields.keys() & {"policy", "gpu_cache"}
        extra = self.baseline_budgets if is_plain else ()
        return tuple(dict.fromkeys(str(budget) for budget in (*self.budgets, *extra)))

    def check(self) -> None:
        """Raises UsageError for everything that can be refused without a tokenizer."""
        for method in self.compared:
            for budget in self.budgets_of(method):
                config = method.config(budget, self.common)
                if any(policy.build().freezing is not None for policy in config.policy):
                    raise UsageError(f"method {method.name!r}: freeze_from changes the prefill, which all cells share")
        self.baseline_method.config(str(self.budgets[0]), self.common)
        self.task.check(self.contexts)


def load_spec(flags: Mapping[str, Any], config_file: Path | None) -> SweepSpec:
    """Flags go before the file's values; the task's own fields may stand beside it. Raises UsageError in one line."""
    given = {**(read_toml(config_file) if config_file else {}), **flags}
    task = {name: given.pop(name) for name in TASK_FLAGS if name in given}
    given["task"] = _task(given.get("task"), task)
    missing = [f"--{name}" for name in ("model", "contexts", "budgets", "out") if name not in given]
    if missing:
        raise UsageError(f"a sweep needs {', '.join(missing)}")
    try:
        spec = SweepSpec(**given)
    except ValidationError as error:
        raise UsageError(explain(error, [*SweepSpec.model_fields, *TASK_FLAGS])) from None
    spec.check()
    return spec


def _task(value: Any, beside: dict[str, Any]) -> dict[str, Any]:
    """The task's fields, from its spelling or table and what stands beside it."""
    try:
        fields = parse_variant(value) if isinstance(value, str) else dict(value or {})
    except ValueError as error:
        raise UsageError(f"task: {error}") from None
    kind = fields.get("kind")
    if kind is None:
        raise UsageError(f"task: missing; give --task or task = in the file, one of {', '.join(TASKS)}")
    if kind not in TASKS:
        raise UsageError(f"task: {str(kind)!r} is unknown; accepted: {', '.join(TASKS)}")
    known = TASKS[kind].model_fields
    for name in [*fields, *beside]:
        if name not in known:
            raise UsageError(f"{name}: the task {kind!r} has no such field; accepted: {', '.join(known)}")
    text = beside.get("text")
    if text is not None:
        beside["text"] = [text] if isinstance(text, (str, Path)) else text
    return {**fields, **beside}
