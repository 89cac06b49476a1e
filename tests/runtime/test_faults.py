"""A sample of ``scripts/fault-check``."""

import os

import pytest
from faults import CALLS, FAULTS, FaultyCalls, life, run_with_fault


@pytest.fixture(scope="module", params=[True, False], ids=["links", "copies"])
def known(loaded, tmp_path_factory, request):
    """The tokens of a life without faults, and its calls."""
    told, calls = [], FaultyCalls(links=request.param)
    with calls:
        life(loaded, tmp_path_factory.mktemp("life"), told)
    return told, calls


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_goes_wrong_costs_no_token_and_no_session(loaded, tmp_path, known, fault):
    told, seen = known
    outcomes = set()
    for name in CALLS if seen.links else ["sendfile"]:
        n_able = seen.n_able(name, fault)
        for number in {n_able // 2, n_able} - {0} if name == "pwrite" else {n_able // 2} - {0}:
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            calls = FaultyCalls(name, number, fault, links=seen.links, latency_s=0.1)
            outcomes.add(run_with_fault(loaded, folder, calls, told))
            assert calls.injected
    assert outcomes <= {"fine", "StorageError", "CapacityError", "OutOfRoomError", "IntegrityError", "UnavailableError"}
    assert (outcomes == {"fine"}) == (fault in {"slow", "short"})


def test_only_calls_that_can_do_a_part_of_their_work_are_made_short(known):
    _, seen = known
    able = {name for name in CALLS if seen.n_able(name, "short")}
    assert able == {"preadv", "pwrite"} | (set() if seen.links else {"sendfile"})


@pytest.mark.parametrize("name", ["preadv", "pwrite", "sendfile"])
def test_a_short_call_does_half_of_its_work(tmp_path, name):
    path, got = tmp_path / "a", bytearray(100)
    path.write_bytes(bytes(range(100)))
    with path.open("r+b") as file, (tmp_path / "b").open("wb") as to, FaultyCalls(name, 1, "short") as calls:
        work = {
            "preadv": lambda: os.preadv(file.fileno(), [memoryview(got)], 0),
            "pwrite": lambda: os.pwrite(file.fileno(), memoryview(got), 0),
            "sendfile": lambda: os.sendfile(to.fileno(), file.fileno(), 0, 100),
        }[name]
        assert [work(), work()] == [50, 100]
    assert calls.injected
