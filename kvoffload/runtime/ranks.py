"""What several ranks of one model change for a runtime: settings for all become settings of one, and statistics of each
become those of all."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.models.parallel import Ranks
from kvoffload.runtime.stats import Stats
from kvoffload.units import Budget

if TYPE_CHECKING:
    from kvoffload.runtime.session import Session

_SUMS = frozenset(
    {
        "bytes_read",
        "decode_bytes_read",
        "refresh_bytes_read",
        "bytes_written",
        "resident_bytes",
        "index_host_bytes",
        "clamped_entries",
    }
)
_SAME = frozenset(
    {"prompt_tokens", "new_tokens", "restored_tokens", "computed_tokens", "max_dropped_mass", "graph_steps", "compiled"}
)
_LARGEST = frozenset({"ttft_s", "tpot_ms", "disk_wait_ms", "recomputed_pages"})


def rank_config(config: RuntimeConfig, ranks: Ranks) -> RuntimeConfig:
    """One rank's part of what was set for all: an equal part of budgets and caps in bytes (the page cache's is each
    device's own), and a folder of its own. Raises UsageError for what needs all heads or layers in one process."""
    if not ranks.several:
        return config
    _check(config, ranks)
    part: dict[str, Any] = {"dropped_mass_cap": rank_budget(config.dropped_mass_cap, ranks)}
    if config.budget is not None:
        part["budget"] = rank_budget(config.budget, ranks)
    part |= {n: size // ranks.count for n in ("nvme_max", "cpu_max") if (size := getattr(config, n)) is not None}
    if config.nvme_dir is not None:
        part["nvme_dir"] = config.nvme_dir / f"rank-{ranks.rank}"
    return config.model_copy(update=part)


def replays(config: RuntimeConfig, ranks: Ranks) -> bool:
    """Whether steps are replayed. Heads on several ranks only where it was asked for: a replay then holds the sums of
    all layers, in which ranks wait for each other."""
    return config.replays_steps and (not ranks.several or (config.cuda_graph == "on" and ranks.pp_size == 1))


def rank_budget(budget: Budget, ranks: Ranks) -> Budget:
    """One rank's part: of bytes an equal share, while tokens and percent are those of each kv head anyway."""
    return replace(budget, amount=budget.amount / ranks.count) if budget.unit == "bytes" else budget


def with_rank_budget(config: RuntimeConfig, budget: str | int | Budget, ranks: Ranks) -> RuntimeConfig:
    """One rank's configuration with its part of another budget; raises UsageError for what is none."""
    given = config.with_budget(budget)
    return given.with_budget(rank_budget(given.effective_budget, ranks))


def refuse_files(ranks: Ranks) -> None:
    """Raise UsageError where a session file is wanted and several ranks have the KV."""
    if ranks.several:
        raise UsageError("session: a file holds the KV of all heads and layers, and every rank has some of them: save "
                         "and restore in one process")  # fmt: skip


def _check(config: RuntimeConfig, ranks: Ranks) -> None:
    if any(completion.calibration is not None for completion in config.completion):
        raise UsageError("completion: calibration files are for all heads of a model, and every rank has some of them")
    policies = [policy.build() for policy in config.policy]
    if any(p.n_revised or p.max_dense or p.freezing is not None for p in policies):
        raise UsageError("policy: several ranks cannot compute tokens anew or freeze them: leave retro, resa and "
                         "freeze_from out")  # fmt: skip
    if ranks.pp_size > 1 and (policies or config.layer_budgets is not None):
        raise UsageError("policy, layer_budgets: these look at all layers, and pipeline stages have some of them each")


def all_stats(session: "Session") -> Stats:
    """What moved so far on all ranks; all of them have to ask. The same as ``session.stats`` where there is one."""
    weight = sum(layer.geometry.rows for layer in session.cache.offloaded)
    told = session.ranks.all((session.stats(), weight))
    return merge_stats([stats for stats, _ in told], [weight for _, weight in told])


def merge_stats(parts: Sequence[Stats], weights: Sequence[float]) -> Stats:
    """Statistics of all ranks from those of each; ``weights`` say how many layers and kv heads each has."""
    return Stats(**{field.name: _merged(field.name, parts, weights) for field in fields(Stats)})


def _merged(name: str, parts: Sequence[Stats], weights: Sequence[float]) -> Any:
    values = [getattr(part, name) for part in parts]
    if name in _SAME or any(value is None for value in values):
        return values[0]
    if name in _LARGEST:
        return max(values)
    if name not in _SUMS:
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    if isinstance(values[0], dict):
        return {key: sum(value[key] for value in values) for key in values[0]}
    return sum(values)
