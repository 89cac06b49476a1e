"""RULER's samples: the same ones for the same recipe, kept in files that need no lm-eval, and no endless generator."""

import importlib.util
import random
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks import ruler_samples as ruler
from kvoffload.evaluation.tasks.ruler_samples import MIN_CONTEXT, TASKS, Recipe, generate
from kvoffload.evaluation.tasks.samples import Sample, write_samples
from kvoffload.models.shapes import byte_tokenizer

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "wonderwords", "scipy")),
    reason="the extra eval is not installed",
)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of words and punctuation, quick and about as long as a real one."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.fixture(scope="module")
def prose():
    rng = random.Random(0)
    letters = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(9000)]
    return " ".join(word + ("." if i % 12 == 11 else "") for i, word in enumerate(letters))


@pytest.fixture
def recipe(words, prose):
    return lambda task="niah_single_2", **changes: replace(Recipe(task, MIN_CONTEXT, 0, words, prose), **changes)


@needs_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_whole_samples_within_the_context(recipe, words, task):
    state = random.getstate()
    samples = generate(recipe(task), 2)
    assert random.getstate() == state
    assert [s.id for s in samples] == [f"{task}-0", f"{task}-1"]
    assert samples[0].prompt != samples[1].prompt
    for sample in samples:
        assert all(answer in sample.prompt for answer in sample.answers)
        assert 300 < len(words(sample.prompt).input_ids) <= MIN_CONTEXT
        assert sample.max_new_tokens == TASKS[task].max_new_tokens
        assert sample.answer_prefix.strip()


@needs_lm_eval
@pytest.mark.parametrize("task", ["niah_multikey_1", "vt", "cwe", "fwe"])
def test_the_recipe_decides_everything(recipe, task):
    first = generate(recipe(task), 2)
    random.seed(7)
    assert generate(recipe(task), 2) == first
    assert generate(recipe(task), 1) == first[:1]
    assert generate(recipe(task, seed=1), 2) != first


@needs_lm_eval
def test_a_tokenizer_that_leaves_no_room_is_refused_and_not_tried_forever(recipe):
    with pytest.raises(UsageError, match="tokenizer of words"):
        generate(recipe("vt", tokenizer=byte_tokenizer()), 1)
    with pytest.raises(UsageError, match="does not fit"):
        generate(recipe("cwe", tokenizer=byte_tokenizer()), 1)


def test_a_text_shorter_than_the_context_is_refused(recipe):
    with pytest.raises(UsageError, match="the text has 2 tokens"):
        generate(recipe(haystack="too short"), 1)


def kept(recipe, folder, n):
    samples = [Sample(task=recipe.task, id=f"{recipe.task}-{i}", prompt="?", answers=("x",)) for i in range(n)]
    write_samples(folder / recipe.file_name(), samples)
    return samples


def test_kept_samples_are_used_without_lm_eval(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ruler.importlib.util, "find_spec", lambda name: None)
    samples = kept(recipe(), tmp_path, 3)
    assert ruler.ruler_samples(recipe(), 2, tmp_path) == samples[:2]
    with pytest.raises(UsageError, match=r"kvoffload\[eval\]"):
        ruler.ruler_samples(recipe(), 4, tmp_path)


def test_without_lm_eval_all_that_is_not_kept_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ruler.importlib.util, "find_spec", lambda name: None)
    wanted = [recipe(task) for task in ("niah_single_2", "fwe", "vt", "cwe")]
    samples = [kept(wanted[0], tmp_path, 3)[:2], kept(wanted[2], tmp_path, 2)]
    kept(wanted[3], tmp_path, 1)
    with pytest.raises(UsageError, match=r"has not 2 samples of fwe, cwe .*kvoffload\[eval\].*names="):
        ruler.all_ruler_samples(wanted, 2, tmp_path)
    assert ruler.all_ruler_samples([wanted[0], wanted[2]], 2, tmp_path) == [*samples[0], *samples[1]]


@needs_lm_eval
def test_too_few_kept_samples_are_made_anew_and_kept(recipe, tmp_path):
    kept(recipe("fwe"), tmp_path, 1)
    made = ruler.ruler_samples(recipe("fwe"), 2, tmp_path)
    assert made == generate(recipe("fwe"), 2) == ruler.ruler_samples(recipe("fwe"), 2, tmp_path)


def test_the_file_is_named_after_what_shapes_it(recipe, prose):
    names = {
        recipe().file_name(),
        recipe("fwe").file_name(),
        recipe(context=8192).file_name(),
        recipe(seed=1).file_name(),
        recipe(tokenizer=byte_tokenizer()).file_name(),
        recipe(haystack=prose + " more").file_name(),
    }
    assert len(names) == 6
    assert all(name.startswith(("ruler-4096-", "ruler-8192-")) and name.endswith(".jsonl") for name in names)
    assert recipe("fwe").file_name() == recipe("fwe", haystack=None).file_name()  # only needles in prose depend on it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "niah_single_9"}, "accepted: niah_single_1"),
        ({"context": 4095}, "at least 4096"),
        ({"haystack": None}, "--text FILE"),
    ],
)
def test_what_cannot_be_generated_is_refused(recipe, changes, said):
    with pytest.raises(UsageError, match=said):
        recipe(**changes).check()
