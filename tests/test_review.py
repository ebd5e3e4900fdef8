"""What a review finds in the data of a run, what a person makes of its CSV file, and the next run with it."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import train
from pipelines import review
from pipelines.config import Config, dump_yaml
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.run.predictions import note_source, source_of_split
from pipelines.run.review_file import HEADER
from pipelines.training import held_out
from tests.helpers.run_files import DESCRIPTION
from tests.helpers.runs import one_error_line, succeeded

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture
def data(tmp_path) -> Path:
    """Photos that their colour tells apart; a wrong label, a copy of a validation photo, one in its own split, a broken
    photo; a class of two photos and one of one."""
    rng = np.random.default_rng(0)

    def draw(path: Path, colour: Sequence[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        spots = rng.integers(-40, 40, (5, 5, 3)) + np.array(colour)
        large = Image.fromarray(spots.clip(0, 255).astype(np.uint8)).resize((160, 140), Image.BICUBIC)
        noisy = np.asarray(large) + rng.normal(0, 8, (140, 160, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)

    root = tmp_path / "data"
    for split, count in (("train", 10), ("val", 4)):
        for name, colour in COLOURS.items():
            for number in range(count):
                draw(root / split / name / f"{number}.jpg", colour)
    draw(root / "train" / "red" / "wrong.jpg", COLOURS["blue"])
    for number in range(2):
        draw(root / "train" / "rare, or few" / f"{number}.jpg", (230, 220, 90))
    draw(root / "train" / "alone" / "0.jpg", (200, 200, 200))
    shutil.copy(root / "val" / "blue" / "0.jpg", root / "train" / "blue" / "leak.jpg")
    with Image.open(root / "train" / "green" / "3.jpg") as photo:
        photo.resize((100, 88)).save(root / "train" / "green" / "twin.png")
    (root / "train" / "green" / "broken.jpg").write_bytes((root / "val" / "red" / "0.jpg").read_bytes()[:400])
    return root


@pytest.fixture
def run(data, tmp_path, random_weights) -> Callable[..., Path]:
    """A run folder of that data, or of another, as a training leaves it, with wrong answers to some photos."""

    def make(**settings: object) -> Path:
        folder = tmp_path / "runs" / "r"
        folder.mkdir(parents=True)
        chosen = {"data": str(data), "weights": str(random_weights), "image_size": 64, "resize": 72, "run": "r"}
        (folder / "config.yaml").write_text(dump_yaml(Config(**{**chosen, "loader": "pillow", **settings})))
        rows = []
        for label in COLOURS:
            for number in range(4):
                other = "green" if label != "green" else "red"
                answers = f"{label},0.9,0.105,{other},0.1"
                if (label, number) == ("red", 2):
                    answers = f"{other},0.95,2.99573,{label},0.05"
                rows.append(f"val/{label}/{number}.jpg,val,{label},{answers}\n")
        header = "path,split,label,answer,probability,loss,answer_2,probability_2\n"
        (folder / "predictions.csv").write_text(header + "".join(rows))
        return folder

    return make


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = csv.DictReader(opened)
        assert tuple(rows.fieldnames or ()) == HEADER
        return list(rows)


def edited(file: Path, **actions: str) -> None:
    rows = rows_of(file)
    for row in rows:
        row["action"] = actions.get(Path(row["path"]).stem, row["action"])
    with open(file, "w", encoding="utf-8", newline="") as opened:
        table = csv.DictWriter(opened, HEADER, delimiter=";")  # as a spreadsheet may save it
        table.writeheader()
        table.writerows(rows)


@pytest.mark.slow
def test_a_review_and_the_next_run_with_it(run, data, run_here, tmp_path):
    folder = run(epochs=1)
    before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    said = succeeded(run_here(review, folder))
    assert "the run's own body has learned the labels" in said
    assert "\ncannot be read: train/green/broken.jpg: " in said
    rows = rows_of(folder / "review" / "photos.csv")
    assert len(rows) == 3 * 14 + 7
    by_name = {row["path"]: row for row in rows}
    assert rows[0] == by_name["train/blue/leak.jpg"], "leakage comes first"
    assert (rows[0]["finding"], rows[0]["other"]) == ("copy_across_splits", "val/blue/0.jpg")
    assert (rows[1]["finding"], rows[1]["other"]) == ("copy", "train/green/3.jpg")
    assert by_name["train/green/broken.jpg"]["finding"] == "unreadable"
    wrong = {path: row["new_label"] for path, row in by_name.items() if "wrong_label" in row["finding"]}
    assert wrong["train/red/wrong.jpg"] == "blue"
    assert wrong["val/red/2.jpg"] == "green"
    assert "train/alone/0.jpg" not in wrong, "no fold has held it out"
    assert {row["action"] for row in rows} == {"keep"}
    assert not by_name["val/green/1.jpg"]["finding"]
    for name in ("copy_across_splits", "copy", "wrong_label"):
        with Image.open(folder / "review" / f"{name}.png") as sheet:
            assert sheet.width > 100
    assert before == sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    again = (folder / "review" / "photos.csv").read_bytes()
    succeeded(run_here(review, folder))
    assert (folder / "review" / "photos.csv").read_bytes() == again, "it is the same every time"

    edited(folder / "review" / "photos.csv", leak="drop", twin="drop", broken="drop", wrong="relabel")
    told = one_error_line(run_here(review, folder))
    assert "has been edited" in told
    dataset = load_dataset(scan_dataset(folder / "review" / "photos.csv", tmp_path / "cache", 0.2))
    assert dataset.root == data
    assert dataset.splits["train"].class_counts() == {"alone": 1, "blue": 11, "green": 10, "rare, or few": 2, "red": 10}
    assert dataset.findings.notes == ["review: 3 photos are left out, 1 of another label than before"]
    flags = ["--config", folder / "config.yaml", "--data", folder / "review" / "photos.csv", "--run", "next"]
    flags += ["--runs", tmp_path / "runs", "--max-steps", "1", "--tracker", "none"]
    assert "review: 3 photos are left out" in succeeded(run_here(train, *flags))
    assert (tmp_path / "runs" / "next" / "predictions.csv").read_text().splitlines()[1].startswith("val/")


def test_what_cannot_be_looked_for_is_said(run, run_here):
    folder = run(weights="none", batchnorm="train", freeze="none", head_init="zeros")
    (folder / "predictions.csv").unlink()
    said = succeeded(run_here(review, folder))
    assert "wrong labels of val: not looked for: `accelerate launch evaluate.py" in said
    assert "not looked for: the run began with random weights" in said
    assert "copies in two splits: what is learned of one is asked of the other: " in said


def described(folder: Path, data: Path, cache: Path, named: Path | None = None) -> None:
    """Writes model.json as of a training on data. named: what it calls that."""
    dataset = load_dataset(scan_dataset(data, cache, 0.2))
    known = {"data": str(named or data), "dataset_fingerprint": dataset.fingerprint}
    (folder / "model.json").write_text(json.dumps(DESCRIPTION | known))


LIGHT = {"weights": "none", "batchnorm": "train", "freeze": "none", "head_init": "zeros"}


def test_the_photos_are_the_runs_own_wherever_it_is_started(run, data, run_here, tmp_path, monkeypatch):
    folder, elsewhere = run(**LIGHT | {"data": "data"}), tmp_path / "elsewhere"
    described(folder, data, tmp_path)
    shutil.copytree(data, elsewhere / "data")
    shutil.copy(data / "train/red/0.jpg", elsewhere / "data/val/red/0.jpg")
    monkeypatch.chdir(elsewhere)
    said = succeeded(run_here(review, folder))
    assert f"photos: {data}: " in said
    assert "predictions.csv, which knows 12 of 12 photos" in said
    assert {row["folder"] for row in rows_of(folder / "review" / "photos.csv")} == {str(data)}
    described(folder, data, tmp_path, named=tmp_path / "gone")
    told = one_error_line(run_here(review, folder))
    assert f"{tmp_path / 'gone'} is not there, and {elsewhere / 'data'} has other photos" in told
    monkeypatch.chdir(tmp_path)
    assert f"photos: {data}: " in succeeded(run_here(review, folder)), "they have moved with it"


def test_answers_to_other_photos_are_not_used(run, data, run_here, tmp_path):
    folder, elsewhere = run(**LIGHT), tmp_path / "elsewhere"
    described(folder, data, tmp_path)
    shutil.copytree(data, elsewhere)
    shutil.copy(data / "train/red/0.jpg", elsewhere / "val/red/0.jpg")
    said = succeeded(run_here(review, folder, "--data", elsewhere))
    assert f"{elsewhere}: the run has trained on other photos\n" in said
    assert f"not by {folder}/predictions.csv, which is of other photos, of {data}\n" in said
    command = f"`accelerate launch evaluate.py {folder} --data {elsewhere} --split val` makes predictions_val.csv"
    assert f"wrong labels of val: not looked for: {command}" in said
    answers = folder / "figures" / "predictions_val.csv"
    answers.parent.mkdir()
    shutil.copy(folder / "predictions.csv", answers)
    assert "wrong labels of val: not looked for" in succeeded(run_here(review, folder, "--data", elsewhere))
    for root, is_used in ((data, False), (elsewhere, True)):
        dataset = load_dataset(scan_dataset(root, tmp_path, 0.2))
        note_source(answers, source_of_split(dataset, dataset.splits["val"]))
        said = succeeded(run_here(review, folder, "--data", elsewhere))
        assert (f"by {answers}, which knows 12 of 12 photos" in said) == is_used
        assert (f"not by {answers}, which is of other photos" in said) != is_used
    shutil.copy(data / "train/red/0.jpg", data / "val/red/0.jpg")
    said = succeeded(run_here(review, folder))
    assert f"{data}: the photos have changed since the training\n" in said
    assert f"by {answers}, which knows 12 of 12 photos" in said, "they are those that evaluate.py has seen elsewhere"


def test_a_csv_of_two_classes_with_one_and_two_photos(run, run_here, data, tmp_path):
    (data / "few.csv").write_text(
        "path,label,split\ntrain/red/0.jpg,r,train\ntrain/red/1.jpg,r,train\ntrain/blue/0.jpg,b,train\nval/red/0.jpg,r,val\n"
    )
    shutil.move(tmp_path / "data", tmp_path / "runs" / "data")  # beside the CSV's folder is where runs/ lies
    (tmp_path / "runs" / "data" / "few.csv").rename(tmp_path / "few.csv")
    table = (tmp_path / "few.csv").read_text().replace("train/", "runs/data/train/").replace("val/", "runs/data/val/")
    (tmp_path / "few.csv").write_text(table)
    folder = run(data=str(tmp_path / "few.csv"))
    said = succeeded(run_here(review, folder))
    assert "which knows 0 of 1 photo" in said
    rows = folder / "review" / "photos.csv"
    assert len(rows_of(rows)) == 4
    rows.write_text("".join(rows.read_text("utf-8-sig").splitlines(keepends=True)[:-1]))
    assert "has been edited" in one_error_line(run_here(review, folder)), "a row is gone"


def test_of_too_many_photos_some_are_looked_at(run, data, run_here, monkeypatch):
    monkeypatch.setattr(review, "most_photos", lambda features, views: 24)
    folder = run()
    assert "24 of the 49 photos" in succeeded(run_here(review, folder))
    for path in sorted((data / "val").rglob("*"), reverse=True):  # a split of one photo beside many
        if path.name not in ("blue", "0.jpg") or path.parent.name in ("green", "red"):
            path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setattr(held_out, "why_too_large", lambda *_: "too large")
    assert "a head for so many classes would take too long" in succeeded(run_here(review, folder))


def test_mistakes_are_one_line_and_leave_nothing(run, data, run_here, tmp_path, monkeypatch):
    def look_at(*_: object) -> NoReturn:
        raise AssertionError("photos are decoded before what can be told without")

    monkeypatch.setattr(review, "look_at", look_at)
    monkeypatch.setenv("DALITUNE_WEIGHTS", str(tmp_path / "variable.pth"))
    folder = run()
    (tmp_path / "file").write_text("a thesis")
    for arguments, told in {
        (tmp_path,): "config.yaml",
        (folder, "--data", tmp_path / "nothing"): "there is no",
        (folder, "--weights", tmp_path / "gone.pth"): "gone.pth does not exist",
        (folder, "--weights", "null"): "DALITUNE_WEIGHTS: ",
        (folder, "--out", tmp_path / "file" / "new"): "file is no folder that can be written to: give another --out",
        (folder, "--out", data / "review"): "is in the folder of the photos",
    }.items():
        assert told in one_error_line(run_here(review, *arguments))
    assert not (folder / "review").exists()
    assert not (data / "review").exists()
    (data / "train" / "red" / "0.jpg").rename(data / "train" / "red" / " 0.jpg ")
    (data / "train" / "red ").mkdir()
    (data / "train" / "red" / "1.jpg").rename(data / "train" / "red " / "1.jpg")
    assert "a CSV file cannot say 'red '" in one_error_line(run_here(review, folder))


def test_an_old_run_is_reviewed_with_the_weights_that_are_there(old_run, run_here):
    assert "weights.pth does not exist" in one_error_line(run_here(review, old_run))
    said = succeeded(run_here(review, old_run, "--weights", old_run / "best.pt"))
    assert "makes predictions_val.csv" in said
