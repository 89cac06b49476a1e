"""Processes that work on sessions and are killed at random moments; what was told to be saved must be there."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from kvoffload_storage import open_bundle, sweep
from kvoffload_storage.bundle_check import damaged_pages
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.models.catalog import LoadedModel
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.session import Session
from kvoffload.runtime.session_command import run_rm
from kvoffload.runtime.session_file import decode_state, describe

TEMPORARY = ("kvoffload-pages-", "kvoffload-new-", "kvoffload-rm-")


def runtime(loaded: LoadedModel, parent: Path) -> Runtime:
    config = RuntimeConfig(**(SMALL | {"offload": "nvme", "nvme_dir": parent, "prefill_chunk": 40, "budget": "20%"}))
    return Runtime(loaded, config)


def work(loaded: LoadedModel, parent: Path, seed: int, told: Connection) -> None:
    """Prefill, decode, save, fork and delete until killed; every finished save, a fork's too, is told with its
    tokens."""
    chance, rt = random.Random(seed), runtime(loaded, parent)
    with open(os.devnull, "w") as nowhere:
        while True:
            path = parent / f"{chance.choice('abc')}.kvo"
            if path.exists() and chance.random() < 0.2:
                told.send((path.name, None))
                run_rm([path], nowhere)
                continue
            told.send((path.name, ()))
            with rt.open_session(path) as session:
                session.prefill([chance.randrange(256) for _ in range(chance.randrange(1, 200))])
                told.send((path.name, tuple(session.token_ids)))
                session.generate(SamplingConfig(max_new_tokens=chance.randrange(1, 20)))
                session.save(path)
                told.send((path.name, tuple(session.token_ids)))
                if chance.random() < 0.2:
                    fork(session, parent / "fork.kvo", told)


def fork(session: Session, path: Path, told: Connection) -> None:
    """Save a session under another name too, in the place of an earlier fork."""
    if path.exists():
        told.send((path.name, None))
        with open(os.devnull, "w") as nowhere:
            run_rm([path], nowhere)
    session.save(path)
    told.send((path.name, tuple(session.token_ids)))


def kill_once(loaded: LoadedModel, parent: Path, seed: int, acknowledged: dict[str, tuple[int, ...]]) -> int:
    """Let a process work for a random time, kill it, and check; how many sessions were opened."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(loaded, parent, seed, theirs))
    child.start()
    theirs.close()
    pause = random.Random(-seed).uniform(0.02, 1.2)
    end = time.monotonic() + pause
    messages = []
    while (left := end - time.monotonic()) > 0:
        if ours.poll(left):
            messages.append(ours.recv())
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "it died of an error before"
    try:
        while ours.poll():
            messages.append(ours.recv())
    except EOFError:
        pass
    for name, tokens in messages:
        if tokens is None:
            acknowledged.pop(name, None)
        elif tokens:
            acknowledged[name] = tokens
    return check(parent, acknowledged)


def check(parent: Path, acknowledged: dict[str, tuple[int, ...]]) -> int:
    """Everything that was acknowledged opens, verifies and has its tokens; nothing of a killed process is left after
    the next start."""
    sweep(parent)
    left = [path.name for path in parent.iterdir() if path.name.startswith(TEMPORARY)]
    assert left == [], left
    found = 0
    for path in sorted(parent.glob("*.kvo")):
        bundle = open_bundle(path)
        description = describe(bundle.manifest.session, path)
        tokens = decode_state(bundle.state, description, path)["token_ids"].tolist()
        bundle.close_after(damaged_pages(bundle))
        known = acknowledged.get(path.name, ())
        assert tuple(tokens[: len(known)]) == known, (path, len(known), len(tokens))
        found += 1
    assert set(acknowledged) <= {path.name for path in parent.glob("*.kvo")}, acknowledged.keys()
    return found


def check_no_rubbish(loaded: LoadedModel, parent: Path) -> None:
    """After one more save of every session it holds nothing that its manifest does not name."""
    rt = runtime(loaded, parent)
    for path in parent.glob("*.kvo"):
        with rt.open_session(path) as session:
            session.prefill([1, 2, 3])
        manifest = open_bundle(path)
        assert {p.name for p in path.iterdir()} == manifest.manifest.files | {"manifest.json"}
        manifest.close()
    for path in parent.iterdir():
        assert path.suffix == ".kvo", path
        shutil.rmtree(path)
