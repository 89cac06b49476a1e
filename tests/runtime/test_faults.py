"""A sample of ``scripts/fault-check``."""

import pytest
from faults import FAULTS, FaultyCalls, life, run_with_fault


@pytest.fixture(scope="module")
def expected(loaded, tmp_path_factory):
    told, calls = [], FaultyCalls()
    with calls:
        life(loaded, tmp_path_factory.mktemp("life"), told)
    return told, calls.counts


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_goes_wrong_costs_no_token_and_no_session(loaded, tmp_path, expected, fault):
    told, counts = expected
    outcomes = set()
    for name, n_calls in counts.items():
        for number in {n_calls // 2, n_calls} - {0} if name == "pwrite" else {n_calls // 2} - {0}:
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            outcomes.add(run_with_fault(loaded, folder, FaultyCalls(name, number, fault, latency_s=0.1), told))
    assert outcomes <= {"fine", "StorageError", "CapacityError", "OutOfRoomError", "IntegrityError", "UnavailableError"}
    assert (outcomes == {"fine"}) == (fault == "slow") or fault == "short"
