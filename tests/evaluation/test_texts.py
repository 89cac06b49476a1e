"""Files become disjoint pieces, in turn."""

from pathlib import Path

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.texts import cut_pieces, text_files
from kvoffload.models.shapes import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 3)
    (tmp_path / "b.txt").write_text("01234567" * 2)
    (tmp_path / ".hidden").write_text("no")
    return tmp_path


def test_folders_patterns_and_files_are_files_once(folder, monkeypatch):
    both = (folder / "a.txt", folder / "b.txt")
    assert text_files([folder]) == text_files([folder / "*.txt", folder / "a.txt"]) == both
    monkeypatch.chdir(folder)
    assert text_files([Path("b*")]) == (Path("b.txt"),)


def test_pieces_are_disjoint_and_taken_from_the_files_in_turn(folder):
    pieces = cut_pieces(byte_tokenizer(), text_files([folder]), n_tokens=8, n_pieces=5)
    assert [piece.name for piece in pieces] == ["a.txt@0", "b.txt@0", "a.txt@8", "b.txt@8", "a.txt@16"]
    assert {len(piece.token_ids) for piece in pieces} == {8}


def test_a_text_that_is_too_short_says_how_much_is_needed(folder):
    with pytest.raises(
        UsageError, match=r"6 pieces of 8 tokens are needed \(48 in all\), 2 files with 40 tokens have 5"
    ):
        cut_pieces(byte_tokenizer(), text_files([folder]), n_tokens=8, n_pieces=6)


def test_empty_and_binary_files_are_refused(folder):
    (folder / "c.txt").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        text_files([folder / "c.txt"])
    (folder / "d.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        text_files([folder / "d.txt"])
