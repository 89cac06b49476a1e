"""What ``kvoffload eval`` does, from what the command line gave to an exit code.

Settings, names of tasks and data sets are checked before any weights load.
"""

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from pydantic import BeforeValidator, Field
from rich.console import Console

from kvoffload.errors import UsageError
from kvoffload.evaluation.methods import split_list
from kvoffload.models.catalog import ModelSource, load_config, load_model, load_tokenizer, localize, pick_dtype
from kvoffload.runtime.command import check_machine, settled
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.terminal import ProgressView, write_json
from kvoffload.settings import Settings, load_settings_of
from kvoffload.units import parse_count

if TYPE_CHECKING:
    from kvoffload.harness.tasks import CheckedTasks


def _listed(value: Any) -> Any:
    return split_list(value) if isinstance(value, str) else value


class EvalSettings(Settings):
    """What the command line can be told, and what only lm-eval needs."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    include: tuple[Path, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    fewshot: int | None = Field(default=None, ge=0)
    contexts: Annotated[tuple[Annotated[int, BeforeValidator(parse_count)], ...], BeforeValidator(_listed)] = (4096,)
    batch_size: int = Field(default=8, ge=1)
    max_length: Annotated[int, BeforeValidator(parse_count)] | None = None
    apply_chat_template: bool = False
    out: Path | None = None


def run_eval(given: Mapping[str, Any], config: Path | None, out: TextIO, console: Console) -> int:
    """Evaluate, print lm-eval's table (or one JSON object), and keep everything in --out."""
    settings = load_settings_of(EvalSettings, given, config)
    if not settings.tasks:
        raise UsageError("tasks: name some with --tasks, as in ruler,longbench")
    settings = settled(settings)
    if find_spec("lm_eval") is None:
        raise UsageError("eval needs lm-eval: pip install 'kvoffload[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default of every task
    view = ProgressView(console, quiet=settings.quiet)
    source, device = check_machine(settings, view)
    with view.showing():
        tokenizer = load_tokenizer(source, view.load)
        known = task_manager(settings, source)
        known.load(settings.tasks)
        dtype = pick_dtype(settings.dtype, load_config(source), device)
        loaded = load_model(source, dtype=dtype, device=device, tokenizer=tokenizer, on_progress=view.load)
    results = evaluate(Runtime(loaded, settings.runtime()), settings, known)
    if settings.out is not None:
        settings.out.write_text(json.dumps(results, default=str) + "\n", encoding="utf-8")
    told = {name: value for name, value in results.items() if name != "samples"}
    if settings.output == "json":
        write_json(out, json.loads(json.dumps(told, default=str)))
    else:
        out.write(table(results))
    return 0


def task_manager(settings: EvalSettings, source: ModelSource) -> "CheckedTasks":
    """Where tasks are looked up; what RULER makes its samples with is the model's own tokenizer."""
    from kvoffload.harness.tasks import CheckedTasks

    for folder in settings.include:
        if not folder.is_dir():
            raise UsageError(f"include: {str(folder)!r} is not a folder with .yaml files")
    source = localize(source)
    metadata = {"pretrained": str(source.path or source.name), "max_seq_lengths": list(settings.contexts)}
    return CheckedTasks(include_path=[str(folder) for folder in settings.include], metadata=metadata)


def evaluate(runtime: Runtime, settings: EvalSettings, known: "CheckedTasks") -> dict[str, Any]:
    """lm-eval's results, with what the runtime read beside them."""
    from lm_eval import simple_evaluate

    from kvoffload.harness.model import KvoffloadLM

    model = KvoffloadLM(runtime=runtime, batch_size=settings.batch_size, max_length=settings.max_length)
    results = simple_evaluate(
        model, tasks=list(settings.tasks), num_fewshot=settings.fewshot, limit=settings.limit, task_manager=known,
        apply_chat_template=settings.apply_chat_template, batch_size=settings.batch_size, log_samples=True,
    )  # fmt: skip
    assert results is not None, "this process is the only one"
    return {**results, "kvoffload": model.costs()}


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's own table, and a line on what was read."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    costs = {name: share for name, share in results["kvoffload"].items() if share is not None}
    parts += [", ".join(f"{name.removesuffix('_share')} {share:.1%} of the context" for name, share in costs.items())]
    return "\n".join(parts) + "\n"
