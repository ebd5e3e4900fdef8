"""A file is written whole or not at all."""

import os

from pipelines.files import atomic_write

import pytest


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def break_off() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert (os.listdir(tmp_path), path.read_text()) == (["file"], "old")
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert (os.listdir(tmp_path), path.read_text()) == (["file"], "new")


def test_a_temporary_file_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "theirs")
    with atomic_write(tmp_path / "file") as partial:
        partial.write_text("ours")
    assert ((tmp_path / "file").read_text(), (tmp_path / "theirs").read_text()) == ("ours", "theirs")


def test_two_who_write_the_same_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path, shared=True) as first:
        with atomic_write(path, shared=True) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert (path.read_text(), os.listdir(tmp_path)) == ("first", ["file"])
