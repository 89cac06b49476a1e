"""Exports and imports: sizes, what is no plain file, full disks, and what a kill leaves behind."""

import errno
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import torch
from kvoffload_storage import CapacityError, FileStore, IntegrityError, StoreShape, UnavailableError, open_bundle
from kvoffload_storage import archive as archive_module
from kvoffload_storage.archive import export_bundle, import_bundle
from kvoffload_storage.archive_format import ARCHIVE_END, decode_member, encode_member
from kvoffload_storage.bundle import read_manifest, save_bundle
from kvoffload_storage.bundle_check import damaged_pages
from kvoffload_storage.bundle_format import new_name
from kvoffload_storage.locks import NEW, make_locked
from kvoffload_storage.space import Room

SHAPE = StoreShape(2, 2, 4096)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store = FileStore(tmp_path, SHAPE)
    for layer in range(2):
        store.append(layer, torch.randint(0, 256, (5, 2, 4096), dtype=torch.uint8))
    save_bundle(tmp_path / "a.kvo", [store.seal()], b"state", {})[1].release()
    store.close()
    return tmp_path / "a.kvo"


@pytest.fixture
def exported(saved: Path) -> Path:
    out = saved.parent / "a.tar"
    assert export_bundle(saved, out) == out.stat().st_size
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_is_a_tar_of_private_files_that_comes_back_whole(saved: Path, exported: Path) -> None:
    with tarfile.open(exported, "r:") as tar:
        assert tar.next().name == "manifest.json"  # type: ignore[union-attr]
        assert {m.mode for m in tar} == {0o600}
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    assert import_bundle(exported, saved.parent / "b.kvo") == read_manifest(saved)
    bundle = open_bundle(saved.parent / "b.kvo")
    bundle.close_after(damaged_pages(bundle))
    assert names(saved.parent) == ["a.kvo", "a.tar", "b.kvo"]


@pytest.mark.parametrize("n_bytes", [0, 1, (8 << 30) - 1, 8 << 30, 9 << 40])
def test_files_of_any_size_have_a_block(n_bytes: int) -> None:
    name = f"{new_name('pages')}/layer-0000.kv"
    block = encode_member(name, n_bytes)
    assert len(block) == 512
    assert decode_member(block, name="x") == (name, n_bytes)
    with tarfile.open(fileobj=io.BytesIO(block + ARCHIVE_END), mode="r:") as tar:  # others read it too
        assert tar.next().size == n_bytes  # type: ignore[union-attr]
    assert decode_member(ARCHIVE_END[:512], name="x") is None


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (tarfile.GNUTYPE_SPARSE, tarfile.GNU_FORMAT),
        (tarfile.GNUTYPE_LONGNAME, tarfile.GNU_FORMAT),
        (tarfile.XHDTYPE, tarfile.PAX_FORMAT),
        (tarfile.XGLTYPE, tarfile.PAX_FORMAT),
        (tarfile.SYMTYPE, tarfile.USTAR_FORMAT),
        (tarfile.LNKTYPE, tarfile.USTAR_FORMAT),
        (tarfile.DIRTYPE, tarfile.USTAR_FORMAT),
        (tarfile.CHRTYPE, tarfile.USTAR_FORMAT),
    ],
)
def test_whatever_is_no_plain_file_is_not_imported(saved: Path, exported: Path, kind: bytes, form: int) -> None:
    whole = exported.read_bytes()
    at = 512 + (read_manifest_bytes(saved) + 511) // 512 * 512
    name, size = decode_member(whole[at : at + 512], name="x")  # type: ignore[misc]
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    exported.write_bytes(whole[:at] + member.tobuf(form) + whole[at + 512 :])
    with pytest.raises(IntegrityError, match=rf"a\.tar: .* is not a plain file \(tar type {kind!r}\)"):
        import_bundle(exported, saved.parent / "b.kvo")
    assert names(saved.parent) == ["a.kvo", "a.tar"]


def read_manifest_bytes(path: Path) -> int:
    return (path / "manifest.json").stat().st_size


@pytest.mark.parametrize(
    ("n_padding", "why"), [(0, "shorter than the .* of its files"), (1 << 20, "is not a plain file")]
)
def test_an_archive_of_holes_is_refused_before_any_is_written(
    saved: Path, tmp_path: Path, n_padding: int, why: str
) -> None:
    """Sparse by a PAX header, as GNU tar --sparse writes it: the members' sizes are those of the manifest."""
    out = tmp_path / "holes.tar"
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in [saved / "manifest.json", *sorted(saved.glob("*-*"))]:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            for file in files:
                member = tarfile.TarInfo(str(file.relative_to(saved)))
                if file.suffix == ".kv":
                    real = str(file.stat().st_size)
                    member.pax_headers = {"GNU.sparse.size": real, "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,0"}
                    tar.addfile(member)
                else:
                    member.size = file.stat().st_size
                    tar.addfile(member, io.BytesIO(file.read_bytes()))
    with out.open("ab") as file:
        file.write(bytes(n_padding))
    with pytest.raises(IntegrityError, match=rf"holes\.tar: .*{why}"):
        import_bundle(out, tmp_path / "b.kvo")
    assert names(tmp_path) == ["a.kvo", "holes.tar"]


def test_exports_of_the_first_days_are_imported(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "old.tar"
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in [saved / "manifest.json", *sorted(saved.glob("*-*"))]:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                member = tarfile.TarInfo(str(file.relative_to(saved)))
                member.size = file.stat().st_size
                tar.addfile(member, io.BytesIO(file.read_bytes()))
    assert import_bundle(out, tmp_path / "b.kvo") == read_manifest(saved)


def test_damage_is_told_of_the_archive_and_not_of_a_folder_that_is_gone(saved: Path, exported: Path) -> None:
    data = bytearray(exported.read_bytes())
    data[data.index((saved / read_manifest(saved).checksums.file).read_bytes())] ^= 1
    exported.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"a\.tar/checksums-.*: checksum") as caught:
        import_bundle(exported, saved.parent / "b.kvo")
    assert NEW not in str(caught.value)


def test_a_disk_without_room_for_an_archive_takes_none_of_it(
    saved: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError, match=r"b\.kvo: no room for [\d,]+ bytes"):
        import_bundle(exported, saved.parent / "b.kvo")
    assert names(saved.parent) == ["a.kvo", "a.tar"]


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_full_disk_is_not_the_archives_fault(
    saved: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        write = refuse  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        if name == "write":
            patch.setattr(os, "fdopen", Full)
        else:
            patch.setattr(os, "fsync", refuse)
        with pytest.raises(CapacityError, match=r"no room for [\d,]+ bytes"):
            import_bundle(exported, saved.parent / "b.kvo")
        with pytest.raises(CapacityError, match=r"c\.tar: no room for"):
            export_bundle(saved, saved.parent / "c.tar")
    assert names(saved.parent) == ["a.kvo", "a.tar"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, UnavailableError), (errno.EISDIR, UnavailableError), (errno.EMFILE, CapacityError)],
)
def test_an_archive_that_cannot_be_read_says_why(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(kind, match=rf"x\.tar: .*{os.strerror(number)}"):
        import_bundle(saved.parent / "x.tar", saved.parent / "b.kvo")


def test_the_next_export_removes_what_a_killed_one_left(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child is killed while it writes; a file that only looks alike stays."""
    beside = saved.parent / new_name("export")
    beside.write_text("mine")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(archive_module, "_pieces", lambda *args: os.kill(os.getpid(), 9))
        export_bundle(saved, saved.parent / "x.tar")
        os._exit(0)
    os.waitpid(child, 0)
    left = [path for path in saved.parent.iterdir() if path.name.startswith(NEW)]
    assert [path.suffix for path in left[0].iterdir()] == [".tar"]
    export_bundle(saved, saved.parent / "y.tar")
    assert names(saved.parent) == sorted(["a.kvo", beside.name, "y.tar"])


def test_an_export_beside_another_that_runs_leaves_it_alone(saved: Path) -> None:
    folder, lock = make_locked(saved.parent, NEW)
    (folder / new_name("export")).write_bytes(b"half")
    export_bundle(saved, saved.parent / "y.tar")
    assert len(list(folder.iterdir())) == 1
    lock.release()


def test_an_export_never_replaces_a_file_and_needs_no_path_to_its_pages(saved: Path, tmp_path: Path) -> None:
    bundle = open_bundle(saved, direct=False)
    for path in saved.glob("pages-*/*"):  # as a save by another process does
        path.unlink()
    archive_module._pack(bundle, tmp_path / "x.tar", Room(tmp_path))
    bundle.close()
    import_bundle(tmp_path / "x.tar", tmp_path / "b.kvo")
    with pytest.raises(Exception, match="File exists"):
        export_bundle(tmp_path / "b.kvo", tmp_path / "x.tar")
