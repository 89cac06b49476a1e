"""Sessions on the tiny shape: prompts in, tokens and text out."""

import pytest
import torch
from torch.testing import assert_close

from kvoffload.config import SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.models.sampling import Sampler, TextStream
from kvoffload.models.shapes import byte_tokenizer
from kvoffload.runtime import session as session_module


def greedy(n, **fields):
    return SamplingConfig(max_new_tokens=n, **fields)


def tokens(session, sampling):
    """The tokens of a generation."""
    before = len(session.token_ids)
    session.generate(sampling)
    return session.token_ids[before:]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prefill_in_chunks_equals_one_at_once(open_session, ids, chunk):
    at_once, chunked = open_session(prefill_chunk=1000), open_session(prefill_chunk=chunk)
    for session in (at_once, chunked):
        session.prefill(ids(150))
    for token in ids(5, 1):
        assert_close(chunked.step(token), at_once.step(token), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_greedy_tokens_at_full_budget_are_those_of_transformers(open_session, stock, ids, offload):
    prompt = ids(120)
    session = open_session(offload=offload, budget="100%")
    session.prefill(prompt)
    with torch.no_grad():
        inputs = torch.tensor([prompt])
        expected = stock.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, pad_token_id=256
        )
    assert tokens(session, greedy(24)) == expected[0, 120:].tolist()


def test_a_second_prompt_on_a_session_equals_both_from_scratch(open_session, ids):
    twice, whole = open_session(), open_session()
    twice.prefill(ids(90))
    twice.prefill(ids(40, 1))
    whole.prefill(ids(90) + ids(40, 1))
    assert twice.token_ids == whole.token_ids
    for token in ids(6, 2):
        assert_close(twice.step(token), whole.step(token), atol=1e-4, rtol=1e-4)


def test_a_prompt_after_a_generation_follows_all_of_its_tokens(open_session, ids):
    """The last generated token was not fed yet; the next prefill takes it in first."""
    talk, whole = open_session(budget="100%"), open_session(budget="100%")
    talk.prefill(ids(90))
    answer = tokens(talk, greedy(7))
    talk.prefill(ids(20, 1))
    whole.prefill(ids(90) + answer + ids(20, 1))
    assert talk.token_ids == whole.token_ids
    assert talk.cache.get_seq_length() == 117
    assert_close(talk.step(5), whole.step(5), atol=1e-4, rtol=1e-4)


def test_generating_twice_goes_on_where_it_stopped(open_session, ids):
    twice, once = open_session(budget="100%"), open_session(budget="100%")
    for session in (twice, once):
        session.prefill(ids(90))
    assert tokens(twice, greedy(5)) + tokens(twice, greedy(5)) == tokens(once, greedy(10))


def test_the_tokens_of_a_session_are_those_that_were_fed(open_session, ids, monkeypatch):
    session, fed = open_session(), []
    forward = session._forward
    monkeypatch.setattr(session, "_forward", lambda chunk: (fed.extend(chunk.flatten().tolist()), forward(chunk))[1])
    feed = session_module.feed
    monkeypatch.setattr(
        session_module, "feed", lambda model, cache, ids: (fed.extend(ids[0].tolist()), feed(model, cache, ids))[1]
    )
    session.prefill(ids(60))
    pending = tokens(session, greedy(3))[-1]
    session.step((pending + 1) % 256)
    assert session.token_ids[: session.cache.get_seq_length()] == fed


def test_a_step_needs_a_prompt(open_session):
    with pytest.raises(UsageError, match="prefill a prompt first"):
        open_session().step(1)


def test_generating_needs_a_prompt(open_session):
    with pytest.raises(UsageError, match="prefill a prompt first"):
        open_session().generate()


@pytest.mark.parametrize("prompt", ["", [], torch.zeros(0, dtype=torch.int64)])
def test_an_empty_prompt_is_refused(open_session, prompt):
    with pytest.raises(UsageError, match="the prompt is empty"):
        open_session().prefill(prompt)


def test_text_tensors_and_lists_are_the_same_prompt(open_session):
    lists = [list(b"a book of pages"), torch.tensor([list(b"a book of pages")]), "a book of pages"]
    sessions = [open_session() for _ in lists]
    for session, prompt in zip(sessions, lists, strict=True):
        session.prefill(prompt)
    encoded = sessions[2].token_ids
    assert byte_tokenizer().decode(encoded) == "a book of pages"
    assert sessions[0].token_ids == sessions[1].token_ids == lists[0]


def test_progress_tells_every_chunk_and_what_moved(open_session, ids):
    session, seen = open_session(prefill_chunk=50), []
    session.prefill(ids(150), seen.append)
    assert [p.done_tokens for p in seen] == [50, 100, 150]
    assert {p.total_tokens for p in seen} == {150}
    assert 0 < seen[0].bytes_moved < seen[1].bytes_moved < seen[2].bytes_moved


def test_a_crop_takes_at_least_one_token_and_leaves_one(open_session, ids):
    session = open_session()
    session.prefill(ids(60))
    for n_tokens in (0, 60):
        with pytest.raises(UsageError, match=f"cannot crop {n_tokens} of 60 tokens"):
            session.crop(n_tokens)


def test_cropped_tokens_are_forgotten(open_session, ids):
    """As speculation would: two wrong tokens are taken back, and the right one follows."""
    cropped, plain = open_session(budget="100%"), open_session(budget="100%")
    for session in (cropped, plain):
        session.prefill(ids(90))
        session.step(3)
    for token in (200, 201):
        cropped.step(token)
    cropped.crop(2)
    assert cropped.token_ids == plain.token_ids
    assert_close(cropped.step(4), plain.step(4), atol=1e-4, rtol=1e-4)


def test_sealed_tokens_cannot_be_cropped(open_session, ids):
    session = open_session()
    session.prefill(ids(90))
    with pytest.raises(UsageError, match="cannot crop 30 tokens"):
        session.cache.crop(-30)


def test_a_copied_prefill_steps_like_a_real_one(open_session, ids):
    source = open_session(offload="nvme")
    source.prefill(ids(150))
    copied, real = open_session(selector="bounds"), open_session(selector="bounds")
    copied.copy_prefill(source)
    real.prefill(ids(150))
    assert copied.token_ids == real.token_ids
    for token in ids(6, 1):
        assert_close(copied.step(token), real.step(token), atol=1e-4, rtol=1e-4)


def test_a_prefill_is_copied_between_equal_pages_only(open_session, ids):
    source = open_session()
    source.prefill(ids(60))
    with pytest.raises(UsageError, match="between equal page_size, sinks, recent"):
        open_session(page_size=8).copy_prefill(source)


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_a_session_can_be_closed_twice(open_session, ids, offload):
    with open_session(offload=offload) as session:
        session.prefill(ids(60))
    session.close()


def test_every_token_comes_in_one_event(say):
    assert len(say("ab€", max_new_tokens=4)) == 4


# -- sampling


def sampled(open_session, ids, **fields):
    session = open_session()
    session.prefill(ids(60))
    return tokens(session, SamplingConfig(max_new_tokens=12, temperature=1.5, **fields))


def test_a_seed_reproduces_the_tokens(open_session, ids):
    first, second = (sampled(open_session, ids, seed=5) for _ in range(2))
    assert first == second


def test_another_seed_draws_other_tokens(open_session, ids):
    assert sampled(open_session, ids, seed=5) != sampled(open_session, ids, seed=6)


def test_the_callers_random_state_is_left_alone(open_session, ids):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    sampled(open_session, ids, seed=5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(open_session, ids, fields):
    session = open_session()
    session.prefill(ids(60))
    assert sampled(open_session, ids, seed=1, **fields) == tokens(session, greedy(12))


def test_tokens_are_drawn_by_their_probability():
    sampler = Sampler(SamplingConfig(temperature=0.5, seed=0), torch.device("cpu"))
    logits = torch.tensor([[0.7, 0.3]]).log() * 0.5  # at temperature 0.5 these are 70% and 30% again
    drawn = sum(int(sampler.pick(logits)) for _ in range(2000)) / 2000
    assert 0.26 < drawn < 0.34  # four standard deviations


def test_without_a_seed_two_runs_differ(open_session, ids):
    assert sampled(open_session, ids) != sampled(open_session, ids)


# -- text


class Scripted:
    """A sampler that says what it is told."""

    def __init__(self, script):
        self.script = list(script)

    def pick(self, logits):
        return torch.tensor([[self.script.pop(0)]])


@pytest.fixture
def say(open_session, ids, monkeypatch):
    """The events of a generation whose tokens are the bytes of a text."""

    def speak(text, **fields):
        script = byte_tokenizer()(text).input_ids
        monkeypatch.setattr(session_module, "Sampler", lambda sampling, device: Scripted(script))
        session = open_session()
        session.prefill(ids(30))
        return list(session.stream(SamplingConfig(**({"max_new_tokens": len(script)} | fields))))

    return speak


def test_pieces_concatenate_to_the_whole_text(say):
    text = "Größe: 3 € für 😀 and more"
    assert "".join(event.text for event in say(text)) == text


def test_no_piece_ends_within_a_character(say):
    pieces = [event.text for event in say("aé€😀b")]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_a_character_that_never_becomes_whole_comes_at_the_end(say):
    events = say("ab€", max_new_tokens=4)
    assert "".join(event.text for event in events) == "ab\ufffd"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    text = TextStream(byte_tokenizer(), ())
    bad, good = byte_tokenizer()("€").input_ids[0], byte_tokenizer()("xy").input_ids
    assert [text.push(token) for token in (bad, *good)] == ["", "\ufffdx", "y"]


@pytest.mark.parametrize("stop", ["END", "E", "D and", "€"])
def test_a_stop_string_ends_the_text_before_it(say, stop):
    text = "some € words END and more"
    events = say(text, stop=(stop,))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    n_bytes = len(text[: text.index(stop) + len(stop)].encode())
    assert len(events) == n_bytes  # one token a byte, and none behind the stop string


def test_the_first_of_several_stop_strings_counts(say):
    events = say("one two three", stop=("three", "two"))
    assert "".join(event.text for event in events) == "one "


def test_the_beginning_of_a_stop_string_is_held_back_and_given_when_it_was_none(say):
    pieces = [event.text for event in say("ENxEND", stop=("END",))]
    assert pieces == ["", "", "ENx", "", "", ""]


def test_a_held_back_beginning_comes_at_the_end(say):
    assert "".join(event.text for event in say("some EN", stop=("END",))) == "some EN"


def test_a_stop_string_that_overlaps_itself_is_found(say):
    assert "".join(event.text for event in say("xaaab", stop=("aab",))) == "xa"


def test_an_end_token_ends_the_generation_and_is_no_text(open_session, ids, monkeypatch, loaded):
    script = [*byte_tokenizer()("hi").input_ids, 7, 8]
    monkeypatch.setattr(session_module, "Sampler", lambda sampling, device: Scripted(script))
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [7])
    session = open_session()
    session.prefill(ids(30))
    assert session.generate() == "hi"


def test_the_text_of_a_generation_is_the_decoded_tokens(open_session, ids):
    session = open_session()
    session.prefill(ids(60))
    events = list(session.stream(greedy(40)))
    assert "".join(e.text for e in events) == byte_tokenizer().decode(session.token_ids[60:], skip_special_tokens=True)
