"""What a calibration can be told, checked at the border."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from kvoffload.calibration.capture import query_runs
from kvoffload.calibration.examples import n_pages_at
from kvoffload.completion.feature_maps import Family
from kvoffload.config import BudgetField, RuntimeConfig, Size, explain
from kvoffload.errors import UsageError
from kvoffload.units import Budget, parse_count

_MIN_PAGES = 4


def _words(value: Any) -> Any:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


Budgets = Annotated[tuple[BudgetField, ...], BeforeValidator(_words), Field(min_length=1)]


class CalibrationOptions(BaseModel):
    """``sequences`` of ``context`` tokens, the last eighth held out (offsets are chosen on as many before it), with
    ``queries`` positions each; what is read is selected under every one of ``budgets``. The rest is for learned maps:
    ``key_maps`` of each kv head's keys are shared by its query heads or made for each, ``rate`` is Adam's first
    learning rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Annotated[int, BeforeValidator(parse_count)] = 4096
    sequences: int = Field(default=16, ge=2)
    queries: int = Field(default=64, ge=1)
    budgets: Budgets = (Budget.parse("1%"), Budget.parse("2%"), Budget.parse("5%"))
    features: int = Field(default=64, ge=2, le=65536)
    family: Family = "exp"
    key_maps: Literal["shared", "each"] = "shared"
    steps: int = Field(default=300, ge=1)
    rate: float = Field(default=0.02, gt=0, lt=10)
    seed: int = Field(default=0, ge=0, lt=2**63)
    host_max: Annotated[Size, PlainSerializer(int)] = 8 << 30

    @model_validator(mode="after")
    def _whole_projections(self) -> "CalibrationOptions":
        if self.family == "hedgehog" and self.features % 2:
            raise ValueError(f"features: {self.features} is odd, and hedgehog makes two features of each projection")
        return self

    @property
    def n_held_out(self) -> int:
        """Sequences that nothing is learned from; figures are theirs."""
        return max(self.sequences // 8, 1)

    def check(self, config: RuntimeConfig, max_context: int) -> None:
        """Raises UsageError for a context that is longer than the model's or that leaves no pages to speak of."""
        first = int(query_runs(self.context, self.queries)[0, 0])
        self._check(first + 1, f"the {self.queries} queries", config, max_context)

    def check_by_layer(self, config: RuntimeConfig, max_context: int) -> None:
        """The same where budgets are measured by layer, on the last two pages."""
        self._check(self.context - 2 * config.page_size, "the last two pages", config, max_context)

    def _check(self, n_before: int, tried: str, config: RuntimeConfig, max_context: int) -> None:
        if self.context > max_context:
            raise UsageError(f"context: {self.context} is beyond the model's {max_context} tokens")
        n_pages = n_pages_at(n_before, config)
        if n_pages < _MIN_PAGES:
            raise UsageError(
                f"context: {self.context} tokens leave {n_pages} pages of {config.page_size} between {config.sinks} "
                f"sinks and the window before {tried}; at least {_MIN_PAGES} are needed"
            )

    def identity(self) -> dict[str, int | float | str]:
        """The options that decide what is learned, as plain values."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude={"host_max", "budgets"})
        return values | {"budgets": ",".join(str(budget) for budget in self.budgets)}


def parse_options(*layers: dict[str, Any]) -> CalibrationOptions:
    """Options from those values that are theirs, later layers before earlier ones; raises UsageError in one line."""
    names = CalibrationOptions.model_fields
    fields = {name: value for given in layers for name, value in given.items() if name in names and value is not None}
    try:
        return CalibrationOptions(**fields)
    except ValidationError as error:
        raise UsageError(explain(error, CalibrationOptions.model_fields)) from None
