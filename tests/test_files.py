"""Sizes and numbers as messages give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpdit.core.files import locked
from mpdit.core.text import counted, readable_bytes


def test_sizes_are_in_the_unit_that_suits() -> None:
    sizes = (0, 999, 1000, 20_480, 1.3e9, 5e12, 5e15)
    assert [readable_bytes(size) for size in sizes] == [
        *("0 B", "999 B", "1.0 kB", "20.5 kB", "1.3 GB", "5.0 TB", "5000.0 TB")
    ]


def test_nouns_go_with_their_numbers() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


@pytest.mark.parametrize("name", [".", "made.lock"])
def test_a_file_or_folder_has_one_owner_at_a_time(name: str, tmp_path: Path) -> None:
    with locked(tmp_path / name, wait=False), pytest.raises(BlockingIOError), locked(tmp_path / name, wait=False):
        pass
    with locked(tmp_path / name):
        pass
