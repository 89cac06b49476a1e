"""A whole life of a session with one system call going wrong: right tokens or one of our errors, and nothing lost."""

import errno
import fcntl
import os
import threading
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
FAULTS = ("EIO", "ENOSPC", "EINTR", "short", "nothing", "slow")
FIELDS = SMALL | {"offload": "nvme", "budget": "60%", "prefill_chunk": 50, "cpu_max": "8KiB", "verify": True}


class FaultyCalls:
    """Counts the storage package's system calls; of those of ``name`` that can have that fault the ``number``-th goes
    wrong. Without ``links`` hard links are refused, as by some file systems, and files are copied."""

    def __init__(self, name="", number=0, fault="", *, links=True, latency_s=1.0):
        self.name, self.number, self.fault, self.links, self.latency_s = name, number, fault, links, latency_s
        self.counts, self.shorter = dict.fromkeys(CALLS, 0), dict.fromkeys(CALLS, 0)
        self.injected = False
        self._real = {name: getattr(os, name) for name in CALLS}
        self._lock = threading.Lock()

    def __enter__(self):
        for name in CALLS:
            setattr(os, name, self._wrapped(name))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def n_able(self, name, fault) -> int:
        """How many calls of a name can go wrong like that; ``shorter`` can do a part of their work."""
        if fault == "nothing" and name not in PART:
            return 0
        return (self.shorter if fault == "short" else self.counts)[name]

    def _wrapped(self, name):
        real = self._real[name]

        def call(*args, **kwargs):
            part = PART[name](*args) if name in PART else None
            with self._lock:
                self.counts[name] += 1
                self.shorter[name] += part is not None
                able = name == self.name and (self.fault != "short" or part is not None)
                hit = able and not self.injected and self.n_able(name, self.fault) == self.number
                self.injected |= hit
            if hit:
                return self._goes_wrong(real, args, kwargs, part)
            if name == "link" and not self.links:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return real(*args, **kwargs)

        return call

    def _goes_wrong(self, real, args, kwargs, part):
        if self.fault == "slow":
            time.sleep(self.latency_s)
            return real(*args, **kwargs)
        if self.fault == "short":
            return real(*part)
        if self.fault == "nothing":
            return 0
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number))


def half_read(fd, buffers, offset):
    """``preadv`` of half of the bytes; None where there is no half."""
    kept, left = [], half(fd, sum(map(len, buffers)))
    for buffer in buffers:
        kept.append(buffer[:left])
        left -= len(kept[-1])
    return (fd, kept, offset) if len(kept[0]) else None


def half_written(fd, view, offset):
    n_bytes = half(fd, len(view))
    return (fd, view[:n_bytes], offset) if n_bytes else None


def half_sent(to, source, offset, n_bytes):
    return (to, source, offset, n_bytes // 2) if n_bytes > 1 else None


def half(fd, n_bytes):
    """In whole blocks where the file is open for direct I/O, which gives nothing else."""
    direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    return n_bytes // 2 // 4096 * 4096 if direct else n_bytes // 2


PART = {"preadv": half_read, "pwrite": half_written, "sendfile": half_sent}  # the other calls do all or nothing


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
