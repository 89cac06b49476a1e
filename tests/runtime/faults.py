"""A whole life of a session with one system call going wrong: right tokens or one of our errors, and nothing lost."""

import errno
import os
import time
from pathlib import Path

from kvoffload_storage import open_bundle, read_manifest, sweep
from kvoffload_storage.bundle_check import damaged_pages
from kvoffload_storage.errors import StorageError
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import KvoffloadError
from kvoffload.runtime.engine import Runtime

CALLS = (
    "preadv",
    "pwrite",
    "posix_fallocate",
    "fdatasync",
    "fsync",
    "ftruncate",
    "replace",
    "rename",
    "link",
    "sendfile",
)
FAULTS = ("EIO", "ENOSPC", "EINTR", "short", "slow")
FIELDS = SMALL | {"offload": "nvme", "budget": "60%", "prefill_chunk": 50, "cpu_max": "8KiB", "verify": True}


class FaultyCalls:
    """Counts the storage package's system calls; the ``number``-th of ``name`` goes wrong."""

    def __init__(self, name="", number=0, fault="", latency_s=1.0):
        self.name, self.number, self.fault, self.latency_s = name, number, fault, latency_s
        self.counts = dict.fromkeys(CALLS, 0)
        self._real = {name: getattr(os, name) for name in CALLS}

    def __enter__(self):
        for name in CALLS:
            setattr(os, name, self._wrapped(name))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrapped(self, name):
        real = self._real[name]

        def call(*args, **kwargs):
            self.counts[name] += 1
            if name != self.name or self.counts[name] != self.number:
                return real(*args, **kwargs)
            if self.fault == "slow":
                time.sleep(self.latency_s)
                return real(*args, **kwargs)
            if self.fault == "short":
                return self._short(name, real, args)
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))

        return call

    def _short(self, name, real, args):
        """Half of what was asked for, in whole blocks as direct I/O gives it."""
        if name == "preadv":
            fd, buffers, offset = args
            n_bytes = sum(map(len, buffers)) // 2 // 4096 * 4096
            return real(fd, [buffers[0][:n_bytes]], offset) if n_bytes and len(buffers[0]) >= n_bytes else 0
        if name == "pwrite":
            fd, view, offset = args
            return real(fd, view[: max(len(view) // 2 // 4096 * 4096, 4096)], offset)
        return real(*args)


def life(loaded, folder: Path, told: list):
    """Prefill, decode, save, restore, go on, save again; the tokens so far are told after every step."""
    rt = Runtime(loaded, RuntimeConfig(**FIELDS, nvme_dir=folder))
    path = folder / "a.kvo"
    prompt = [(7 * i) % 251 for i in range(130)]
    with rt.open_session(path) as session:
        session.prefill(prompt)
        session.generate(SamplingConfig(max_new_tokens=6))
        session.save(path)
        told.append(list(session.token_ids))
    with rt.open_session(path) as session:
        session.prefill(prompt[:40])
        session.generate(SamplingConfig(max_new_tokens=6))
        session.save(path)
        told.append(list(session.token_ids))


def run_with_fault(loaded, folder: Path, calls: FaultyCalls, expected) -> str:
    """One life with a fault: "fine" or the name of the error; AssertionError where a token is wrong, or something that
    was told is lost."""
    told, outcome = [], "fine"
    with calls:
        try:
            life(loaded, folder, told)
        except (StorageError, KvoffloadError) as error:
            outcome = type(error).__name__
    assert told == expected[: len(told)], "wrong tokens"
    assert outcome != "fine" or told == expected
    sweep(folder)
    path = folder / "a.kvo"
    if told:
        bundle = open_bundle(path)
        bundle.close_after(damaged_pages(bundle))
        n_saved = bundle.manifest.session["n_tokens"]
        assert n_saved >= len(told[-1]), "an acknowledged save is lost"
    elif path.exists():
        read_manifest(path)
    assert [p.name for p in folder.iterdir() if p != path] == [], "rubbish"
    return outcome
