"""What is swept away is what was made to be: no session is, whatever its name."""

import time
from pathlib import Path

import pytest
from kvoffload_storage.errors import UnavailableError
from kvoffload_storage.locks import NEW, PAGES, REMOVED, FolderLock, claim_name, make_locked, sweep


@pytest.mark.parametrize("prefix", [PAGES, NEW, REMOVED])
def test_a_session_with_the_name_of_something_temporary_is_kept(tmp_path: Path, prefix: str) -> None:
    session = tmp_path / f"{prefix}book.kvo"
    session.mkdir()
    made, lock = make_locked(tmp_path, prefix)
    lock.release()
    assert sweep(tmp_path) == [made.name]
    assert session.is_dir()


def test_removed_sessions_are_swept_by_their_longer_names(tmp_path: Path) -> None:
    (tmp_path / f"{REMOVED}0123456789abcdef").mkdir()
    assert sweep(tmp_path) == [f"{REMOVED}0123456789abcdef"]


def test_a_claim_on_a_name_waits_for_sweepers_and_outlives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_name(tmp_path / "a.kvo")
    folder = next(tmp_path.iterdir())
    assert sweep(tmp_path) == []
    claim.release()
    folder.mkdir()
    sweeper = FolderLock.take(folder)
    assert sweeper is not None
    monkeypatch.setattr(time, "sleep", lambda seconds: (folder.rmdir(), sweeper.release()))
    claim = claim_name(tmp_path / "a.kvo")
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(UnavailableError, match="exists already"):
        claim_name(tmp_path)
    claim.release()
