"""Probing and measuring a directory's disk."""

import errno
import os
from pathlib import Path

import pytest
from kvoffload_storage import StorageError, UnavailableError, disk, free_bytes, measure_disk, probe_direct


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    direct, note = probe_direct(tmp_path)
    assert direct == (note == "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_refusal_of_direct_io_is_a_note(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(os, call)

    def refuse(*args: object, **options: object) -> object:
        if call == "open" and not (isinstance(args[1], int) and args[1] & os.O_DIRECT):
            return real(*args, **options)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, call, refuse)
    direct, note = probe_direct(tmp_path)
    assert not direct
    assert "Invalid argument" in note


def test_direct_io_that_brings_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 4096)
    assert probe_direct(tmp_path) == (False, "direct I/O brought back other bytes")


def test_a_directory_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nowhere"):
        probe_direct(tmp_path / "nowhere")
    with pytest.raises(UnavailableError, match="nowhere"):
        free_bytes(tmp_path / "nowhere")


def test_a_measurement_is_short_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_FILE_BYTES", 4 << 20)
    speed = measure_disk(tmp_path, seconds=0.01)
    assert min(speed.write_mb_s, speed.read_mb_s, speed.read_iops) > 0
    assert speed.read_mb_s == pytest.approx(speed.read_iops * 65536 / 1e6)
    assert 4096 <= speed.read_unit <= 1 << 20
    assert list(tmp_path.iterdir()) == []
    assert free_bytes(tmp_path) > 0


@pytest.mark.parametrize(
    ("own_us", "mb_s", "unit"),
    [(0, 800, 4 << 10), (10, 800, 8 << 10), (10.7, 880, 16 << 10), (100, 800, 128 << 10), (80_000, 150, 1 << 20)],
)
def test_the_unit_of_reads_is_where_their_bytes_take_as_long_as_they_do(own_us: float, mb_s: float, unit: int) -> None:
    small_s, large_s = (own_us * 1e-6 + size / (mb_s * 1e6) for size in (4 << 10, 64 << 10))
    assert disk.read_unit(small_s, large_s) == unit


def test_a_disk_that_fails_while_measured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "probe_direct", lambda directory: (False, "off"))

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(StorageError, match=r"layer-0000\.kv: Input/output error"):
        measure_disk(tmp_path, seconds=0.01)
    assert list(tmp_path.iterdir()) == []
