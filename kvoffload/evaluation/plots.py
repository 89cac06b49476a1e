"""The pictures of a sweep. matplotlib (extra ``plot``) is imported when one is drawn."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvoffload.errors import UsageError
from kvoffload.evaluation.cells import DENSE
from kvoffload.evaluation.entropy import EntropyBin
from kvoffload.evaluation.summary import Row
from kvoffload.evaluation.tasks.base import Metric

_N_METRICS = 3
_STYLES = ("-o", "--s", "-.^", ":D")


def check_plots() -> None:
    """Raises UsageError if nothing can be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'kvoffload[plot]', or give --no-plots")


def draw_sweep(file: Path, rows: Sequence[Row], metrics: Sequence[Metric]) -> None:
    """Every metric (the first three) against the charged share: a column a context, a line a method."""
    contexts = sorted({row.context for row in rows})
    shown = [metric for metric in metrics if any(row.metric == metric.name for row in rows)][:_N_METRICS]
    if not shown:
        return
    figure = _figure(len(contexts), len(shown))
    axes = figure.subplots(len(shown), len(contexts), squeeze=False)
    methods = list(dict.fromkeys(row.method for row in rows if row.method != DENSE))
    for line, metric in zip(axes, shown, strict=True):
        for ax, context in zip(line, contexts, strict=True):
            _draw_metric(ax, [r for r in rows if (r.context, r.metric) == (context, metric.name)], methods, metric)
            ax.set_title(f"{context:,} tokens")
    _save(figure, file)


def draw_entropy(file: Path, bins: Sequence[EntropyBin]) -> None:
    """What completion gains (error without it by error with it) against the heads' entropy, a line a method."""
    methods = list(dict.fromkeys(one.method for one in bins))
    figure = _figure(1, 1)
    ax = figure.subplots()
    for number, method in enumerate(methods):
        mine = [one for one in bins if one.method == method]
        style = _STYLES[number // 10 % len(_STYLES)]
        ax.plot([b.entropy for b in mine], [b.gain for b in mine], style, label=method, markersize=4)
    ax.axhline(1.0, color="black", linewidth=0.8)
    _log_axis(ax, "y")
    ax.set_xlabel("entropy of the head's attention [nats]")
    ax.set_ylabel("error without / with completion")
    _save(figure, file)


def _draw_metric(ax: Any, rows: Sequence[Row], methods: Sequence[str], metric: Metric) -> None:
    for number, method in enumerate(methods):
        mine = sorted((r for r in rows if r.method == method and r.charged_share), key=lambda r: r.charged_share or 0.0)
        if mine:
            x, y = [100 * (r.charged_share or 0.0) for r in mine], [r.value for r in mine]
            style = _STYLES[number // 10 % len(_STYLES)]
            ax.errorbar(x, y, [r.stderr or 0.0 for r in mine], fmt=style, color=f"C{number % 10}", label=method,
                        markersize=4, linewidth=1.2, elinewidth=0.6)  # fmt: skip
    for row in rows:
        if row.method == DENSE:
            ax.axhline(row.value, color="black", linewidth=0.8, label=DENSE)
    _log_axis(ax, "x")
    if metric.lower_is_better and all(row.value > 0 for row in rows):
        _log_axis(ax, "y")
    ax.set_xlabel("charged [% of the context]")
    ax.set_ylabel(metric.name)


def _log_axis(ax: Any, which: str) -> None:
    """Logarithmic, with 1, 2 and 5 of every decade written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(ax, f"set_{which}scale")("log", nonpositive="clip")
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(n_columns: int, n_lines: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(max(4.2 * n_columns, 7.0), 3.4 * n_lines), layout="constrained")


def _save(figure: Any, file: Path) -> None:
    """With one legend below the axes for all of them."""
    labels: dict[str, Any] = {}
    for ax in figure.axes:
        labels |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    longest = max((len(label) for label in labels), default=1)
    n_columns = int(np.clip(figure.get_figwidth() * 14 / (longest + 6), 1, 5))
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=n_columns, fontsize=7)
    figure.savefig(file, dpi=150)
