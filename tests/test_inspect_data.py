"""The look at photos before a training: what it tells, for people and for programs, and that it leaves them alone."""

import json
import shutil
from pathlib import Path

from pipelines import inspect_data
from tests.helpers.corpus import encoded, picture

import pytest
from PIL import Image


@pytest.fixture
def messy(tmp_path: Path, photo_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "my photos"
    shutil.copytree(photo_folder({"Train": {"ant": 9, "bee": 2}, "valid": {"ant": 2, "bee": 1}}), root)
    shutil.copy(root / "Train/ant/00.jpg", root / "valid/bee/copy.jpg")
    for name, content in {
        "Train/ant/cut.jpg": encoded()[:-400],
        "Train/ant/large.png": encoded("PNG", "RGBA", picture(1100, 1100)),
        "Train/ant/._00.jpg": b"x",
        "Train/bee/x.jxl": b"x",
        "Train/bee/notes.txt": b"x",
    }.items():
        (root / name).write_bytes(content)
    return root


def contents(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


def test_the_report_tells_what_matters_before_a_training(messy: Path, tmp_path: Path, run_here) -> None:
    before = contents(messy)
    done = run_here(inspect_data, messy, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert contents(messy) == before
    for line in (
        "passed over: 1 hidden or system file or folder, 1 other file (.txt 1)",
        "1 picture is not used, of formats that are not read here: .jxl 1; save them as JPEG or PNG",
        "train: 12 photos, 2 classes: ant 10, bee 2",
        "1 photo of val is in train too:",
        "1 photo stands under another class too, with the same bytes:",
        "  Train/ant/00.jpg = valid/bee/copy.jpg",
        "  Train/ant/cut.jpg (truncated)",
        "formats: JPEG 15, PNG 1",
        "1 photo may have transparent pixels: composed on --transparency white",
        "1 photo has a shorter side above 1024 pixels, 4 times the 256 that an evaluation makes of it",
        "imbalance: 10 photos of ant, 2 of bee",
        "12 photos to train on: --config configs/feature_extract.yaml takes less time",
        f"fits: accelerate launch train.py --data '{messy}' --skip_bad_files --best_by balanced",
        f"contact sheet: {tmp_path / 'sheet.png'}",
    ):
        assert line in done.stdout.splitlines(), (line, done.stdout)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * sheet.height


def test_the_same_for_programs(messy: Path, run_here) -> None:
    done = run_here(inspect_data, messy, "--json", "-")
    facts = json.loads(done.stdout)
    assert "train: 12 photos, 2 classes: ant 10, bee 2" in done.stderr.splitlines()
    assert facts["splits"] == {"train": {"ant": 10, "bee": 2}, "val": {"ant": 2, "bee": 2}}
    assert facts["formats"] == {"JPEG": 15, "PNG": 1}
    assert facts["duplicates"] == [{"splits": ["train", "val"], "paths": ["Train/ant/00.jpg", "valid/bee/copy.jpg"]}]
    assert facts["passed_over"] == {
        "hidden_or_system": 1,
        "of_runs_or_tools": 0,
        "other_endings": {".jxl": 1, ".txt": 1},
    }
    assert facts["refused"] is None
    assert Path(facts["contact_sheet"]).is_file()
    assert messy not in Path(facts["contact_sheet"]).parents


def test_what_a_training_would_refuse_is_told(messy: Path, run_here) -> None:
    shutil.rmtree(messy / "Train" / "bee")
    done = run_here(inspect_data, messy)
    assert done.returncode == 0
    assert "a training would be refused: " in done.stdout
    assert "fits: " not in done.stdout


def test_a_cache_below_the_folder_of_a_csv_file_is_no_mistake(messy: Path, monkeypatch, run_here) -> None:
    csv = messy.parent / "labels.csv"
    csv.write_text("path,label\nmy photos/Train/ant/00.jpg,ant\nmy photos/Train/bee/00.jpg,bee\n")
    monkeypatch.setenv("DALITUNE_CACHE", str(csv.parent / "home" / "cache"))
    done = run_here(inspect_data, csv)
    assert done.returncode == 0, done.stderr
    assert "contact sheet: " in done.stdout


def test_facts_that_cannot_be_written_are_one_line(messy: Path, tmp_path: Path, run_here) -> None:
    done = run_here(inspect_data, messy, "--json", tmp_path / "gone" / "facts.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--json: {tmp_path / 'gone'} is no folder that can be written to" in done.stderr


def test_nothing_goes_into_the_folder_of_the_photos(messy: Path, tmp_path: Path, run_here) -> None:
    before = contents(messy)
    for flag, name in (("--sheet", "sheet.png"), ("--json", "facts.json")):
        done = run_here(inspect_data, messy, flag, messy / "Train" / name)
        assert done.returncode == 2
        assert "is in the folder of the photos" in done.stderr
    (tmp_path / "link").symlink_to(messy)
    assert run_here(inspect_data, messy, "--sheet", tmp_path / "link" / "x.png").returncode == 2
    assert contents(messy) == before


def test_an_output_replaces_no_other_and_nothing_of_somebodys(messy: Path, tmp_path: Path, run_here) -> None:
    done = run_here(inspect_data, messy, "--sheet", tmp_path / "x", "--json", tmp_path / "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--sheet and --json are one file" in done.stderr
    theirs = tmp_path / "package.json"
    theirs.write_text('{"name": "theirs"}')
    done = run_here(inspect_data, messy, "--json", theirs)
    assert (done.returncode, theirs.read_text()) == (2, '{"name": "theirs"}')
    for _ in range(2):
        assert run_here(inspect_data, messy, "--json", tmp_path / "facts.json").returncode == 0
