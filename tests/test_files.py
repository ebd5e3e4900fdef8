"""A file is written whole or not at all."""

import errno
import os
import sys
from pathlib import Path

from deploy import predict
from pipelines.errors import MachineError, UserError
from pipelines.files import STDOUT, atomic_write, check_apart, check_makeable, check_output, write_output
from pipelines.run import figures
from pipelines.run.review_file import AllPhotos, write_review
from tests.helpers.runs import one_error_line

import numpy as np
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


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("-", "--picture -: this is not for stdout: give a file's name"),
        ("folder", "--picture: folder is a folder: give the name of a file in it"),
        ("gone/a.png", "--picture: gone is no folder that can be written to"),
        ("file/a.png", "--picture: file is no folder that can be written to"),
        ("file", "file is something else than such an output"),
    ],
)
def test_what_no_output_can_be_is_told(name, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("a thesis")
    with pytest.raises(UserError) as caught:
        check_output(Path(name), lambda _: False, "--picture")
    assert str(caught.value).startswith(line)
    check_output(Path("folder/a.png"), lambda _: False, "--picture")
    assert sorted(os.listdir()) == ["file", "folder"]


def test_a_folder_is_made_only_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a thesis")
    for name in ("new/er", tmp_path / "new" / "er", "."):
        check_makeable(Path(name), "--out")
    for name in ("file", "file/new/er"):
        with pytest.raises(UserError, match=r"file is no folder that can be written to: give another --out"):
            check_makeable(Path(name), "--out")
    assert os.listdir() == ["file"]


def test_two_outputs_are_two_files(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    check_apart({"--csv": tmp_path / "a", "--json": tmp_path / "b", "--grid": None})
    check_apart({"--csv": STDOUT, "--json": None, "--grid": STDOUT})
    with pytest.raises(UserError, match="--csv and --grid are one file"):
        check_apart({"--csv": tmp_path / "a", "--json": tmp_path / "b", "--grid": tmp_path / "link" / "a"})


def test_answers_to_new_photos_are_not_written_over_one_another(run_here, tmp_path):
    photo, same = tmp_path / "photo.png", tmp_path / "answers"
    for flags, line in (
        (["--csv", same, "--json", same], "--csv and --json are one file"),
        (["--json", same, "--grid", same], "--json and --grid are one file"),
        (["--grid", tmp_path / "gone" / "x.png"], "--grid: "),
    ):
        assert line in one_error_line(run_here(predict, "run", photo, *flags))
    figures.save_answers(photo, np.zeros((1, 8, 8, 3), np.uint8), ["a"], ["a"], [1.0])
    before = photo.read_bytes()
    assert "is one of the photos" in one_error_line(run_here(predict, "run", tmp_path, "--grid", photo))
    assert photo.read_bytes() == before


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, MachineError), (errno.EACCES, UserError)])
def test_a_full_disk_is_the_machines_and_a_forbidden_name_the_users(monkeypatch, tmp_path, number, kind):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(kind, match=r"page\.html: cannot be written"):
        write_output(tmp_path / "page.html", "", sys.stdout)
    with pytest.raises(kind, match=r"photos\.csv: cannot be written"):
        write_review(tmp_path / "photos.csv", AllPhotos([]), {}, str(tmp_path))
    assert not list(tmp_path.iterdir())
