"""A short run of ``scripts/kill-check``, in a process of its own because it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill-check"


def test_killed_processes_lose_nothing_and_leave_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["sessions_verified"] > 0
    assert (report["lost"], report["orphans"]) == (0, 0)
