"""Turns, admission, cancellation and the end: the scheduler itself, without HTTP."""

import queue
from contextlib import contextmanager
from functools import wraps

import pytest
from served import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.events import Progress
from kvoffload.runtime.limits import Limits as Free
from kvoffload.runtime.session import Session
from kvoffload.server.errors import Failure, RequestError
from kvoffload.server.job import Done, Job, Piece, Queued
from kvoffload.server.metrics import Metrics
from kvoffload.server.room import Planner, Room
from kvoffload.server.scheduler import Limits, Scheduler
from kvoffload.server.sequence import step_in_turn

EVERYTHING = Room(*[float("inf")] * 5)
RUNTIME = {k: v for k, v in SMALL.items() if k not in ("model", "keep_sessions", "max_new_tokens")}


@contextmanager
def scheduling(loaded, *, stepper=None, config=None, started=True, **limits):
    runtime = Runtime(loaded, RuntimeConfig(**(RUNTIME | (config or {}))))
    fields = {"max_running": 8, "max_queue": 8, "keep_sessions": 0, "room": EVERYTHING}
    scheduler = Scheduler(runtime, Limits(**(fields | limits)), Metrics(), stepper=stepper)
    if started:
        scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close()


class Client:
    """A job, and its events in the order in which they came; ``log`` is shared with others."""

    def __init__(self, name, prompt, n=4, log=None, **fields):
        self.name, self.events, self.log = name, queue.Queue(), [] if log is None else log
        fields = {"need": Room()} | fields
        self.job = Job(name, prompt, SamplingConfig(max_new_tokens=n), send=self.take, **fields)

    def take(self, event):
        self.log.append((self.name, event))
        self.events.put(event)

    def end(self):
        """The event that ends it."""
        while not isinstance(event := self.events.get(timeout=30), Done | Failure):
            pass
        return event


def ids(n, seed=0):
    return [(7 * i + 13 * seed) % 256 for i in range(n)]


def tokens(loaded, prompt, n, **config):
    with Runtime(loaded, RuntimeConfig(**(RUNTIME | config))).session() as session:
        session.prefill(prompt)
        return [event.token for event in session.stream(SamplingConfig(max_new_tokens=n))]


def test_a_long_prompt_lets_others_step_between_its_chunks(loaded):
    log, rounds = [], []

    def stepper(sequences):
        rounds.append([s.job.id for s in sequences])
        yield from step_in_turn(sequences)

    with scheduling(loaded, stepper=stepper, started=False) as scheduler:
        short, long = Client("short", ids(20), 8, log), Client("long", ids(64 * 6), 2, log)
        for client in (short, long):
            scheduler.submit(client.job)
        scheduler.start()
        assert isinstance(short.end(), Done)
        assert isinstance(long.end(), Done)
    chunks = [i for i, (name, event) in enumerate(log) if name == "long" and isinstance(event, Progress)]
    assert len(chunks) == 6
    assert rounds[:6] == [["short"]] * 6, "one step of the short one for every chunk of the long one"


def test_prompts_are_prefilled_in_turn(loaded):
    log = []
    with scheduling(loaded, started=False) as scheduler:
        clients = [Client(name, ids(64 * 3, seed), 1, log) for seed, name in enumerate("ab")]
        for client in clients:
            scheduler.submit(client.job)
        scheduler.start()
        for client in clients:
            assert isinstance(client.end(), Done)
    assert [name for name, event in log if isinstance(event, Progress)] == ["a", "b"] * 3


def test_jobs_share_a_forward_while_they_decode(loaded, monkeypatch):
    batches, forward = [], loaded.model.forward

    @wraps(forward)
    def counted(ids, **options):
        if ids.shape[1] == 1:
            batches.append(ids.shape[0])
        return forward(ids, **options)

    lengths = {"a": 3, "b": 9, "c": 6}
    prompts = {name: ids(40 + 9 * i, i) for i, name in enumerate(lengths)}
    expected = {name: tokens(loaded, prompts[name], n) for name, n in lengths.items()}
    monkeypatch.setattr(loaded.model, "forward", counted)
    with scheduling(loaded, started=False) as scheduler:
        clients = [Client(name, prompts[name], n) for name, n in lengths.items()]
        for client in clients:
            scheduler.submit(client.job)
        scheduler.start()
        assert all(isinstance(client.end(), Done) for client in clients)
    assert sum(batches) == sum(n - 1 for n in lengths.values()), "the newest token is never fed"
    assert max(batches) >= 2, "they joined"
    assert batches[-1] == 1, "and left"
    for client in clients:
        text = "".join(event.text for _, event in client.log if isinstance(event, Piece))
        assert text == loaded.tokenizer.decode(expected[client.name], skip_special_tokens=True)


@pytest.mark.parametrize("step", [1, 3])
def test_a_cancelled_job_is_gone_before_the_next_step(loaded, step):
    rounds, closed = [], []

    def stepper(sequences):
        rounds.append([s.job.id for s in sequences])
        for outcome in step_in_turn(sequences):
            if len(rounds) == step and outcome[0].job.id == "leaving":
                outcome[0].job.cancel()
                yield outcome
                closed.append(scheduler.n_running)
            else:
                yield outcome

    with scheduling(loaded, stepper=stepper, started=False) as scheduler:
        leaving, staying = Client("leaving", ids(20), 50), Client("staying", ids(20, 1), 12)
        scheduler.submit(leaving.job)
        scheduler.submit(staying.job)
        scheduler.start()
        assert staying.end().new_tokens == 12
    with_it = [i for i, names in enumerate(rounds) if "leaving" in names]
    assert closed == [1]
    assert with_it[-1] == step - 1


def test_a_queued_job_that_was_cancelled_never_runs(loaded):
    with scheduling(loaded, max_running=1, started=False) as scheduler:
        first, gone, last = (Client(name, ids(20), 3) for name in ("first", "gone", "last"))
        for client in (first, gone, last):
            scheduler.submit(client.job)
        gone.job.cancel()
        scheduler.start()
        assert isinstance(first.end(), Done)
        assert isinstance(last.end(), Done)
    assert not [event for _, event in gone.log if isinstance(event, Progress | Piece | Done)]


def test_who_waits_hears_of_the_position(loaded):
    with scheduling(loaded, max_running=1, started=False) as scheduler:
        clients = [Client(str(i), ids(20), 2) for i in range(3)]
        assert [scheduler.submit(client.job) for client in clients] == [0, 1, 2]
        scheduler.start()
        assert all(isinstance(client.end(), Done) for client in clients)
    assert [event.position for _, event in clients[2].log if isinstance(event, Queued)] == [1, 0]


def test_past_the_queue_a_job_is_sent_away_with_a_time_to_come_back(loaded):
    with scheduling(loaded, max_running=1, max_queue=1, started=False) as scheduler:
        for name in "ab":
            scheduler.submit(Client(name, ids(8)).job)
        with pytest.raises(RequestError) as refused:
            scheduler.submit(Client("c", ids(8)).job)
    assert (refused.value.failure.status, refused.value.failure.code) == (503, "queue_full")
    assert refused.value.failure.retry_after_s >= 1


def test_jobs_run_side_by_side_as_far_as_they_fit_and_none_overtakes(loaded):
    rounds = []

    def stepper(sequences):
        rounds.append({s.job.id for s in sequences})
        yield from step_in_turn(sequences)

    with scheduling(loaded, stepper=stepper, started=False, room=Room(host=10)) as scheduler:
        sizes = {"a": 6, "b": 6, "c": 4}  # c would fit beside a
        clients = [Client(name, ids(8), 3, need=Room(host=size)) for name, size in sizes.items()]
        for client in clients:
            scheduler.submit(client.job)
        scheduler.start()
        assert all(isinstance(client.end(), Done) for client in clients)
    assert {"a", "b"} not in [names & {"a", "b"} for names in rounds]
    assert {"a", "c"} not in [names & {"a", "c"} for names in rounds]
    assert {"b", "c"} in rounds


def test_what_can_never_fit_is_refused_with_both_sizes(loaded):
    with (
        scheduling(loaded, room=Room(host=1024)) as scheduler,
        pytest.raises(RequestError, match=r"needs 2 KiB of host memory and the server has 1 KiB"),
    ):
        scheduler.submit(Client("a", ids(8), need=Room(host=2048)).job)


def test_a_late_job_ends_with_a_timeout(loaded):
    with scheduling(loaded) as scheduler:
        client = Client("late", ids(8), deadline_s=0.0)
        scheduler.submit(client.job)
        assert client.end().status == 504
        assert scheduler.n_running == 0


def test_a_request_that_fails_takes_nobody_with_it(loaded):
    def stepper(sequences):
        for sequence in sequences:
            if sequence.job.id == "bad":
                sequence.step = fail
        yield from step_in_turn(sequences)

    def fail():
        raise OSError("/secret/path is gone")

    with scheduling(loaded, stepper=stepper) as scheduler:
        bad, good = Client("bad", ids(8)), Client("good", ids(8, 1))
        scheduler.submit(bad.job)
        scheduler.submit(good.job)
        failure = bad.end()
        assert isinstance(good.end(), Done)
    assert failure.status == 500
    assert "secret" not in failure.message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_worker_leaves_nobody_waiting(loaded):
    def stepper(sequences):
        raise KeyError("a bug")
        yield

    with scheduling(loaded, stepper=stepper, started=False, max_running=1) as scheduler:
        clients = [Client(name, ids(8)) for name in "ab"]
        for client in clients:
            scheduler.submit(client.job)
        scheduler.start()
        assert [client.end().status for client in clients] == [503, 503]
        assert not scheduler.alive
        with pytest.raises(RequestError, match="shutting down"):
            scheduler.submit(Client("c", ids(8)).job)


def test_draining_lets_who_runs_finish_and_sends_away_who_waits(loaded):
    def stepper(sequences):
        scheduler.drain(30.0)
        yield from step_in_turn(sequences)

    with scheduling(loaded, stepper=stepper, started=False, max_running=1) as scheduler:
        running, waiting = Client("running", ids(8), 6), Client("waiting", ids(8))
        scheduler.submit(running.job)
        scheduler.submit(waiting.job)
        scheduler.start()
        assert waiting.end().code == "shutting_down"
        assert running.end().new_tokens == 6


def test_the_end_gives_files_back(loaded, tmp_path):
    config = {"offload": "nvme", "nvme_dir": tmp_path, "nvme_floor": 0}
    with scheduling(loaded, config=config, keep_sessions=2) as scheduler:
        kept, running = Client("kept", ids(80), 2), Client("running", ids(80, 1), 4000)
        scheduler.submit(kept.job)
        assert isinstance(kept.end(), Done)
        scheduler.submit(running.job)
        while not isinstance(running.events.get(timeout=30), Piece):
            pass
        assert [*tmp_path.iterdir()]
    assert running.end().code == "shutting_down"
    assert not [*tmp_path.iterdir()]


def test_a_prompt_that_goes_on_with_a_conversation_copies_its_kv(loaded):
    full = {"budget": "100%"}
    before = ids(90)
    answer = tokens(loaded, before, 6, **full)
    after = before + answer + ids(30, 3)
    with scheduling(loaded, config=full, keep_sessions=1) as scheduler:
        first, second, other = Client("1", before, 6), Client("2", after, 6), Client("3", ids(90, 9), 6)
        dones = []
        for client in (first, second, other):
            scheduler.submit(client.job)
            dones.append(client.end())
    text = "".join(event.text for _, event in second.log if isinstance(event, Piece))
    expected = loaded.tokenizer.decode(tokens(loaded, after, 6, **full), skip_special_tokens=True)
    assert text == expected
    assert [done.cached_tokens for done in dones] == [0, 95, 0]


def test_kept_conversations_make_room_for_requests(loaded):
    with scheduling(loaded, keep_sessions=4, room=Room(host=10)) as scheduler:
        for name in "abc":
            client = Client(name, ids(20, ord(name)), 2, need=Room(host=6))
            scheduler.submit(client.job)
            assert isinstance(client.end(), Done)
        assert len(scheduler._kept) == 1


@pytest.mark.parametrize("keep_sessions", [0, 1])
def test_a_session_that_cannot_be_closed_stops_nobody(loaded, monkeypatch, keep_sessions):
    def fail(session):
        close(session)
        raise OSError("the disk is gone")

    close = Session.close
    with scheduling(loaded, keep_sessions=keep_sessions) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "close", fail)
            for name in "abc":
                client = Client(name, ids(20, ord(name)), 2)
                scheduler.submit(client.job)
                assert isinstance(client.end(), Done)
        assert scheduler.alive


def test_the_room_of_a_server_is_what_is_free_and_what_the_caps_allow(loaded):
    config = RuntimeConfig(**(RUNTIME | {"offload": "nvme", "nvme_max": 3000, "nvme_floor": 100}))
    planner = Planner(loaded.config, config, dtype=loaded.model.dtype, device=loaded.model.device)
    room = planner.room(Free(host=1000, disk=1100))
    assert (room.host, room.disk, room.disk_kv, room.device) == (900, 900, 3000, float("inf"))
    few, many = planner.need(100), planner.need(1000)
    assert 0 < few.disk < many.disk
    assert 0 < few.host < many.host
    assert many.disk_kv == many.disk
    assert (few + many - many) == few
