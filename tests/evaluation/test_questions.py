"""The three tasks from their fields to scored answers; what is wrong is refused before any model loads."""

import json

import pytest
from pydantic import ValidationError

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.extract import ExtractTask, extract_score
from kvoffload.evaluation.tasks.jsonl import JsonlTask
from kvoffload.evaluation.tasks.ruler import RulerTask, ruler_score
from kvoffload.evaluation.tasks.ruler_samples import TASKS, Recipe
from kvoffload.evaluation.tasks.samples import Sample, write_samples
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.self_test import switch_attention


@pytest.fixture(scope="module")
def loaded():
    model = load_model(resolve("tiny"), dtype="float32", device="cpu")
    switch_attention(model.model)
    return model


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 300)
    return path


@pytest.fixture
def extract(prose):
    return ExtractTask(text=(prose,), texts=2)


@pytest.fixture
def ruler(loaded, tmp_path):
    """One whose samples are in its folder already."""
    recipe = Recipe("niah_single_1", 4096, 3, loaded.tokenizer)
    prompts = [f"The number is {i}2345. " * 30 + "Which number?" for i in range(3)]
    fields = {"task": recipe.task, "answer_prefix": "It is", "max_new_tokens": 8}
    samples = [Sample(id=f"niah-{i}", prompt=p, answers=(f"{i}2345",), **fields) for i, p in enumerate(prompts)]
    write_samples(tmp_path / recipe.file_name(), samples)
    return RulerTask(names="niah_single_1", samples=tmp_path, texts=2, seed=3)


@pytest.fixture
def jsonl(tmp_path):
    rows = [{"task": "mine", "id": str(n), "prompt": "abc " * n, "answers": ["x"]} for n in (80, 20, 79)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row | {"max_new_tokens": 5}) for row in rows))
    return JsonlTask(text=(path,))


def test_kept_ruler_samples_become_questions(ruler, loaded):
    questions = ruler.questions(loaded.tokenizer, 4096)
    assert [q.sample.id for q in questions] == ["niah-0", "niah-1"]
    assert loaded.tokenizer.decode(questions[1].prompt_ids).endswith("Which number? It is")
    assert questions[0].max_new_tokens == 8


def test_the_perfect_answer_is_worth_everything(extract, ruler, loaded):
    fields = extract.questions(loaded.tokenizer, 6000)[0].sample
    first, *others = fields.answers
    rest = "\n".join([first.split(":")[1], *others])
    assert extract_score(fields, rest) == 100
    assert extract_score(fields, rest.split("\n")[0]) == 5
    needle = ruler.questions(loaded.tokenizer, 4096)[1].sample
    assert (ruler_score(needle, " 12345."), ruler_score(needle, " 1234")) == (100, 0)


def test_prompts_of_about_equal_length_are_asked_together(jsonl, loaded):
    short, long = jsonl.batches(loaded.tokenizer, 2000)
    assert [q.sample.id for q in (*short.questions, *long.questions)] == ["20", "79", "80"]


@pytest.mark.parametrize(("name", "context"), [("ruler", 4096), ("jsonl", 300)])
def test_a_full_budget_answers_as_dense_does(request, loaded, name, context):
    task = request.getfixturevalue(name)
    task.check([context])
    for batch in task.batches(loaded.tokenizer, context):
        with batch.open(loaded, RuntimeConfig(self_test=False)) as opened:
            full = opened.measure(RuntimeConfig(budget="100%", offload="cpu"))
            assert full.records == opened.dense().records
            assert opened.answers(RuntimeConfig(budget="100%")) == opened.answers(RuntimeConfig(budget="100%"))
        assert {metric for record in full.records for metric in record.values} <= {m.name for m in task.metrics}


def test_metrics_are_the_score_and_one_a_subtask(ruler, jsonl, extract):
    names = {task.kind: [metric.name for metric in task.metrics] for task in (ruler, jsonl, extract)}
    assert names == {"ruler": ["score", "niah_single_1"], "jsonl": ["score", "mine"], "extract": ["score"]}
    assert not any(metric.lower_is_better for metric in ruler.metrics)
    assert RulerTask().subtasks == tuple(TASKS)
    assert RulerTask(names="vt+fwe").subtasks == ("vt", "fwe")


def test_what_does_not_change_a_sample_is_not_in_its_key(ruler, jsonl, tmp_path):
    same = ruler.model_copy(update={"names": ("vt",), "samples": None, "batch": 1, "texts": 50})
    assert same.identity() == ruler.identity()
    assert ruler.model_copy(update={"seed": 4}).identity() != ruler.identity()
    assert jsonl.model_copy(update={"too_long": "skip"}).identity() != jsonl.identity()


@pytest.mark.parametrize(
    ("task", "contexts", "said"),
    [
        (RulerTask(names="vt+nope"), [4096], "'nope' is unknown; accepted: niah_single_1"),
        (RulerTask(names="vt"), [8192, 2048], "context 2048"),
        (RulerTask(names="niah_single_2"), [4096], "--text"),
        (ExtractTask(), [4096], "--text"),
        (JsonlTask(), [4096], "--text"),
    ],
    ids=range(5),
)
def test_what_is_wrong_is_refused_before_a_model_loads(task, contexts, said):
    with pytest.raises(UsageError, match=said):
        task.check(contexts)


def test_a_sample_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text(json.dumps({"task": "t", "id": "1", "prompt": "p", "answers": ["x"]}) + "\n")
    path.write_text(path.read_text() * 2)
    with pytest.raises(UsageError, match="'1' of task 't' is there twice"):
        JsonlTask(text=(path,)).check([100])


def test_misspelt_options_are_refused():
    with pytest.raises(ValidationError):
        RulerTask(nams="vt")
    with pytest.raises(ValidationError):
        JsonlTask(too_long="drop")
