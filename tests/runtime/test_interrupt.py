"""Ending prefills and generations from another thread and by the clock, and going on afterwards."""

import threading

import pytest

from kvoffload.config import SamplingConfig
from kvoffload.errors import CancelledError, TimedOutError, UsageError

GREEDY = SamplingConfig(max_new_tokens=12)


def whole(open_session, prompt, **fields):
    session = open_session(**fields)
    session.prefill(prompt)
    return [event.token for event in session.stream(GREEDY)]


def test_a_cancelled_generation_ends_at_the_next_step_and_can_go_on(open_session, ids):
    session = open_session()
    session.prefill(ids(60))
    stream = session.stream(GREEDY)
    tokens = [next(stream).token for _ in range(5)]
    thread = threading.Thread(target=session.cancel)
    thread.start()
    thread.join()
    with pytest.raises(CancelledError):
        next(stream)
    rest = [event.token for event in session.stream(SamplingConfig(max_new_tokens=7))]
    assert tokens + rest == whole(open_session, ids(60))


def test_a_cancelled_prefill_ends_after_its_chunk_and_can_go_on(open_session, ids):
    session, seen = open_session(prefill_chunk=16), []
    with pytest.raises(CancelledError):
        session.prefill(ids(64), on_progress=lambda p: (seen.append(p.done_tokens), session.cancel()))
    assert seen == [16]
    assert session.unfinished
    session.finish_prefill()
    assert [event.token for event in session.stream(GREEDY)] == whole(open_session, ids(64), prefill_chunk=16)


def test_a_cancel_is_obeyed_once(open_session, ids):
    session = open_session()
    session.prefill(ids(20))
    session.cancel()
    with pytest.raises(CancelledError):
        session.generate(GREEDY)
    assert len([*session.stream(GREEDY)]) == 12


def test_a_timeout_ends_a_generation_and_holds_for_that_call_only(open_session, ids):
    session = open_session()
    session.prefill(ids(20))
    with pytest.raises(TimedOutError, match="1e-09 s"):
        session.generate(GREEDY, timeout_s=1e-9)
    assert len([*session.stream(GREEDY)]) == 12


def test_a_timeout_ends_a_prefill_that_can_go_on(open_session, ids):
    session = open_session(prefill_chunk=16)
    with pytest.raises(TimedOutError):
        session.prefill(ids(64), timeout_s=1e-9)
    session.finish_prefill()
    assert session.cache.get_seq_length() == 64


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(open_session, ids, timeout_s):
    session = open_session()
    with pytest.raises(UsageError, match="timeout_s"):
        session.prefill(ids(4), timeout_s=timeout_s)


def test_the_last_event_says_why_it_is_the_last(open_session, ids):
    session = open_session()
    session.prefill(ids(20))
    assert [event.finish for event in session.stream(SamplingConfig(max_new_tokens=3))] == [None, None, "length"]


def test_a_budget_of_its_own_stands_in_for_the_configurations(loaded):
    from tiny import SMALL

    from kvoffload.config import RuntimeConfig
    from kvoffload.runtime.engine import Runtime

    runtime = Runtime(loaded, RuntimeConfig(**SMALL))
    with runtime.session(budget="50%") as session:
        assert str(session.config.effective_budget) == "50%"
    with pytest.raises(UsageError, match="budget: 'much'"):
        runtime.session(budget="much")
