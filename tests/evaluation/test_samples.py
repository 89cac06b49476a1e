"""Lines of prompts and answers: what is written is read, and every hostile line is named."""

import json

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.samples import Sample, cut_middle, prompt_tokens, read_samples, write_samples
from kvoffload.models.shapes import byte_tokenizer

GOOD = {"task": "qasper", "id": "1", "prompt": "What?", "answers": ["that"]}


def line(**changes):
    return json.dumps(GOOD | changes)


@pytest.fixture
def read(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
        return read_samples(path)

    return write


def test_what_is_written_is_read(tmp_path):
    samples = [
        Sample(task="a", id="1", prompt="line one\nline\u2028two", answers=("x", "y"), answer_prefix="So:"),
        Sample(task="b", id="2", prompt="é", answers=("x",), max_new_tokens=3, all_classes=("x", "z")),
    ]
    write_samples(tmp_path / "new" / "s.jsonl", samples)
    assert read_samples(tmp_path / "new" / "s.jsonl") == samples
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.jsonl"]


def test_blank_lines_do_not_matter(read):
    assert len(read(line(), "", "  ", line(id="2"), "")) == 2


def test_answers_and_labels_in_one_object_are_taken_apart(read):
    nested = line(answers=[{"answers": ["b"], "all_classes": ["a", "b"]}])
    assert (read(nested)[0].answers, read(nested)[0].all_classes) == (("b",), ("a", "b"))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "JSON"),
        ("[1, 2]", "object"),
        ("null", "object"),
        (b'{"task": "\xff"}', "UTF-8"),
        ("[" * 100_000, "JSON"),
        (line(prompt=""), "prompt"),
        (line(prompt=7), "prompt"),
        (line(prompt="\ud800"), "JSON"),
        (line(answers=[]), "answers"),
        (line(answers="that"), "answers"),
        (line(answers=[None]), "answers.0"),
        (line(answers=[{"answers": ["b"]}]), "answers.0"),
        (line(max_new_tokens=0), "max_new_tokens"),
        (line(max_new_tokens=10**9), "max_new_tokens"),
        (line(promt="?"), "promt"),
        (json.dumps({"task": "x"}), "id"),
    ],
    ids=range(16),
)
def test_a_bad_line_is_named_with_what_is_wrong(read, bad, said):
    with pytest.raises(UsageError, match=said) as caught:
        read(line(), bad)
    message = str(caught.value)
    assert "line 2" in message or "UTF-8" in message
    assert len(message) < 400


def test_an_empty_or_missing_file_is_refused(read, tmp_path):
    with pytest.raises(UsageError, match="no sample"):
        read("")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path)


def test_a_long_prompt_loses_its_middle():
    tokenizer = byte_tokenizer()
    assert cut_middle(tokenizer, "abcdefghij", 10) == "abcdefghij"
    assert cut_middle(tokenizer, "abcdefghij", 5) == "abhij"


def test_the_begun_answer_follows_the_prompt():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_tokens(tokenizer, "question", "answer:")) == "question answer:"
    tokenizer.chat_template = "<{{ messages[0].content }}>{% if add_generation_prompt %}A:{% endif %}"
    assert tokenizer.decode(prompt_tokens(tokenizer, "question", " so")) == "<question>A: so"
    assert tokenizer.decode(prompt_tokens(tokenizer, "question", chat=False)) == "question"
