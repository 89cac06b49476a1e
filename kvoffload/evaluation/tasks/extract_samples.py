"""The context-intensive task: twenty fields scattered over long prose, all of them asked for at once.

A needle survives a bad cache as long as its own page is read once; here every answer line needs another place of the
document, so that what a policy loses shows.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.samples import Sample, plain_tokens, prompt_tokens

N_FIELDS = 20
PLACES = (
    "amber gate", "birch hall", "brass tower", "calm harbor", "cedar bridge", "chalk cellar", "clay mill",
    "copper vault", "coral dock", "crystal chapel", "dusty attic", "eastern annex", "foggy pier", "frozen lake",
    "garden shed", "glass dome", "golden tunnel", "granite lodge", "green barn", "hidden archive", "hollow cave",
    "iron station", "ivory studio", "jade temple", "large stable", "lower deck", "maple cabin", "marble court",
    "mossy well", "narrow alley", "northern depot", "old library", "olive market", "orange tent", "pearl theater",
    "pine camp", "purple salon", "quiet museum", "red bakery", "river lock", "round arena", "royal kitchen",
    "sandy beach", "silent forge", "silver garage", "southern clinic", "stone wharf", "sunny school", "tall factory",
    "velvet lounge", "western airport", "white lighthouse", "wide meadow", "winter palace", "wooden pub",
    "yellow hotel",
)  # fmt: skip
_FIELD = "The access code of the {name} is {value}."
_TASK = "Below is a long text. The access codes of {n} places are hidden in it, one sentence each.\n\n{document}\n\n"
_QUESTION = "What are the access codes of the {n} places? Answer with one line for each place, in this order:\n{names}"
_PREFIX = "Here are the access codes:\n{first}:"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def extract_samples(tokenizer: Any, text: str, *, context: int, n_samples: int, seed: int = 0) -> list[Sample]:
    """``n_samples`` samples whose prompt and answer fill ``context`` tokens, up to a sentence; the same ones for the
    same arguments. Raises UsageError where the text or the context is too short."""
    sentences = [s for s in _SENTENCE_END.split(" ".join(text.split())) if s]
    lengths = [len(plain_tokens(tokenizer, " " + sentence)) for sentence in sentences]
    return [_sample(tokenizer, sentences, lengths, context, f"{seed} {i}", i) for i in range(n_samples)]


def _sample(
    tokenizer: Any, sentences: Sequence[str], lengths: Sequence[int], context: int, seed: str, number: int
) -> Sample:
    rng = random.Random(seed)
    fields = {name: str(rng.randint(10000, 99999)) for name in rng.sample(PLACES, N_FIELDS)}
    answer = "\n".join(f"{name}: {value}" for name, value in fields.items())
    n_new = len(plain_tokens(tokenizer, answer)) * 5 // 4
    prefix = _PREFIX.format(first=next(iter(fields)))
    empty = _prompt(rng.sample(list(fields), N_FIELDS), fields, [], rng)
    room = context - n_new - len(prompt_tokens(tokenizer, empty, prefix))
    if room < context // 2:
        raise UsageError(f"context {context} is too short for {N_FIELDS} fields in a text: their own tokens fill it")
    filler = _filler(sentences, lengths, room, rng)
    order = rng.sample(list(fields), N_FIELDS)
    return Sample(
        task="extract",
        id=f"extract-{number}",
        prompt=_prompt(order, fields, filler, rng),
        answers=tuple(answer.split("\n")),
        answer_prefix=prefix,
        max_new_tokens=n_new,
    )


def _filler(sentences: Sequence[str], lengths: Sequence[int], room: int, rng: random.Random) -> Sequence[str]:
    """As many sentences in a row, from a place drawn at random, as ``room`` tokens hold."""
    if sum(lengths) < room:
        raise UsageError(f"the text has {sum(lengths)} tokens, a document needs {room}: give a longer one")
    ends = list(accumulate(lengths, initial=0))
    last_start = bisect_right(ends, ends[-1] - room) - 1
    start = rng.randint(0, max(last_start, 0))
    return sentences[start : bisect_right(ends, ends[start] + room) - 1]


def _prompt(order: Sequence[str], fields: dict[str, str], filler: Sequence[str], rng: random.Random) -> str:
    """The document with one field, in ``order``, in each of as many equal parts, then the question in the fields' own
    order."""
    parts = []
    for i, name in enumerate(order):
        part = filler[i * len(filler) // len(order) : (i + 1) * len(filler) // len(order)]
        at = rng.randint(0, len(part))
        parts += [*part[:at], _FIELD.format(name=name, value=fields[name]), *part[at:]]
    document = _TASK.format(n=len(fields), document=" ".join(parts))
    return document + _QUESTION.format(n=len(fields), names="\n".join(f"{name}: <code>" for name in fields))


def right_fields(text: str, answers: Sequence[str]) -> float:
    """Share of the expected lines ``name: value`` that the text gives right, 0 to 100.

    The first line that names a place counts: its last number must be the value.
    """
    lines = [line.lower() for line in text.splitlines()]
    right = 0
    for answer in answers:
        name, _, value = answer.partition(": ")
        named = next((line for line in lines if re.search(rf"\b{re.escape(name)}\b", line)), "")
        numbers = re.findall(r"\d+", named)
        right += bool(numbers) and numbers[-1] == value
    return 100.0 * right / len(answers)
