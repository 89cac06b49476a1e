"""A short run of ``scripts/kill-check``, in a process of its own because it forks; and that a fork is acknowledged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import check, work
from kvoffload_storage.bundle import remove_bundle

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill-check"


def test_killed_processes_lose_nothing_and_leave_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["sessions_verified"] > 0
    assert (report["lost"], report["orphans"]) == (0, 0)


class KilledError(Exception):
    """In the place of a kill."""


class UntilForked:
    """What a process tells, up to its first fork, which is soon."""

    def __init__(self):
        self.acknowledged, self.n_forks, self.n_messages = {}, 0, 0

    def send(self, message):
        name, tokens = message
        self.n_messages += 1
        if tokens:
            self.acknowledged[name] = tokens
        self.n_forks += name == "fork.kvo" and bool(tokens)
        if self.n_forks == 1 or self.n_messages == 300:
            raise KilledError


def test_a_lost_fork_is_missed(loaded, tmp_path):
    told = UntilForked()
    with pytest.raises(KilledError):
        work(loaded, tmp_path, 1, told)
    assert check(tmp_path, told.acknowledged) > 1
    remove_bundle(tmp_path / "fork.kvo")
    with pytest.raises(AssertionError, match=r"fork\.kvo"):
        check(tmp_path, told.acknowledged)
