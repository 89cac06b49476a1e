"""The built-in ``tiny`` shape, and tasks of lm-eval with local data."""

import json

import pytest

from kvoffload.models.catalog import load_model, resolve

ROWS = [
    {
        "question": f"Lorem ipsum {i} dolor sit amet. " * 5 + "Which?",
        "choices": [" a", " bb", " the third"],
        "answer": i,
    }
    for i in range(3)
]
TASKS = {
    "kvo_choice": ["output_type: multiple_choice", 'doc_to_text: "{{question}}"', 'doc_to_choice: "{{choices}}"',
                   'doc_to_target: "{{answer}}"', "metric_list: [{metric: acc}]"],
    "kvo_text": ["output_type: generate_until", 'doc_to_text: "{{question}}"', 'doc_to_target: "x"',
                 "generation_kwargs: {until: ['Q'], max_gen_toks: 6, do_sample: false}",
                 "metric_list: [{metric: exact_match}]"],
    "kvo_whole": ["output_type: loglikelihood_rolling", 'doc_to_text: ""', 'doc_to_target: "{{question}}"',
                  "metric_list: [{metric: byte_perplexity}]"],
}  # fmt: skip


@pytest.fixture(scope="session")
def loaded():
    """Its attention is ours."""
    return load_model(resolve("tiny"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def stock():
    """The same weights; its attention stays the library's."""
    return load_model(resolve("tiny"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """One task of every kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, lines in TASKS.items():
        head = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {data}}}}}"]
        (folder / f"{name}.yaml").write_text("\n".join([*head, "test_split: test", *lines]) + "\n")
    return folder
