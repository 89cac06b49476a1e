"""RULER's samples from lm-eval's own generators (extra ``eval``), without anything that they would download.

A file of samples is named after everything that shaped it, so that a machine without lm-eval can use it.
"""

import hashlib
import importlib
import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.samples import Sample, read_samples, write_samples

MIN_CONTEXT = 4096  # lm-eval's shortest length; below it its generators change their form or never end
_NO_LM_EVAL = "RULER's generators come from lm-eval: pip install 'kvoffload[eval]'"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_VT_EXAMPLE_TOKENS = 430  # lm-eval's worked example must fit into 500 tokens, or its generator never ends


@dataclass(frozen=True)
class RulerKind:
    """One of RULER's tasks: how many tokens answer it, whether long prose is its haystack, and the options of lm-eval's
    needle generator (the other three tasks have none)."""

    max_new_tokens: int
    essays: bool = False
    needles: Mapping[str, Any] = field(default_factory=dict)


def _needles(haystack: str, key: str = "words", value: str = "numbers", **options: int) -> RulerKind:
    fixed = {"type_haystack": haystack, "type_needle_k": key, "type_needle_v": value}
    return RulerKind(128, haystack == "essay", fixed | options)


TASKS: Mapping[str, RulerKind] = {
    "niah_single_1": _needles("repeat"),
    "niah_single_2": _needles("essay"),
    "niah_single_3": _needles("essay", value="uuids"),
    "niah_multikey_1": _needles("essay", num_needle_k=4),
    "niah_multikey_2": _needles("needle"),
    "niah_multikey_3": _needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": _needles("essay", num_needle_v=4),
    "niah_multiquery": _needles("essay", num_needle_q=4),
    "vt": RulerKind(30),
    "cwe": RulerKind(120),
    "fwe": RulerKind(50),
}


@dataclass(frozen=True)
class Recipe:
    """What shapes the samples of one task: a context of ``context`` tokens of this tokenizer (lm-eval's counting:
    the answer inside, chat template and answer prefix outside), the seed, and the prose around the needles."""

    task: str
    context: int
    seed: int
    tokenizer: Any
    haystack: str | None = None

    def check(self) -> None:
        """Raises UsageError for what the generators cannot make anything of."""
        if self.task not in TASKS:
            raise UsageError(f"RULER task {self.task!r} is unknown; accepted: {', '.join(TASKS)}")
        if self.context < MIN_CONTEXT:
            raise UsageError(f"context {self.context} is too short for RULER: at least {MIN_CONTEXT} is expected")
        if TASKS[self.task].essays and self.haystack is None:
            raise UsageError(f"RULER task {self.task!r} hides needles in prose: give a long text with --text FILE")

    def file_name(self) -> str:
        """The same for the same samples, whatever the machine."""
        digest = hashlib.sha256(f"{self.seed} {_vocabulary(self.tokenizer)}\n".encode())
        if TASKS[self.task].essays:
            digest.update((self.haystack or "").encode())
        return f"ruler-{self.context}-{self.task}-{digest.hexdigest()[:8]}.jsonl"


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> str:
    """A hash of every token and its number."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\t{number}\n".encode())
    return digest.hexdigest()


def all_ruler_samples(recipes: Sequence[Recipe], n_samples: int, folder: Path | None) -> list[Sample]:
    """``n_samples`` samples of every recipe; without lm-eval raises UsageError that names all which would have to be
    made."""
    for recipe in recipes:
        recipe.check()
    lacking = [recipe for recipe in recipes if kept_samples(recipe, n_samples, folder) is None]
    if lacking and folder is not None and not _has_lm_eval():
        names, files = (", ".join(found) for found in zip(*((r.task, r.file_name()) for r in lacking), strict=True))
        raise UsageError(
            f"{str(folder)!r} has not {n_samples} samples of {names} (files {files}), and {_NO_LM_EVAL}; or name the "
            "other tasks with names=A+B"
        )
    return [sample for recipe in recipes for sample in ruler_samples(recipe, n_samples, folder)]


def ruler_samples(recipe: Recipe, n_samples: int, folder: Path | None) -> list[Sample]:
    """``n_samples`` samples: the first ones of the folder's file if it holds as many, else made anew and kept there (or
    nowhere without a folder). Raises UsageError without lm-eval."""
    recipe.check()
    if (kept := kept_samples(recipe, n_samples, folder)) is not None:
        return kept
    samples = generate(recipe, n_samples)
    if folder is not None:
        write_samples(folder / recipe.file_name(), samples)
    return samples


def kept_samples(recipe: Recipe, n_samples: int, folder: Path | None) -> list[Sample] | None:
    """The first ``n_samples`` of the folder's file; None if it holds fewer."""
    path = None if folder is None else folder / recipe.file_name()
    if path is None or not path.exists():
        return None
    kept = read_samples(path)
    return kept[:n_samples] if len(kept) >= n_samples else None


def generate(recipe: Recipe, n_samples: int) -> list[Sample]:
    """New samples, the same ones for the same recipe."""
    task = TASKS[recipe.task]
    if task.essays:
        n_tokens = len(recipe.tokenizer(recipe.haystack, verbose=False).input_ids)
        if n_tokens < recipe.context:
            raise UsageError(f"the text has {n_tokens} tokens, context {recipe.context} needs at least as many")
    with _own_random_state(), _lm_eval() as module:
        _seed(f"{recipe.task} {recipe.context} {recipe.seed}", module)
        rows = _GENERATORS.get(recipe.task, _niah)(module, recipe, n_samples)
    samples = [
        Sample(
            task=recipe.task,
            id=f"{recipe.task}-{i}",
            prompt=row["input"],
            answers=tuple(row["outputs"]),
            answer_prefix=row["gen_prefix"],
            max_new_tokens=task.max_new_tokens,
        )
        for i, row in enumerate(rows)
        if row["outputs"] and all(answer in row["input"] for answer in row["outputs"])
    ]
    if len(samples) < n_samples:
        raise UsageError(
            f"RULER task {recipe.task!r} does not fit into {recipe.context} tokens of this tokenizer: "
            f"{len(samples)} of {n_samples} samples are whole"
        )
    return samples


_Modules = Callable[[str], Any]


def _niah(module: _Modules, recipe: Recipe, n_samples: int) -> list[dict[str, Any]]:
    prepare, task = module("prepare_niah"), TASKS[recipe.task]
    haystack = re.sub(r"\s+", " ", recipe.haystack or "").split(" ")
    try:
        rows: list[dict[str, Any]] = prepare.generate_samples(
            haystack if task.essays else prepare.get_haystack(task.needles["type_haystack"]),
            TOKENIZER=recipe.tokenizer,
            max_seq_length=recipe.context,
            num_samples=n_samples,
            template=module("niah_utils").TEMPLATE,
            **task.needles,
        )
    except ValueError as error:
        raise UsageError(f"RULER task {recipe.task!r}: {error}") from error
    return rows


def _vt(module: _Modules, recipe: Recipe, n_samples: int) -> list[dict[str, Any]]:
    vt = module("vt_utils")
    smallest, _ = vt.generate_input_output(5, 1, 4, is_icl=True)
    n_tokens = len(recipe.tokenizer(smallest).input_ids)
    if n_tokens > _VT_EXAMPLE_TOKENS:
        raise UsageError(
            f"RULER task 'vt' needs a tokenizer of words: its worked example takes {n_tokens} tokens, "
            f"at most {_VT_EXAMPLE_TOKENS} are expected"
        )
    example = vt.sys_vartrack_w_noise_random(recipe.tokenizer, 1, max_seq_length=500, incremental=5)[0]
    rows: list[dict[str, Any]] = vt.sys_vartrack_w_noise_random(
        recipe.tokenizer, n_samples, max_seq_length=recipe.context, icl_example=example
    )
    return rows


def _cwe(module: _Modules, recipe: Recipe, n_samples: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = module("cwe_utils").sys_word_pair_random(
        n_samples, recipe.context, tokenizer=recipe.tokenizer
    )
    return rows


def _fwe(module: _Modules, recipe: Recipe, n_samples: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = module("fwe_utils").sys_kwext(
        recipe.tokenizer, max_seq_length=recipe.context, num_samples=n_samples
    )
    return rows


_GENERATORS = {"vt": _vt, "cwe": _cwe, "fwe": _fwe}


def _has_lm_eval() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "nltk"))


@contextmanager
def _lm_eval() -> Iterator[_Modules]:
    """lm-eval's modules by name: imported without its download of sentence models, split into sentences by
    punctuation, and silent."""
    if not _has_lm_eval():
        raise UsageError(_NO_LM_EVAL)
    nltk_data = importlib.import_module("nltk.data")
    with ExitStack() as stack:
        stack.enter_context(_patched(nltk_data, find=lambda *_: None))
        names = ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils")
        modules = {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}
        for name in ("prepare_niah", "vt_utils", "cwe_utils", "fwe_utils"):
            stack.enter_context(_patched(modules[name], tqdm=lambda steps, **_: steps, print=lambda *_: None))
        sentences = modules["prepare_niah"].cached_sent_tokenize
        sentences.cache_clear()
        stack.callback(sentences.cache_clear)
        stack.enter_context(_patched(modules["prepare_niah"], sent_tokenize=_SENTENCE_END.split))
        yield modules.__getitem__


@contextmanager
def _patched(module: Any, **attributes: Any) -> Iterator[None]:
    """A module with other globals, for as long as the block runs."""
    before = dict(vars(module))
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Python's and numpy's global state, from which the generators draw, is put back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(text: str, module: _Modules) -> None:
    """Both global states and the one that cwe has for itself."""
    random.seed(text)
    np.random.seed(random.getrandbits(32))
    module("cwe_utils").RNG.seed(text)
