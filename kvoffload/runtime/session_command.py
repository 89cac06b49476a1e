"""What ``kvoffload session`` does, from paths to an exit code. No model is loaded."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from kvoffload_storage.archive import export_bundle, import_bundle
from kvoffload_storage.bundle import disk_bytes, lock_bundle, open_bundle, remove_bundle, save_bundle
from kvoffload_storage.bundle_check import damaged_pages
from kvoffload_storage.bundle_format import VERSION, Manifest
from kvoffload_storage.errors import IntegrityError, UnavailableError
from kvoffload_storage.locks import sweep
from kvoffload_storage.manifests import read_manifest, replace_manifest
from kvoffload_storage.rewrite import rewrite_bundle
from kvoffload_storage.space import Room

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.runtime.saving import room_beside
from kvoffload.runtime.session_file import changed_versions, describe, read_description
from kvoffload.runtime.terminal import write_json, write_table
from kvoffload.units import format_size


def run_ls(folder: Path, out: TextIO, *, as_json: bool) -> int:
    """The sessions in a folder, and what killed processes left there is removed."""
    with _told():
        if not folder.is_dir():
            raise UsageError(f"{str(folder)!r} is not a folder")
        sweep(folder)
        found = [_summary(path) for path in sorted(folder.glob("*.kvo"))]
    if as_json:
        write_json(out, {"sessions": found})
        return 0
    columns = ("name", "model", "tokens", "size", "saved", "pinned", "state")
    write_table(out, str(folder), columns, [tuple(_plain(row[name]) for name in columns) for row in found])
    return 0


def run_inspect(path: Path, out: TextIO, *, as_json: bool) -> int:
    """What a session is of; its pages are not read."""
    with _told():
        manifest = read_manifest(path)
        found = _inspection(path, manifest)
    if as_json:
        write_json(out, found)
        return 0
    write_table(out, str(path), ("what", "value"), [(name, _plain(value)) for name, value in found.items()])
    return 0


def run_verify(paths: Sequence[Path], out: TextIO, *, as_json: bool) -> int:
    """Read everything in the sessions; raises IntegrityError at the end if anything is damaged."""
    reports: list[dict[str, Any]] = []
    first: Exception | None = None
    missing: UsageError | None = None
    for path in paths:
        try:
            with _told():
                n_pages, damage = _verify(path)
        except UsageError as error:  # the others are read all the same
            missing = missing or error
            reports.append({"session": str(path), "error": str(error)})
            continue
        reports.append({"session": str(path), "pages": n_pages, "damaged": [str(error) for error in damage]})
        first = first or next(iter(damage), None)
        if not as_json:
            out.write(f"{path}: {n_pages:,} pages, {len(damage) or 'none'} damaged\n")
    if as_json:
        write_json(out, {"sessions": reports})
    if first is not None or missing is not None:
        raise first or missing  # type: ignore[misc]
    return 0


def run_rm(paths: Sequence[Path], out: TextIO) -> int:
    return _each(paths, remove_bundle, "removed", out)


def run_upgrade(paths: Sequence[Path], out: TextIO, config: RuntimeConfig) -> int:
    """Verify sessions and write them anew in one piece; there is no older format to come from yet."""
    done = f"rewritten in one piece, format version {VERSION}"
    return _each(paths, lambda path: rewrite_bundle(path, room=room_beside(path, config)), done, out)


def run_pin(paths: Sequence[Path], out: TextIO, *, pinned: bool) -> int:
    """Say whether sessions may be deleted to make room."""

    def pin(path: Path) -> None:
        lock = lock_bundle(path)
        replace_manifest(path, read_manifest(path).model_copy(update={"pinned": pinned}))
        lock.release()

    return _each(paths, pin, "pinned" if pinned else "not pinned: it may be deleted to make room", out)


def run_fork(path: Path, target: Path, out: TextIO, config: RuntimeConfig) -> int:
    """A second session with the same past; it shares the page files."""
    with _told():
        if target.exists():
            raise UsageError(f"{str(target)!r} exists already")
        _check_name(target)
        bundle = open_bundle(path)
        content, room = (bundle.stores, bundle.state, bundle.manifest.session), room_beside(target, config)
        try:
            save_bundle(target, *content, room=room)[1].release()
        finally:
            bundle.close()
    near = target.stat().st_dev == path.stat().st_dev
    out.write(f"{target}: {'shares its pages with' if near else 'on another file system, a copy of'} {path}\n")
    return 0


def run_export(path: Path, target: Path, out: TextIO, config: RuntimeConfig) -> int:
    """One file, for which no session is deleted."""
    room = Room(target.absolute().parent, floor_bytes=config.nvme_floor, spares=True)
    with _told():
        if target.exists():
            raise UsageError(f"{str(target)!r} exists already")
        out.write(f"{target}: {format_size(export_bundle(path, target, room=room))}\n")
    return 0


def run_import(archive: Path, path: Path, out: TextIO, config: RuntimeConfig) -> int:
    _check_name(path)
    room = room_beside(path, config)
    with _told():
        manifest = import_bundle(archive, path, read_description, room=room)
    out.write(f"{path}: {manifest.session['n_tokens']:,} tokens\n")
    return 0


def _check_name(path: Path) -> None:
    """What is called otherwise, neither ``session ls`` nor ``--nvme-max`` would see."""
    if path.suffix != ".kvo":
        raise UsageError(f"{str(path)!r}: let the name of a session end in .kvo")


@contextmanager
def _told() -> Iterator[None]:
    """A session that is not there or is in use is the user's business."""
    try:
        yield
    except UnavailableError as error:
        raise UsageError(str(error)) from error


def _each(paths: Sequence[Path], act: Callable[[Path], object], done: str, out: TextIO) -> int:
    for path in paths:
        with _told():
            act(path)
        out.write(f"{path}: {done}\n")
    return 0


def _verify(path: Path) -> tuple[int, list[IntegrityError]]:
    try:
        bundle = open_bundle(path)
    except IntegrityError as error:
        return 0, [error]
    try:
        read_description(bundle)
        return sum(sum(store.n_pages) for store in bundle.manifest.stores), list(damaged_pages(bundle))
    except IntegrityError as error:
        return 0, [error]
    finally:
        bundle.close()


def _summary(path: Path) -> dict[str, Any]:
    row = {"name": path.name, "model": "", "tokens": 0, "size": disk_bytes(path), "saved": "", "pinned": True}
    try:
        manifest = read_manifest(path)
        description = describe(manifest.session, path)
    except IntegrityError as error:
        return {**row, "state": f"damaged: {error}"}
    except UnavailableError as error:
        return {**row, "state": f"unusable: {error}"}
    state = "prefill not finished" if description.unfinished else "complete"
    return {
        **row,
        "model": description.model,
        "tokens": description.n_tokens,
        "saved": _when(manifest),
        "pinned": manifest.pinned,
        "state": state,
    }


def _inspection(path: Path, manifest: Manifest) -> dict[str, Any]:
    said = describe(manifest.session, path)
    return {
        "model": said.model,
        "tokens": said.n_tokens,
        "tokens_in_kv": said.n_in_kv,
        "unfinished": said.unfinished,
        **{f"fingerprint.{name}": value for name, value in said.fingerprint.model_dump().items()},
        **{f"version.{name}": value for name, value in said.versions.items()},
        "policy": said.policy,
        "saved": _when(manifest),
        "pinned": manifest.pinned,
        "pages": sum(sum(store.n_pages) for store in manifest.stores),
        "page_bytes": manifest.page_bytes,
        "size": disk_bytes(path),
        "segments": sum(len(store.segments) for store in manifest.stores),
        "note": changed_versions(said.versions),
    }


def _when(manifest: Manifest) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at))


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
