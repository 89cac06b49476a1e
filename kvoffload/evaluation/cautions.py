"""What a sweep's reader has to know before its figures: what is not compared, and what reads less than it seems."""

from collections.abc import Collection, Iterator, Sequence

from kvoffload.cache.anchors import sealed_pages
from kvoffload.evaluation.cells import DENSE
from kvoffload.evaluation.spec import SweepSpec
from kvoffload.evaluation.summary import CellResult
from kvoffload.units import Budget

_MUCH_LESS = 0.9  # of a budget


def cautions(spec: SweepSpec, methods: Collection[str]) -> list[str]:
    """What is seen without measuring; ``methods`` are the names of those that are compared or on disk."""
    told = []
    if (baseline := spec.baseline_method.name) not in methods:
        told.append(f"baseline {baseline!r} is not among the methods: nothing is compared with it")
    for budget in dict.fromkeys([*spec.budgets, *spec.baseline_budgets]):
        if budget.amount == 0:
            told.append(f"budget {budget} reads no page: what is measured is the anchors and the completion alone")
    for context in spec.contexts:
        if not _seals(spec, context):
            told.append(f"a context of {context:,} tokens fits into the {spec.sinks} sinks and {spec.recent} recent "
                        "tokens: no page is sealed when the first step begins")  # fmt: skip
    return told


def small_reads(spec: SweepSpec, cells: Sequence[CellResult]) -> Iterator[str]:
    """One sentence on the budgets of which even the cell that reads most reads much less, if there are any."""
    most: dict[tuple[int, str], float] = {}
    for cell in cells:
        if cell.method != DENSE and _seals(spec, cell.context):
            place = cell.context, cell.budget
            most[place] = max(most.get(place, 0.0), cell.read_share)
    told = [
        f"{budget} reads {share:.2%} at {context:,} tokens"
        for (context, budget), share in most.items()
        if share < _MUCH_LESS * _asked(budget, context)
    ]
    if told:
        yield f"a budget buys whole pages outside the anchors, so that {', '.join(told)}"


def _asked(budget: str, context: int) -> float:
    """The share of the context that a budget is; 0 for one in bytes, which depends on the model."""
    parsed = Budget.parse(budget)
    return 0.0 if parsed.unit == "bytes" else parsed.tokens(context, token_bytes=1, n_heads_total=1) / context


def _seals(spec: SweepSpec, context: int) -> bool:
    return sealed_pages(context, sinks=spec.sinks, recent=spec.recent, page_size=spec.page_size) > 0
