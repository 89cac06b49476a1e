"""What a runtime and a generation can be told, checked at the border; unknown names are refused with the accepted ones.

A variant is spelled ``quantized`` or ``quantized:bits=4,group=64``; several completions are joined by ``+``, so that
options keep the comma. Everything in here is frozen, and nothing of it is looked at per step except through ``build``.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from kvoffload.completion import CompletionConfig
from kvoffload.completion.calibrated import CalibrationFile
from kvoffload.errors import UsageError
from kvoffload.layer_budgets import layer_shares, read_layer_budgets
from kvoffload.policies import PolicyConfig
from kvoffload.selection import SelectorConfig
from kvoffload.units import Budget, parse_page_size, parse_size

_MIN_TEMPERATURE = 0.01  # logits divided by less leave the range of fp32


def variants(union: Any) -> dict[str, type[BaseModel]]:
    """Kind -> config class of a discriminated union."""
    return {cls.model_fields["kind"].default: cls for cls in get_args(get_args(union)[0])}


VARIANTS = {"selector": variants(SelectorConfig), "completion": variants(CompletionConfig)}
POLICIES = variants(PolicyConfig)
_KINDS = {**VARIANTS, "policy": POLICIES}


def pairs() -> list[tuple[str, str]]:
    """Every kind of selector with every kind of completion that can work with it."""
    return [
        (selector, completion)
        for selector, chosen in VARIANTS["selector"].items()
        for completion, rest in VARIANTS["completion"].items()
        if getattr(chosen, "has_index", False) or not getattr(rest, "needs_index", False)
    ]


def parse_variant(text: str) -> dict[str, Any]:
    """``"quantized:bits=4,group=64"`` -> ``{"kind": "quantized", "bits": 4, "group": 64}``."""
    kind, _, options = text.strip().partition(":")
    fields: dict[str, Any] = {"kind": kind.strip()}
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{option!r} in {text!r} is not an option: write name=value, as in quantized:bits=4")
        fields[name.strip()] = _number_or_text(value.strip())
    return fields


def _number_or_text(text: str) -> int | float | str:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", text, re.IGNORECASE):
        return float(text)
    return text


def _variant(value: Any) -> Any:
    return parse_variant(value) if isinstance(value, str) else value


def _policies(value: Any) -> Any:
    return () if value == "none" else _several(value)


def _several(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(parse_variant(part) for part in value.split("+"))
    return value if isinstance(value, (list, tuple)) else (value,)


def _word_for_none(word: str) -> tuple[BeforeValidator, PlainSerializer]:
    """Reads and writes None as a word, since TOML and flags have no None."""
    return (
        BeforeValidator(lambda value: None if value == word else value),
        PlainSerializer(lambda value: word if value is None else value, when_used="json"),
    )


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(parse_size)]
OptionalSize = Annotated[Size | None, *_word_for_none("off")]
OptionalCount = Annotated[Annotated[int, Field(ge=1)] | None, *_word_for_none("auto")]
OptionalSteps = Annotated[Annotated[int, Field(ge=16)] | None, *_word_for_none("off")]
PageSize = Annotated[
    int, Field(le=256), BeforeValidator(parse_page_size), PlainSerializer(lambda n: n or "auto", when_used="json")
]
BudgetField = Annotated[Budget, BeforeValidator(Budget.parse), PlainSerializer(str)]
SelectorField = Annotated[SelectorConfig, BeforeValidator(_variant)]
CompletionsField = Annotated[
    tuple[Annotated[CompletionConfig, BeforeValidator(_variant)], ...], BeforeValidator(_several), Field(min_length=1)
]
PoliciesField = Annotated[
    tuple[Annotated[PolicyConfig, BeforeValidator(_variant)], ...],
    BeforeValidator(_policies),
    PlainSerializer(lambda value: [p.model_dump(mode="json") for p in value] or "none", when_used="json"),
]
OptionalShare = Annotated[Annotated[float, Field(gt=0, lt=1)] | None, *_word_for_none("off")]


def _fitting_completion(given: dict[str, Any]) -> str:
    """What completes best with a selector: from its index, if it has one."""
    return "regression" if getattr(given.get("selector"), "has_index", False) else "anchored"


class RuntimeConfig(BaseModel):
    """Where the KV lives, what a step reads of it and what stands for the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    offload: Literal["none", "cpu", "nvme"] = "cpu"
    nvme_dir: Path | None = None
    nvme_max: Size | None = None
    nvme_floor: Size = 256 << 20
    cpu_max: Size | None = None
    budget: BudgetField | None = None
    selector: SelectorField = Field(default="transform", validate_default=True)
    completion: CompletionsField = Field(default_factory=_fitting_completion, validate_default=True)
    policy: PoliciesField = ()
    max_dropped_mass: OptionalShare = None
    dropped_mass_cap: BudgetField = Field(default="25%", validate_default=True)
    dropped_mass_misses: OptionalShare = None
    audit: Annotated[Annotated[int, Field(ge=1)] | None, *_word_for_none("off")] = None
    gate: bool = False
    gate_queries: int = Field(default=64, ge=1, le=256)
    gate_margin: float = Field(default=0.0, ge=0.0, lt=1.0)
    gate_recheck: OptionalSteps = None
    reanchor: OptionalSteps = 1024
    pool: Literal["layer", "none"] = "layer"
    head_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    head_cap: Annotated[Annotated[float, Field(ge=1)] | None, *_word_for_none("off")] = None
    layer_budgets: Path | None = None
    sinks: int = Field(default=16, ge=0)
    recent: int = Field(default=64, ge=1)
    page_size: PageSize = 16
    prefill_chunk: OptionalCount = None
    index: Literal["device", "cpu"] = "device"
    gpu_cache: OptionalSize = None
    prefetch: float = Field(default=0.0, ge=0.0, le=4.0)
    look_ahead: bool = False
    fetch: Literal["wait", "deadline"] = "wait"
    fetch_ms: float = Field(default=1.0, ge=0.0, le=1000.0)
    io_engine: Literal["threads", "aio", "aiofiles", "uring", "gds"] = "threads"
    direct: Literal["auto", "on", "off"] = "auto"
    verify: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    pp_size: int = Field(default=1, ge=1)
    self_test: bool = True
    strict_context: bool = False
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"

    def for_long(self) -> "RuntimeConfig":
        """The same for a process that decodes long enough to earn what compiling costs: there auto is on."""
        return self.model_copy(update={"compile": "on"}) if self.compile == "auto" else self

    @model_validator(mode="after")
    def _check_together(self) -> "RuntimeConfig":
        kinds = tuple(config.kind for config in self.policy)
        for i, config in enumerate(self.policy):
            if config.kind in kinds[:i]:
                raise ValueError(f"policy: {config.kind!r} is given twice")
            config.check(recent=self.recent, kinds=kinds[:i] + kinds[i + 1 :])
        if self.page_size < 0 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size: {self.page_size} is not a power of two from 1 to 256")
        if len(self.completion) > 1 and not self.gate:
            names = "+".join(config.kind for config in self.completion)
            raise ValueError(f"completion: {names!r} is more than one; give one, or let --gate choose")
        if self.fetch == "deadline" and (self.offload != "nvme" or self.cpu_max is None or self.gpu_cache is not None):
            raise ValueError(
                "fetch: 'deadline' needs a tier that late pages come to: give --offload nvme and --cpu-max, and no "
                "--gpu-cache"
            )
        if self.prefetch and (self.offload != "nvme" or self.cpu_max is None):
            raise ValueError(f"prefetch: {self.prefetch} has nowhere to put pages: give --offload nvme and --cpu-max")
        if self.look_ahead and (self.policy or self.max_dropped_mass is not None or self.prefetch):
            raise ValueError("look_ahead: chooses pages itself: give no --policy, --max-dropped-mass or --prefetch")
        if self.max_dropped_mass is not None and (self.gate or self.completion[0].kind == "none"):
            raise ValueError(
                f"max_dropped_mass: {self.max_dropped_mass} needs one completion that estimates the mass of what is "
                "not read, not none and not a gate that may abstain"
            )
        if self.dropped_mass_misses is not None and (self.max_dropped_mass is None or self.audit is None):
            raise ValueError(
                f"dropped_mass_misses: {self.dropped_mass_misses} is learned from audits of a target: give "
                "--max-dropped-mass and --audit too"
            )
        needing = [config.kind for config in self.completion if config.needs_index]
        if needing and not self.selector.has_index:
            having = ", ".join(kind for kind, cls in VARIANTS["selector"].items() if getattr(cls, "has_index", False))
            raise ValueError(
                f"completion: {needing[0]!r} reads a token-level index, which selector {self.selector.kind!r} does not "
                f"have; selectors with one: {having}"
            )
        if self.gate_recheck is not None and not self.gate:
            raise ValueError(f"gate_recheck: {self.gate_recheck} has nothing to check: give --gate too")
        return self

    @field_validator("layer_budgets")
    @classmethod
    def _is_a_calibration(cls, file: Path | None) -> Path | None:
        if file is not None:
            read_layer_budgets(file)
        return file

    @property
    def calibrations(self) -> tuple[CalibrationFile, ...]:
        """The files that fit this configuration to one model."""
        own = () if self.layer_budgets is None else (read_layer_budgets(self.layer_budgets),)
        return own + tuple(found for config in self.completion if (found := config.calibration) is not None)

    @property
    def doubts(self) -> list[str]:
        """What files were calibrated with and this configuration has differently; they can be used all the same."""
        here = {"page_size": self.page_size, "selector": self.selector.model_dump_json()}
        return [
            f"{str(found.path)!r} was calibrated with {name} {was} and is used with {here[name]}"
            for found in self.calibrations
            for name in here
            if (was := found.header.options.get(name, here[name])) != here[name]
        ]

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        return () if self.layer_budgets is None else layer_shares(read_layer_budgets(self.layer_budgets))

    def share(self, layer: int) -> float:
        """The budget of the ``layer``-th offloaded layer, as a multiple of the mean."""
        return self._shares[layer] if self._shares else 1.0

    @property
    def largest_share(self) -> float:
        """The share of the layer that reads most."""
        return max(self._shares, default=1.0)

    def with_budget(self, budget: str | int | Budget) -> "RuntimeConfig":
        """The same with another budget; raises UsageError for what is none."""
        try:
            return self.model_copy(update={"budget": Budget.parse(budget)})
        except ValueError as error:
            raise UsageError(f"budget: {error}") from None

    @property
    def replays_steps(self) -> bool:
        """Whether decode steps are replays of a captured graph, on devices that have such graphs and for models whose
        steps can be captured."""
        waits = self.policy or self.gate or self.audit is not None or self.max_dropped_mass is not None
        fixed = self.selector.holds and all(completion.holds for completion in self.completion)
        whole = self.fetch == "wait" and self.prefetch == 0
        free = self.head_floor == 0 and self.head_cap is None
        on_device = self.index == "device" or self.selector.has_index
        return self.cuda_graph != "off" and fixed and whole and on_device and free and not waits

    @property
    def effective_budget(self) -> Budget:
        """The budget given, or 5% when the KV is offloaded and everything when it is not."""
        return self.budget or Budget.parse("100%" if self.offload == "none" else "5%")


class SamplingConfig(BaseModel):
    """How new tokens are drawn, and when to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)] = ()
    num_beams: int = 1

    @model_validator(mode="after")
    def _usable_temperature(self) -> "SamplingConfig":
        if 0 < self.temperature < _MIN_TEMPERATURE:
            raise ValueError(f"temperature: {self.temperature} is neither 0 nor at least {_MIN_TEMPERATURE}")
        return self

    @model_validator(mode="after")
    def _one_beam(self) -> "SamplingConfig":
        if self.num_beams != 1:
            raise ValueError(f"num_beams: {self.num_beams} is not supported: one sequence is followed, give 1")
        return self


def explain(error: ValidationError, accepted: Iterable[str] = ()) -> str:
    """One line that names every refused value and what was expected; ``accepted`` are the top-level names."""
    told = [d for d in error.errors() if d["type"] != "default_factory_not_called"]  # which follows another one
    return "; ".join(_explain_one(detail, tuple(accepted)) for detail in told)


def _explain_one(detail: ErrorDetails, accepted: tuple[str, ...]) -> str:
    name, context = _dotted(detail["loc"]), detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return f"{name}: {context['error']}" if name else str(context["error"])
        case "union_tag_invalid":
            tag = context["tag"]
            elsewhere = (f"a {other}: give --{other} {tag}" for other, kinds in _KINDS.items() if tag in kinds)
            return f"{name}: {tag!r} is {next(elsewhere, 'unknown')}; accepted: {_plain(context['expected_tags'])}"
        case "union_tag_not_found":
            return f"{name}: {detail['input']!r} names no kind; accepted: {', '.join(_KINDS[name])}"
        case "literal_error":
            return f"{name}: {detail['input']!r} is unknown; accepted: {_plain(context['expected'])}"
        case "extra_forbidden":
            return f"{name}: unknown name; accepted: {', '.join(_siblings(detail['loc'], accepted))}"
    return f"{name}: {detail['input']!r}: {_lower_first(detail['msg'])}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc if isinstance(part, str))


def _siblings(loc: tuple[int | str, ...], accepted: tuple[str, ...]) -> Iterable[str]:
    """The names that could have stood where an unknown one did."""
    names = [part for part in loc if isinstance(part, str)]
    if len(names) == 3 and names[0] in _KINDS:
        return [field for field in _KINDS[names[0]][names[1]].model_fields if field != "kind"] or ["no options"]
    return accepted


def _plain(expected: str) -> str:
    return expected.replace("'", "").replace(" or ", ", ")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
