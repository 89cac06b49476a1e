"""LongBench-style questions: asked with or without the chat template, shortened in the middle, or left out."""

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.jsonl import jsonl_questions
from kvoffload.evaluation.tasks.samples import Sample
from kvoffload.models.shapes import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    built = byte_tokenizer()
    built.chat_template = "<{{ messages[0].content }}>"
    return built


def sample(task="mine", prompt="0123456789" * 10, **fields):
    return Sample(task=task, id="7", prompt=prompt, answers=("x",), **fields)


def asked(tokenizer, *samples, **options):
    return [(tokenizer.decode(q.prompt_ids), q.max_new_tokens) for q in jsonl_questions(tokenizer, samples, **options)]


def test_few_shot_and_code_prompts_are_asked_without_the_chat_template(tokenizer):
    found = asked(tokenizer, sample("qasper", "a"), sample("lcc", "a"), sample("mine", "a"), context=1000)
    assert found == [("<a>", 128), ("a", 64), ("<a>", 128)]


def test_a_samples_own_number_of_new_tokens_goes_first(tokenizer):
    assert asked(tokenizer, sample(prompt="a", max_new_tokens=5), context=1000) == [("<a>", 5)]


def test_a_long_prompt_keeps_its_ends_inside_the_template(tokenizer):
    ((text, n_new),) = asked(tokenizer, sample(max_new_tokens=10), context=22)
    assert (text, n_new) == ("<0123456789>", 10)
    assert asked(tokenizer, sample(max_new_tokens=10), context=18) == [("<012789>", 10)]


def test_a_prompt_that_just_fits_is_left_alone(tokenizer):
    assert asked(tokenizer, sample(max_new_tokens=10), context=112)[0][0] == f"<{'0123456789' * 10}>"


def test_long_prompts_can_be_left_out(tokenizer):
    short, long = sample(prompt="a"), sample()
    assert asked(tokenizer, long, short, context=200, too_long="skip") == [("<a>", 128)]
    with pytest.raises(UsageError, match="none of 1 prompts"):
        asked(tokenizer, long, context=200, too_long="skip")


def test_a_context_without_room_for_a_prompt_is_refused(tokenizer):
    with pytest.raises(UsageError, match="sample '7': context 12"):
        asked(tokenizer, sample(max_new_tokens=10), context=12)


def test_characters_cut_in_half_do_not_make_the_prompt_too_long(tokenizer):
    """Halves of a character decode to replacement characters, which have more tokens."""
    for context in range(20, 30):
        (question,) = jsonl_questions(tokenizer, [sample(prompt="é€😀" * 20, max_new_tokens=4)], context=context)
        assert len(question.prompt_ids) + 4 <= context
