"""``page_size = auto``: a number before anything is allocated, the same one for the same folder."""

import errno
import os
from pathlib import Path

import pytest
import torch
from kvoffload_storage import UnavailableError, disk

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.runtime import page_size
from kvoffload.runtime.engine import Runtime, checked
from kvoffload.runtime.page_size import page_size_for, page_size_hint, settle_page_size
from kvoffload.units import AUTO_PAGE
from tests.runtime.tiny import load

KIB = 1 << 10


class Shape:
    """As much of a model's config as page sizes need: a token and head has 512 bytes in 16 bits."""

    num_key_value_heads, num_attention_heads, num_hidden_layers, head_dim = 2, 4, 2, 128

    def get_text_config(self, *, decoder: bool) -> "Shape":
        return self


def settle(config: RuntimeConfig) -> int:
    return settle_page_size(config, Shape(), torch.bfloat16).page_size


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were measured; the unit is 16 KiB the first time, then 4 KiB."""
    folders: list[Path] = []

    def measure(folder: Path, **_: int) -> disk.DiskSpeed:
        folders.append(folder)
        return disk.DiskSpeed(1, 1, 1, (16 if len(folders) == 1 else 4) * KIB, True, "")

    monkeypatch.setattr(page_size, "measure_disk", measure)
    return folders


@pytest.mark.parametrize(
    ("unit", "token_bytes", "size"),
    [(4, 256, 16), (8, 256, 32), (16, 256, 64), (1024, 256, 64), (8, 512, 16), (16, 512, 32), (16, 384, 64)],
)
def test_a_page_is_the_smallest_whose_slice_is_worth_a_read(unit: int, token_bytes: int, size: int) -> None:
    assert page_size_for(unit * KIB, token_bytes) == size


def test_a_disk_is_measured_once_for_its_folder(tmp_path: Path, measured: list[Path]) -> None:
    config = RuntimeConfig(offload="nvme", nvme_dir=tmp_path / "new", page_size="auto")
    assert [settle(config), settle(config)] == [32, 32]
    assert measured == [tmp_path / "new"]
    assert disk.kept_read_unit(tmp_path / "new") == 16 * KIB


def test_without_files_auto_is_the_default_and_nothing_is_measured(measured: list[Path]) -> None:
    assert settle(RuntimeConfig(page_size="auto")) == RuntimeConfig().page_size
    assert settle(RuntimeConfig(offload="nvme", page_size=8)) == 8
    assert measured == []


@pytest.mark.parametrize("damage", ["", "16385\n", "-4096\n", "8192 " * 9, "²"])
def test_a_kept_unit_that_is_none_is_not_used(damage: str, tmp_path: Path) -> None:
    (tmp_path / disk.UNIT_FILE).write_text(damage)
    assert disk.kept_read_unit(tmp_path) is None
    assert disk.keep_read_unit(tmp_path, 8192) == 8192


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_kept_unit_that_cannot_be_read_is_not_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object, **options: object) -> int:
        raise OSError(number, os.strerror(number))

    disk.keep_read_unit(tmp_path, 8192)
    monkeypatch.setattr(os, "open", refuse)
    assert disk.kept_read_unit(tmp_path) is None


def test_of_two_that_measure_the_first_is_kept(tmp_path: Path) -> None:
    assert [disk.keep_read_unit(tmp_path, 8192), disk.keep_read_unit(tmp_path, 4096)] == [8192, 8192]


def test_a_hint_is_given_where_the_disk_is_known_to_want_more(tmp_path: Path) -> None:
    config = RuntimeConfig(offload="nvme", nvme_dir=tmp_path)
    assert page_size_hint(config, Shape(), torch.bfloat16) == ""
    disk.keep_read_unit(tmp_path, 16 * KIB)
    assert "--page-size 32 reads faster than 16" in page_size_hint(config, Shape(), torch.bfloat16)
    assert page_size_hint(config.model_copy(update={"page_size": 32}), Shape(), torch.bfloat16) == ""


def test_auto_is_a_word_in_files_and_reports() -> None:
    config = RuntimeConfig(page_size="auto")
    assert (config.page_size, config.model_dump(mode="json")["page_size"]) == (AUTO_PAGE, "auto")
    with pytest.raises(UsageError, match="page_size: 0 is not a power of two"):
        checked({"page_size": 0})


def test_a_runtime_settles_its_page_size(tmp_path: Path) -> None:
    disk.keep_read_unit(tmp_path, 1 << 20)
    fields = {"offload": "nvme", "nvme_dir": tmp_path, "page_size": "auto", "self_test": False}
    assert Runtime(load(), checked(fields)).config.page_size == 64


def test_a_disk_without_room_to_measure_in_is_not_measured(tmp_path: Path, measured: list[Path]) -> None:
    for fields in ({"nvme_max": 1 << 19}, {"nvme_floor": 1 << 60}):
        assert settle(RuntimeConfig(offload="nvme", page_size="auto", nvme_dir=tmp_path, **fields)) == 16
    assert measured == []


def test_a_measurement_keeps_to_the_room_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = disk.write_all
    monkeypatch.setattr(disk, "write_all", lambda fd, view, offset: (sizes.append(len(view)), write(fd, view, offset)))
    disk.measure_disk(tmp_path, 0.05, most_bytes=3 << 20)
    assert 1 << 20 <= sum(sizes) <= 3 << 20


def test_a_file_where_the_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be made a folder"):
        settle(RuntimeConfig(offload="nvme", page_size="auto", nvme_dir=tmp_path / "file"))
