"""What the commands do, from merged settings to an exit code; the command line itself holds no logic.

Everything that can be refused is refused before any weights load: names, the prompt, and the plan for its length.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import torch
from kvoffload_storage.engines import why_not
from rich.console import Console

from kvoffload.errors import UsageError
from kvoffload.models.catalog import (
    ACCEPTED,
    LoadedModel,
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
    weight_bytes,
)
from kvoffload.models.fingerprint import check_calibrations
from kvoffload.models.parallel import ALONE, Ranks, find_ranks
from kvoffload.runtime.doctor import inspect
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.limits import find_limits
from kvoffload.runtime.page_size import known_read_unit, page_size_hint, settle_page_size
from kvoffload.runtime.plan import Plan, make_plan
from kvoffload.runtime.prompt import prompt_ids, prompt_text
from kvoffload.runtime.ranks import all_stats, rank_config, refuse_files
from kvoffload.runtime.session import Session
from kvoffload.runtime.session_choice import FoundSession, check_unchanged, find_session, has_session, open_session
from kvoffload.runtime.terminal import ProgressView, plan_title, statistics_line, write_json, write_table
from kvoffload.settings import S, Settings, to_toml
from kvoffload.units import AUTO_PAGE, parse_count


@dataclass(frozen=True)
class Job:
    """A generation that was accepted: nothing of it is loaded yet but the tokenizer."""

    source: ModelSource
    tokenizer: Any
    prompt: list[int]
    found: FoundSession | None
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks


def run_generate(settings: Settings, out: TextIO, console: Console) -> int:
    """Generate: text streams to ``out``, or one JSON object is its only line; progress goes to the console. Of several
    ranks only the first is heard."""
    settings, ranks = settled(settings), find_ranks(settings.pp_size)
    if ranks.rank:
        out, console = StringIO(), Console(file=StringIO())
    view = ProgressView(console, quiet=settings.quiet)
    with view.showing():
        job = accept(settings, view, ranks)
        runtime = Runtime(_load(job, view), settings.runtime())
    with open_session(runtime, settings, expected_tokens=job.plan.context) as session:
        check_unchanged(session, settings, job.found)
        with view.showing():
            if job.prompt:
                session.begin_prefill(job.prompt)
                session.prompt_end = len(session.token_ids)
            session.finish_prefill(on_progress=view.prefill)
        for note in session.cache.notes:
            view.say(note)
        text = _stream(session, settings, out)
        if session.autosave is not None:
            session.prompt_end = None
            session.save(session.autosave)
        stats = all_stats(session)
        session.ranks.leave()
    if stats.recomputed_pages:
        view.warn(f"{stats.recomputed_pages:,} lost or damaged pages were computed again from their tokens")
    if stats.dropped_mass_capped:
        view.warn(f"dropped mass target not reached in {stats.dropped_mass_capped:.1%} of heads and steps: raise "
                  "--dropped-mass-cap")  # fmt: skip
    view.say(statistics_line(stats))
    if settings.output == "json":
        config = settings.runtime().model_dump(mode="json") | {"budget": str(settings.effective_budget)}
        config |= settings.sampling().model_dump(mode="json")
        told = {"model": job.source.name, "config": config, "read_unit": known_read_unit(settings)}
        write_json(out, {"text": text, **stats.as_dict(), **told})
    return 0


def run_plan(settings: Settings, context: str | None, batch: int, out: TextIO) -> int:
    """Print what a context needs; raises OutOfRoomError after that if it does not fit."""
    settings = settled(settings)
    source = _source(settings)
    model_config = load_config(source)
    try:
        n_tokens = parse_count(context) if context else max_context(model_config)
    except ValueError as error:
        raise UsageError(f"context: {error}") from None
    plan = _plan(settings, source, model_config, _device(settings), n_tokens, batch, ALONE)
    if settings.output == "json":
        write_json(out, {"model": source.name, **plan.as_dict()})
    else:
        write_table(out, plan_title(source.name, plan), ("what", "where", "size"), plan.rows())
    plan.check()
    return 0


def run_env(required: Iterable[str], nvme_dir: Path | None, out: TextIO, *, as_json: bool) -> int:
    """Print what the machine offers; exit code 1 if something required is missing."""
    report = inspect(required, nvme_dir)
    if as_json:
        write_json(out, report.as_dict())
    else:
        write_table(out, "environment", ("what", "found"), report.rows())
        for name in report.missing:
            out.write(f"missing: {name} ({report.features[name].note})\n")
    return 1 if report.missing else 0


def show_config(settings: Settings, out: TextIO) -> int:
    """Print the merged settings as TOML that ``--config`` takes, or as one JSON object."""
    if settings.output == "json":
        write_json(out, settings.merged())
    else:
        out.write(to_toml(settings.merged()) + "\n")
    return 0


def settled(settings: S) -> S:
    """The same with a number for the page size."""
    if settings.page_size != AUTO_PAGE:
        return settings
    model_config = load_config(_source(settings))
    return settle_page_size(settings, model_config, pick_dtype(settings.dtype, model_config, _device(settings)))


def check_machine(settings: Settings, view: ProgressView, ranks: Ranks = ALONE) -> tuple[ModelSource, torch.device]:
    """The model and the device, after everything that can be checked without weights and prompt; what is only doubtful
    is a warning."""
    source = _source(settings)
    device = ranks.device(settings.device) if ranks.several else pick_device(settings.device)
    if settings.offload == "nvme" and (reason := why_not(settings.io_engine, settings.nvme_dir)):
        raise UsageError(f"io_engine: {settings.io_engine!r} cannot be used here: {reason}")
    model_config = load_config(source)
    ranks.check_model(model_config)
    _plan(settings, source, model_config, device, 1 + settings.max_new_tokens, 1, ranks).check()
    check_calibrations(settings.calibrations, source)
    for doubt in settings.doubts:
        view.warn(doubt)
    if hint := page_size_hint(settings, model_config, pick_dtype(settings.dtype, model_config, device)):
        view.say(hint)
    return source, device


def accept(settings: Settings, view: ProgressView, ranks: Ranks = ALONE) -> Job:
    """Check everything that can be checked without weights; raises UsageError or OutOfRoomError."""
    _source(settings)
    if settings.session is not None:
        refuse_files(ranks)
    text = prompt_text(settings, optional=has_session(settings))
    source, device = check_machine(settings, view, ranks)
    model_config = load_config(source)
    dtype = pick_dtype(settings.dtype, model_config, device)
    found = find_session(settings, source, model_config, dtype, view)
    tokenizer = load_tokenizer(source, view.load)
    prompt = prompt_ids(text, settings, tokenizer) if found is None else found.prompt(text, settings, tokenizer)
    n_before = 0 if found is None else len(found.token_ids)
    check_context(n_before + len(prompt), max_context(model_config), settings, view)
    n_tokens = n_before + len(prompt) + settings.max_new_tokens
    plan = _plan(settings, source, model_config, device, n_tokens, 1, ranks)
    plan.check()
    return Job(source, tokenizer, prompt, found, plan, device, dtype, ranks)


def _source(settings: Settings) -> ModelSource:
    if not settings.model:
        raise UsageError(f"model: give one with --model; {ACCEPTED}")
    return resolve(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def _plan(
    settings: Settings, source: ModelSource, model_config: Any, device: torch.device, context: int, batch: int,
    ranks: Ranks,
) -> Plan:  # fmt: skip
    dtype = pick_dtype(settings.dtype, model_config, device)
    return make_plan(
        model_config,
        rank_config(settings.runtime(), ranks),
        context,
        batch,
        dtype=dtype,
        device=device,
        limits=find_limits(device, settings.nvme_dir, with_disk=settings.offload == "nvme"),
        weight_bytes=weight_bytes(model_config, dtype, trust_remote_code=source.trust_remote_code),
        ranks=ranks,
    )


def max_context(model_config: Any) -> int:
    """Tokens that the model was made for."""
    return int(model_config.get_text_config(decoder=True).max_position_embeddings)


def check_context(n_prompt: int, limit: int, settings: Settings, view: ProgressView) -> None:
    """Warn of a prompt that is longer than the model was made for, or refuse it."""
    if n_prompt <= limit:
        return
    told = f"the prompt has {n_prompt:,} tokens and the model was made for {limit:,} (max_position_embeddings)"
    if settings.strict_context:
        raise UsageError(f"{told}; shorten it or leave --strict-context out")
    view.warn(f"{told}; expect worse text")


def _load(job: Job, view: ProgressView) -> LoadedModel:
    device = "auto" if job.ranks.several else job.device
    options: dict[str, Any] = {"tokenizer": job.tokenizer, "on_progress": view.load, "ranks": job.ranks}
    return load_model(job.source, dtype=job.dtype, device=device, **options)


def _stream(session: Session, settings: Settings, out: TextIO) -> str:
    """Write the pieces as they come, unless they belong into the JSON object; returns the whole text."""
    text, visible = "", settings.output == "text"
    for event in session.stream(settings.sampling()):
        text += event.text
        if visible:
            out.write(event.text)
            out.flush()
    if visible and not text.endswith("\n"):
        out.write("\n")
    return text


def _device(settings: Settings) -> torch.device:
    """Where it would run, whether it is there or not."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
