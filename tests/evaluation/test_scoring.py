"""Scores, against cases worked out by hand."""

import sys

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks import scoring
from kvoffload.evaluation.tasks.samples import Sample
from kvoffload.evaluation.tasks.scoring import LONGBENCH, check, longbench_task, score, string_match


def sample(task, *answers, **fields):
    return Sample(task=task, id="1", prompt="?", answers=answers, **fields)


@pytest.fixture
def _lm_eval():
    for name in ("lm_eval", "jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(name)


def test_string_match_is_the_share_of_answers_that_appear():
    assert string_match("It is 12, and ABC.", ["12", "abc", "34", "9"]) == 50
    assert string_match("", ["x"]) == 0
    assert string_match("first\tsecond", ["first\nsecond"]) == 100  # control characters are all one


def test_a_task_of_no_known_name_is_matched_as_strings():
    assert score(sample("mine", "red", "blue"), "RED!") == 50


def test_the_variants_of_even_length_are_scored_alike():
    assert longbench_task("qasper_e") is LONGBENCH["qasper"]
    assert longbench_task("niah_single_1") is None


@pytest.mark.usefixtures("_lm_eval")
@pytest.mark.parametrize(
    ("task", "answers", "text", "expected"),
    [
        ("hotpotqa", ["the red house"], "A house.", 200 / 3),  # precision 1, recall 1/2, articles aside
        ("hotpotqa", ["wrong", "house"], " house ", 100),  # the best of several answers
        ("passage_count", ["3"], "3 or 4", 50),
        ("passage_retrieval_en", ["Paragraph 12"], "Paragraph 12", 100),
        ("lcc", ["    x = 1"], "# note\n    x = 1\n    y = 2", 100),
        ("lcc", ["abcd"], "abxx", 50),
        ("triviaqa", ["paris"], "\nParis\nQuestion: more", 100),
        ("gov_report", ["a b c d"], "a b c d", 100),
        ("samsum", ["unlike"], "nothing", 0),
    ],
)
def test_longbench_by_hand(task, answers, text, expected):
    assert score(sample(task, *answers), text) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("_lm_eval")
def test_a_classification_is_shared_among_the_labels_named():
    asked = sample("trec", "City", all_classes=["City", "Food", "Date"])
    assert score(asked, "City or Food\nDate") == 50
    assert score(asked, "Date") == 0


@pytest.mark.usefixtures("_lm_eval")
def test_what_cannot_be_scored_is_refused_beforehand():
    with pytest.raises(UsageError, match="all_classes"):
        check(sample("trec", "City"))
    with pytest.raises(UsageError, match="names no paragraph"):
        check(sample("passage_retrieval_en", "12"))
    check(sample("mine", "anything"))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    scoring._metrics.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.longbench.metrics", None)
    with pytest.raises(UsageError, match=r"kvoffload\[eval\]"):
        check(sample("qasper", "x"))
    check(sample("mine", "x"))
