"""Scores of answers from 0 to 100: RULER's string match, and LongBench's metrics as lm-eval has them (extra
``eval``)."""

import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.samples import Sample

DEFAULT_NEW_TOKENS = 128
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class LongBenchTask:
    """How LongBench asks and scores: lm-eval's metric, tokens of an answer, whether the prompt goes into the chat
    template (few-shot and code prompts do not), and whether only the first line counts."""

    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False


LONGBENCH: Mapping[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask("qa_f1_score", 128),
    "qasper": LongBenchTask("qa_f1_score", 128),
    "multifieldqa_en": LongBenchTask("qa_f1_score", 64),
    "multifieldqa_zh": LongBenchTask("qa_f1_zh_score", 64),
    "hotpotqa": LongBenchTask("qa_f1_score", 32),
    "2wikimqa": LongBenchTask("qa_f1_score", 32),
    "musique": LongBenchTask("qa_f1_score", 32),
    "dureader": LongBenchTask("rouge_zh_score", 128),
    "gov_report": LongBenchTask("rouge_score", 512),
    "qmsum": LongBenchTask("rouge_score", 512),
    "multi_news": LongBenchTask("rouge_score", 512),
    "vcsum": LongBenchTask("rouge_zh_score", 512),
    "trec": LongBenchTask("classification_score", 64, chat=False, first_line=True),
    "triviaqa": LongBenchTask("qa_f1_score", 32, chat=False, first_line=True),
    "samsum": LongBenchTask("rouge_score", 128, chat=False, first_line=True),
    "lsht": LongBenchTask("classification_score", 64, chat=False, first_line=True),
    "passage_count": LongBenchTask("count_score", 32),
    "passage_retrieval_en": LongBenchTask("retrieval_score", 32),
    "passage_retrieval_zh": LongBenchTask("retrieval_zh_score", 32),
    "lcc": LongBenchTask("code_sim_score", 64, chat=False),
    "repobench-p": LongBenchTask("code_sim_score", 64, chat=False),
}


def longbench_task(name: str) -> LongBenchTask | None:
    """The LongBench task of this name, also of its even-length variant ``NAME_e``; None for any other name."""
    return LONGBENCH.get(name.removesuffix("_e"))


def string_match(text: str, answers: Sequence[str]) -> float:
    """Share of the expected strings that appear in the text, 0 to 100 (RULER's string_match_all: case aside)."""
    said = _CONTROL.sub("\n", text).lower()
    return 100.0 * sum(answer.lower() in said for answer in answers) / len(answers)


def score(sample: Sample, text: str) -> float:
    """0 to 100: by LongBench's metric where the sample's task is one of its, else ``string_match``."""
    task = longbench_task(sample.task)
    if task is None:
        return string_match(text, sample.answers)
    said = text.lstrip("\n").split("\n")[0] if task.first_line else text
    kind: dict[str, Any] = {"all_classes": list(sample.all_classes)} if sample.all_classes else {}
    metric = getattr(_metrics(), task.metric)
    return 100.0 * max(float(metric(_stripped(said, task), answer, **kind)) for answer in sample.answers)


def check(sample: Sample) -> None:
    """Raises UsageError for a sample that cannot be scored, before any answer is made."""
    task = longbench_task(sample.task)
    if task is None:
        return
    if task.metric == "classification_score" and not sample.all_classes:
        raise UsageError(f"sample {sample.id!r}: task {sample.task!r} is a classification and needs all_classes")
    try:
        score(sample, sample.answers[0])
    except IndexError:
        raise UsageError(
            f"sample {sample.id!r}: the answer {sample.answers[0]!r} names no paragraph, as {sample.task!r} expects"
        ) from None


def _stripped(text: str, task: LongBenchTask) -> str:
    """The indentation of code belongs to the answer."""
    return text if task.metric == "code_sim_score" else text.strip()


@cache
def _metrics() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fuzzywuzzy warns that it is slow
            return importlib.import_module("lm_eval.tasks.longbench.metrics")
    except ImportError as error:
        raise UsageError(f"LongBench's metrics come from lm-eval: pip install 'kvoffload[eval]' ({error})") from None
