"""What a sweep compares: methods, spelled ``selector/completion@field=value``.

``quantized:bits=4/anchored`` is a selector and a completion with their options; candidates of a gate are joined by
``+``; every ``@field=value`` behind them sets one more field of RuntimeConfig, and ``@field`` alone sets it to true:
``quantized/anchored+pages@gate@gate_margin=0.1``. In a list, methods are separated by ``;`` or by a comma, unless
``name=`` follows it (then the comma is one between options).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from kvoffload.config import RuntimeConfig, explain
from kvoffload.errors import UsageError

_SEPARATOR = re.compile(r";|,(?!\s*\w+\s*=)")
COMMON = frozenset({"offload", "page_size", "sinks", "recent", "dtype", "device"})
"""Fields that are the same for a whole sweep: a prefill is taken over by every cell."""
_NOT_IN_METHODS = COMMON | {"budget", "selector", "completion"}


@dataclass(frozen=True)
class Method:
    """A way to read, as it was spelled, and the RuntimeConfig fields that it sets."""

    name: str
    selector: str
    completion: str
    fields: Mapping[str, Any]

    @staticmethod
    def parse(text: str) -> "Method":
        """Raises UsageError for what is not spelled as the module says; kinds and options are checked later."""
        policy, *settings = re.sub(r"\s+", "", text).split("@")
        selector, slash, completion = policy.partition("/")
        if not (selector and slash and completion):
            raise UsageError(f"method {text!r} is not spelled selector/completion, as in quantized/anchored@gate")
        fields = parse_settings(settings)
        name = "@".join([policy, *(_spell(*item) for item in sorted(fields.items()))])
        return Method(name, selector, completion, {"selector": selector, "completion": completion, **fields})

    def with_settings(self, settings: Mapping[str, Any]) -> "Method":
        """With fields beside its own, which go before them."""
        extra = {name: value for name, value in settings.items() if name not in self.fields}
        fields = {**self.fields, **extra}
        spelled = sorted((name, value) for name, value in fields.items() if name not in ("selector", "completion"))
        policy = f"{self.selector}/{self.completion}"
        return Method("@".join([policy, *(_spell(*s) for s in spelled)]), self.selector, self.completion, fields)

    def config(self, budget: str, common: Mapping[str, Any]) -> RuntimeConfig:
        """What its cell at this budget runs; raises UsageError that names the method."""
        fields: dict[str, Any] = {**common, **self.fields, "budget": budget}
        try:
            return RuntimeConfig(**fields)
        except ValidationError as error:
            raise UsageError(f"method {self.name!r}: {explain(error, RuntimeConfig.model_fields)}") from None


def cross(
    selectors: Sequence[str], completions: Sequence[str], pools: Sequence[str], policies: Sequence[str] = ()
) -> list[str]:
    """Every selector with every completion, and with every pool and policy where there are any."""
    names = [f"{selector}/{completion}" for selector, completion in product(selectors, completions)]
    names = [f"{name}@pool={pool}" for name, pool in product(names, pools)] if pools else names
    named = ["" if policy == "none" else f"@policy={policy}" for policy in policies] or [""]
    return [name + policy for policy, name in product(named, names)]


def split_list(text: str) -> list[str]:
    """``"bounds,quantized:bits=4,group=64;mean"`` -> three items; empty ones are left out."""
    return [item.strip() for item in _SEPARATOR.split(text) if item.strip()]


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """``["gate", "pool=none"]`` -> ``{"gate": True, "pool": "none"}``; raises UsageError for fields that a method
    cannot have for itself."""
    fields: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if name not in RuntimeConfig.model_fields or name in _NOT_IN_METHODS:
            accepted = ", ".join(field for field in RuntimeConfig.model_fields if field not in _NOT_IN_METHODS)
            raise UsageError(f"setting {item!r} cannot be given here; accepted names: {accepted}")
        fields[name] = value if equals else True
    return fields


def _spell(name: str, value: Any) -> str:
    return name if value is True else f"{name}={value}"
