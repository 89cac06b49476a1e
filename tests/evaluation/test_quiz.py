"""A quiz: a record for every question in order, dense answers at full budget, groups of about equal length."""

import pytest

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.quiz import Question, Quiz, ask, side_by_side
from kvoffload.evaluation.tasks.samples import Sample
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.self_test import switch_attention

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "self_test": False}


@pytest.fixture(scope="module")
def loaded():
    model = load_model(resolve("tiny"), dtype="float32", device="cpu")
    switch_attention(model.model)
    return model


@pytest.fixture(scope="module")
def questions(loaded):
    prompts = ["the quick brown fox " * n for n in (9, 2, 6, 4, 7)]
    samples = [
        Sample(task="even" if i % 2 == 0 else "odd", id=str(i), prompt=p, answers=("x",), max_new_tokens=6)
        for i, p in enumerate(prompts)
    ]
    return [ask(loaded.tokenizer, sample) for sample in samples]


def policy(**fields):
    return RuntimeConfig(**(SMALL | fields))


def own_number(sample, text):
    return float(sample.id) * 10


@pytest.fixture
def opened(loaded, questions):
    with Quiz(questions, own_number, ["even"]).open(loaded, policy()) as batch:
        yield batch


def test_records_come_in_the_order_of_the_questions(opened, questions):
    records = opened.measure(policy()).records
    assert tuple(record.sample for record in records) == Quiz(questions, own_number).samples
    assert [record.values["score"] for record in records] == [0, 10, 20, 30, 40]


def test_a_subtask_that_is_asked_for_has_a_metric_of_its_own(opened):
    values = [record.values for record in opened.measure(policy()).records]
    assert values[2] == {"score": 20, "even": 20}
    assert values[1] == {"score": 10}


def test_the_dense_answers_are_those_of_a_full_budget(opened, loaded, questions):
    full = opened.answers(policy(budget="100%", offload="cpu"))
    dense = opened.dense()
    assert dense.cost is None
    assert dense.records == opened.measure(policy(budget="100%")).records
    for asked, text in zip(questions, full.texts, strict=True):
        with Quiz([asked], own_number).open(loaded, policy()) as alone:
            assert alone.answers(policy(offload="none")).texts == (text,)


def test_what_a_cell_costs_is_bounded_by_its_budget(opened):
    cost = opened.measure(policy(budget="10%", selector="bounds", completion="none")).cost
    assert 0 < cost.read_share <= 0.1
    assert cost.charged_share == pytest.approx(cost.read_share)


def asked(length, n_new=8):
    sample = Sample(task="t", id=str(length), prompt="?", answers=("x",))
    return Question(sample, tuple(range(length)), n_new)


def test_groups_keep_the_order_and_put_only_like_beside_like():
    lengths = [100, 91, 99, 97, 60, 61, 60]
    groups = side_by_side([asked(n) for n in lengths], 3)
    assert [[len(q.prompt_ids) for q in group] for group in groups] == [[100, 91, 99], [97], [60, 61, 60]]
    assert len(side_by_side([asked(10, 8), asked(10, 9)], 3)) == 2


def test_a_samples_name_tells_its_content_and_its_padding():
    alone = Quiz([asked(100)], own_number).samples[0]
    assert alone.startswith("100#")
    assert Quiz([asked(100)], own_number).samples[0] == alone
    assert Quiz([asked(100), asked(99)], own_number).samples[0] == alone  # not padded by a shorter one
    assert Quiz([asked(100), asked(101)], own_number).samples[0] != alone
    assert Quiz([asked(100, 9)], own_number).samples[0] != alone
