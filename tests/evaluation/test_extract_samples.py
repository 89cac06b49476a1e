"""The documents of the extraction task: made by seed, of the length asked for, with every field in them once."""

import random
import re

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.extract_samples import N_FIELDS, PLACES, extract_samples, right_fields
from kvoffload.evaluation.tasks.samples import prompt_tokens
from kvoffload.models.shapes import byte_tokenizer

CONTEXT = 8000


@pytest.fixture(scope="module")
def text():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(4000)]
    return " ".join(word + ("." if i % 9 == 8 else "") for i, word in enumerate(words))


@pytest.fixture(scope="module")
def samples(text):
    return extract_samples(byte_tokenizer(), text, context=CONTEXT, n_samples=3, seed=1)


def test_the_seed_decides_everything(text, samples):
    again = extract_samples(byte_tokenizer(), text, context=CONTEXT, n_samples=2, seed=1)
    assert again == samples[:2]
    assert extract_samples(byte_tokenizer(), text, context=CONTEXT, n_samples=1, seed=2) != samples[:1]
    assert len({sample.prompt for sample in samples}) == 3


def test_prompt_and_answer_fill_the_context_up_to_a_sentence(samples):
    for sample in samples:
        n_tokens = len(prompt_tokens(byte_tokenizer(), sample.prompt, sample.answer_prefix)) + sample.max_new_tokens
        assert CONTEXT - 100 < n_tokens <= CONTEXT


def test_every_field_is_hidden_once_and_asked_for(samples):
    for sample in samples:
        document, _, question = sample.prompt.rpartition("\n\n")
        assert len(sample.answers) == N_FIELDS
        for answer in sample.answers:
            name, value = answer.split(": ")
            assert document.count(f"The access code of the {name} is {value}.") == 1
            assert question.count(name) == 1
        assert question.index(sample.answers[0].split(": ")[0]) < question.index(sample.answers[1].split(": ")[0])
        assert sample.answer_prefix.endswith(sample.answers[0].split(": ")[0] + ":")


def test_the_fields_lie_all_over_the_document_in_another_order_than_asked(samples):
    document = samples[0].prompt.rpartition("\n\n")[0]
    places = [document.index(answer.split(": ")[1]) / len(document) for answer in samples[0].answers]
    assert places != sorted(places)
    tenths = {int(place * 10) for place in places}
    assert tenths == set(range(10))


def test_no_place_is_part_of_another():
    assert not [(a, b) for a in PLACES for b in PLACES if a != b and re.search(rf"\b{a}\b", b)]
    assert len(set(PLACES)) == len(PLACES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red bakery: 12345\nold library: 54321", 100),
        ("Red Bakery - code 12345.\n* the old library (3): 54321", 100),
        ("red bakery: 12345 old library: 54321", 50),  # one line each: the last number of the first line is another's
        ("red bakery: 54321\nold library: 12345", 0),
        ("red bakery: 99999\nred bakery: 12345", 0),  # the first line counts
        ("infrared bakery: 12345", 0),
        ("red bakery: 123456\nold library: 5432", 0),
        ("", 0),
    ],
)
def test_right_fields_by_hand(text, expected):
    assert right_fields(text, ["red bakery: 12345", "old library: 54321"]) == expected


def test_what_is_too_short_is_refused(text):
    with pytest.raises(UsageError, match="context 1500"):
        extract_samples(byte_tokenizer(), text, context=1500, n_samples=1)
    with pytest.raises(UsageError, match="a document needs"):
        extract_samples(byte_tokenizer(), "One sentence. " * 10, context=CONTEXT, n_samples=1)
