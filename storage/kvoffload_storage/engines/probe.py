"""Trying in a process of its own what may be answered with a kill, which cannot be caught."""

import signal
import subprocess
import sys


def why_not(*arguments: str, timeout_s: float = 20.0) -> str:
    """Why this Python with these arguments does not end well, or "" if it does: the last line of its complaint."""
    try:
        child = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the probe could not run: {error}"
    if child.returncode == 0:
        return ""
    if child.returncode == -signal.SIGILL:
        return "what is installed uses CPU instructions that this machine lacks (SIGILL)"
    if child.returncode < 0:
        return f"the system killed the probe ({signal.Signals(-child.returncode).name})"
    return (child.stderr.strip().splitlines() or [f"the probe ended with {child.returncode}"])[-1]
