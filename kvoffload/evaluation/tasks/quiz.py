"""Questions and their scores: what ``ruler``, ``jsonl`` and ``extract`` have in common."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.base import Batch, Measured, Metric, OpenBatch, Record, Task, fingerprint
from kvoffload.evaluation.tasks.generation import Answers, Prefilled, answer, prefill_prompt
from kvoffload.evaluation.tasks.samples import Sample, prompt_tokens
from kvoffload.evaluation.tasks.scoring import DEFAULT_NEW_TOKENS
from kvoffload.models.catalog import LoadedModel

Scorer = Callable[[Sample, str], float]

_SHORTEST = 0.9  # of the longest prompt of a batch


@dataclass(frozen=True)
class Question:
    """A sample as the model is asked it."""

    sample: Sample
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


def ask(tokenizer: Any, sample: Sample, *, chat: bool = True, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> Question:
    """The sample's prompt with its begun answer; ``max_new_tokens`` is for samples that do not say theirs."""
    ids = prompt_tokens(tokenizer, sample.prompt, sample.answer_prefix, chat=chat)
    return Question(sample, tuple(ids), sample.max_new_tokens or max_new_tokens)


class QuizTask(Task):
    """Greedy answers to questions, ``batch`` of them side by side; the score goes from 0 to 100."""

    unkeyed: ClassVar[frozenset[str]] = Task.unkeyed | {"samples", "names"}

    batch: int = Field(default=16, ge=1)

    @property
    def subtasks(self) -> tuple[str, ...]:
        """Names that have a metric of their own beside the score over everything."""
        return ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, lower_is_better=False) for name in ("score", *self.subtasks))

    @abstractmethod
    def questions(self, tokenizer: Any, context: int) -> list[Question]:
        """All of a context's questions."""

    @property
    @abstractmethod
    def scorer(self) -> Scorer:
        """The score of a sample's answer, 0 to 100."""

    def batches(self, tokenizer: Any, context: int) -> list[Batch]:
        groups = side_by_side(self.questions(tokenizer, context), self.batch)
        return [Quiz(group, self.scorer, self.subtasks) for group in groups]


def side_by_side(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions in their order in groups of at most ``size`` that have the same number of new tokens and about the same
    length: the budget is a share of the longest, and a short prompt beside a long one would get more than its own."""
    groups: list[list[Question]] = []
    for asked in questions:
        if groups and len(groups[-1]) < size and _alike([*groups[-1], asked]):
            groups[-1].append(asked)
        else:
            groups.append([asked])
    return groups


def _alike(group: Sequence[Question]) -> bool:
    lengths = [len(asked.prompt_ids) for asked in group]
    return min(lengths) >= _SHORTEST * max(lengths) and len({asked.max_new_tokens for asked in group}) == 1


class Quiz(Batch):
    """Questions that are answered side by side. A sample's name covers the padding that the others beside it cause,
    since pages lie differently under another."""

    def __init__(self, questions: Sequence[Question], scorer: Scorer, subtasks: Sequence[str] = ()) -> None:
        self.questions, self.scorer, self.subtasks = tuple(questions), scorer, frozenset(subtasks)
        longest = max(len(q.prompt_ids) for q in questions)
        self.samples = tuple(
            f"{q.sample.id}#{fingerprint(q.prompt_ids, q.sample.answers, q.max_new_tokens, longest)}" for q in questions
        )

    def open(self, loaded: LoadedModel, anchors: RuntimeConfig) -> "OpenQuiz":
        return OpenQuiz(self, loaded, anchors)


class OpenQuiz(OpenBatch):
    """Every prompt in a cache of its own, from which the cells put their batches together."""

    def __init__(self, quiz: Quiz, loaded: LoadedModel, anchors: RuntimeConfig) -> None:
        self._quiz, self._loaded = quiz, loaded
        self._dense = anchors.model_copy(update=dense_policy(anchors))
        self._prefilled: list[Prefilled] = []
        try:
            for asked in quiz.questions:
                new = prefill_prompt(loaded, asked.prompt_ids, anchors, max_new_tokens=asked.max_new_tokens)
                self._prefilled.append(new)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for prompt in self._prefilled:
            prompt.cache.close()

    def measure(self, config: RuntimeConfig) -> Measured:
        found = self.answers(config)
        return Measured(self._records(found.texts), found.cost)

    def dense(self) -> Measured:
        return Measured(self._records(self.answers(self._dense).texts), None)

    def answers(self, config: RuntimeConfig) -> Answers:
        """What the model says under one policy."""
        return answer(self._loaded, self._prefilled, config)

    def _records(self, texts: Sequence[str]) -> tuple[Record, ...]:
        quiz = self._quiz
        records = []
        for name, asked, text in zip(quiz.samples, quiz.questions, texts, strict=True):
            score = quiz.scorer(asked.sample, text)
            own = {asked.sample.task: score} if asked.sample.task in quiz.subtasks else {}
            records.append(Record(name, {"score": score} | own))
        return tuple(records)


def dense_policy(anchors: RuntimeConfig) -> dict[str, Any]:
    """What makes a configuration dense: everything on the device, and everything read."""
    fields: dict[str, Any] = {
        "offload": "none",
        "budget": "100%",
        "selector": "uniform",
        "completion": "none",
        "gate": False,
    }
    plain = RuntimeConfig(**fields, page_size=anchors.page_size)
    return {name: getattr(plain, name) for name in (*fields, "index", "gpu_cache")}
