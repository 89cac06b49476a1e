"""Sessions on disk: the order of a save, locks, sweeping, and what is refused."""

import errno
import multiprocessing
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    FileStore,
    IntegrityError,
    StorageError,
    StoreShape,
    UnavailableError,
    lock_bundle,
    open_bundle,
    read_manifest,
    remove_bundle,
    save_bundle,
    sweep,
)
from kvoffload_storage.locks import PAGES, REMOVED, make_locked
from torch import Tensor

SHAPE = StoreShape(2, 2, 4096)
STRIDE = 8192


def pages_of(n: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, SHAPE.n_slices, SHAPE.slice_bytes), dtype=torch.uint8, generator=random)


def read_all(store: FileStore, layer: int) -> Tensor:
    out = torch.zeros(store.n_pages(layer), SHAPE.n_slices, SHAPE.slice_bytes, dtype=torch.uint8)
    store.read_pages(layer, 0, out).wait()
    return out


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    made = FileStore(tmp_path, SHAPE)
    made.append(0, pages_of(7))
    made.append(1, pages_of(3, seed=1))
    yield made
    made.close()


def save(path: Path, store: FileStore, **options: bool) -> None:
    save_bundle(path, [store.seal()], b"state", {"n": 1}, **options)[1].release()  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path, store: FileStore) -> Path:
    save(tmp_path / "a.kvo", store)
    store.close()
    return tmp_path / "a.kvo"


def test_pages_come_back_from_a_session_and_grow_behind_it(tmp_path: Path, saved: Path) -> None:
    bundle = open_bundle(saved)
    assert (bundle.state, bundle.manifest.session, bundle.manifest.pinned) == (b"state", {"n": 1}, True)
    again = FileStore(tmp_path, SHAPE, begin=bundle.stores[0])
    assert again.verify() == 10
    again.append(1, pages_of(9, seed=2))
    again.flush()
    both = torch.cat([pages_of(3, seed=1), pages_of(9, seed=2)])
    assert torch.equal(read_all(again, 1), both)
    out = torch.zeros(4, 4096, dtype=torch.uint8)
    again.read_slices(1, torch.tensor([11, 0, 3, 0]), torch.tensor([1, 0, 1, 0]), out).wait()
    assert torch.equal(out, both[[11, 0, 3, 0], [1, 0, 1, 0]])
    save(saved, again)
    again.close()
    third = FileStore(tmp_path, SHAPE, begin=open_bundle(saved, direct=False).stores[0], direct="off")
    assert third.verify() == 19
    assert [s.n_pages for s in read_manifest(saved).stores[0].segments] == [(7, 3), (0, 9)]
    third.close()


def test_pages_appended_after_a_save_are_not_in_it(tmp_path: Path, store: FileStore) -> None:
    save(tmp_path / "a.kvo", store)
    store.append(0, pages_of(50, seed=5))
    store.flush()
    bundle = open_bundle(tmp_path / "a.kvo")
    assert bundle.stores[0].n_pages(0) == 7
    bundle.close()


def test_files_and_folders_are_private(saved: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700


def test_a_slice_is_verified_when_asked(tmp_path: Path, saved: Path) -> None:
    file = next(saved.glob("pages-*/layer-0000.kv"))
    data = bytearray(file.read_bytes())
    data[4096 + 2 * STRIDE + 4096 + 17] ^= 1
    file.write_bytes(data)
    out = torch.zeros(1, 4096, dtype=torch.uint8)
    for verify in (False, True):
        again = FileStore(tmp_path, SHAPE, begin=open_bundle(saved).stores[0], verify=verify)
        again.read_slices(0, torch.tensor([2]), torch.tensor([0]), out).wait()
        ticket = again.read_slices(0, torch.tensor([2]), torch.tensor([1]), out)
        if verify:
            with pytest.raises(IntegrityError, match="layer 0, page 2, slice 1") as caught:
                ticket.wait()
            assert (caught.value.layer, caught.value.page) == (0, 2)
        else:
            ticket.wait()
        again.close()


def truncate(name: str, n_bytes: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(next(path.glob(name)), n_bytes)


def swap_layers(path: Path) -> None:
    first, second = sorted(path.glob("pages-*/*"))
    second.write_bytes(first.read_bytes())


def link_layer(path: Path) -> None:
    first, second = sorted(path.glob("pages-*/*"))
    first.unlink()
    first.symlink_to(second)


def link_segment(path: Path) -> None:
    folder = next(path.glob("pages-*"))
    folder.rename(path.parent / "elsewhere")
    folder.symlink_to(path.parent / "elsewhere")


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: next(path.glob(name)).unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            truncate("pages-*/layer-0000.kv", 4096 + 6 * STRIDE),
            r"layer-0000\.kv: room for 6 pages, the manifest says 7",
        ),
        (truncate("pages-*/layer-0000.kv", 100), r"layer-0000\.kv: header has 100 bytes"),
        (truncate("checksums-*", 1 << 40), r"checksums-.*: 1,099,511,627,776 bytes, expected at most 160"),
        (truncate("state-*", 4), r"state-.*: 4 bytes, expected 5"),
        (truncate("manifest.json", 0), r"manifest\.json: checksum"),
        (swap_layers, r"layer-0001\.kv: header says .*layer=0"),
        (link_layer, r"layer-0000\.kv: Too many levels"),
        (link_segment, "not a folder"),
        (remove("pages-*/layer-0001.kv"), r"layer-0001\.kv: No such file"),
        (remove("state-*"), r"state-.*missing"),
    ],
)
def test_a_damaged_session_is_refused_by_file(saved: Path, damage: Callable[[Path], None], complaint: str) -> None:
    damage(saved)
    with pytest.raises(IntegrityError, match=complaint):
        open_bundle(saved)


@pytest.mark.parametrize("file", ["manifest.json", "state-", "checksums-", "layer-0001.kv"])
@pytest.mark.parametrize(
    ("number", "kind", "complaint"),
    [
        (errno.EMFILE, CapacityError, r"Too many open files \(.* may have [\d,]+, see"),
        (errno.ENFILE, CapacityError, "Too many open files in system"),
        (errno.EACCES, UnavailableError, "Permission denied"),
        (errno.EIO, StorageError, "Input/output error"),
    ],
)
def test_what_cannot_be_opened_is_not_called_damaged(
    saved: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int, kind: type[StorageError], complaint: str
) -> None:
    really_open = os.open

    def refuse(path: str | Path, *args: int, **options: int) -> int:
        if file in str(path):
            raise OSError(number, os.strerror(number))
        return really_open(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=rf"{file}.*: {complaint}") as caught:
        open_bundle(saved)
    assert type(caught.value) is kind


def test_a_folder_that_cannot_be_locked_for_want_of_descriptors_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CapacityError, match="Too many open files"):
        FileStore(tmp_path, SHAPE)
    with pytest.raises(CapacityError, match="Too many open files"):
        lock_bundle(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rename", "replace", "fsync", "fdatasync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_leaves_the_last_one(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    path = tmp_path / "a.kvo"
    save(path, store)
    before = read_manifest(path)
    store.append(0, pages_of(1, seed=9))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        if name in ("rename", "link"):  # the first is for new sessions, the second has copies to fall back on
            save(path, store)
            before = read_manifest(path)
        else:
            with pytest.raises(CapacityError if number == errno.ENOSPC else StorageError):
                save(path, store)
        if name == "rename":
            with pytest.raises(CapacityError if number == errno.ENOSPC else StorageError):
                save(tmp_path / "b.kvo", store)
    assert read_manifest(path) == before
    open_bundle(path).close()
    save(path, store)
    assert len(list(path.iterdir())) == 4
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(PAGES)) == ["a.kvo"]


def test_a_session_on_another_file_system_gets_copies(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        save(tmp_path / "a.kvo", store)
    bundle = open_bundle(tmp_path / "a.kvo")
    store.close()
    again = FileStore(tmp_path, SHAPE, begin=bundle.stores[0])
    assert again.verify() == 10
    again.close()
    assert len(list((tmp_path / "a.kvo").iterdir())) == 4


def test_one_writer_at_a_time(saved: Path, tmp_path: Path) -> None:
    lock = lock_bundle(saved)
    with pytest.raises(UnavailableError, match="another process is writing"):
        lock_bundle(saved)
    with pytest.raises(UnavailableError, match="another process is writing"):
        remove_bundle(saved)
    lock.release()
    remove_bundle(saved)
    assert list(tmp_path.iterdir()) == []


def test_only_sessions_are_removed(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(UnavailableError, match="no such session"):
        remove_bundle(tmp_path / "notes")
    assert (tmp_path / "notes").exists()


def _hold(parent: Path, ready: "multiprocessing.connection.Connection") -> None:  # type: ignore[name-defined]
    store = FileStore(parent, SHAPE)
    store.append(0, pages_of(3))
    ready.send(str(store.directory))
    signal.pause()


def test_pages_of_a_killed_process_are_swept_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(tmp_path, theirs))
    child.start()
    folder = Path(ours.recv())
    assert sweep(tmp_path) == []
    assert folder.exists()
    child.kill()
    child.join()
    store = FileStore(tmp_path, SHAPE)
    assert not folder.exists()
    store.close()


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    path, lock = make_locked(tmp_path, PAGES)
    (path / "thesis.txt").write_text("important")
    lock.release()
    (tmp_path / f"{PAGES}file").write_text("a file")
    assert sweep(tmp_path) == []
    assert (path / "thesis.txt").exists()


def add_notes(session: Path) -> set[str]:
    """Files of the user's at places in a session; their names and those of their folders."""
    (session / "notes").mkdir()
    segment = next(session.glob("pages-*"))
    for folder in (session, session / "notes", segment):
        (folder / "thesis.txt").write_text("important")
    (session / "notes" / "manifest.json").write_text("mine")
    (session / f"pages-{'0' * 16}").symlink_to(session / "notes")
    return {
        "thesis.txt",
        "notes",
        "notes/thesis.txt",
        "notes/manifest.json",
        segment.name,
        f"{segment.name}/thesis.txt",
    }


def remains(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_not_ours_stays_of_a_removed_session_and_is_told_once(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = add_notes(saved)
    remove_bundle(saved)
    assert not saved.exists()
    (left,) = saved.parent.iterdir()
    assert remains(left) == expected
    assert len(caplog.records) == 1
    assert str(left) in caplog.text
    assert sweep(saved.parent) == []
    assert remains(left) == expected
    assert len(caplog.records) == 1


def test_what_a_killed_removal_left_goes_but_for_what_is_not_ours(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = add_notes(saved)
    away = saved.parent / f"{REMOVED}0123456789abcdef"
    saved.rename(away)
    for _ in range(2):
        assert sweep(saved.parent) == []
        assert remains(away) == expected
        assert len(caplog.records) == 1
    shutil.rmtree(away)
    assert sweep(saved.parent) == []
