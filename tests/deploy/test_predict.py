"""New photos: the answers are evaluate.py's, a bad file is named, and a million photos stream through."""

import csv
import json
import os
import shutil
from pathlib import Path

from deploy import predict
from pipelines.data.decode import photo_of_file, view_of_file
from pipelines.inference import find_photos, open_run
from tests.helpers.corpus import BROKEN_INSIDE, FAULTY, SOUND, ZOO, write_zoo
from tests.helpers.engines import ENGINES

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.mark.parametrize("loader", ["auto", *ENGINES])
def test_each_photo_has_the_answer_that_evaluate_gives(trained_run, run_here, tmp_path, loader):
    photos = list(trained_run.evaluated)
    answers, table = tmp_path / "answers.jsonl", tmp_path / "answers.csv"
    done = run_here(
        *(predict, trained_run.folder, *photos, "--json", answers, "--csv", table, "--cpu", "--loader", loader),
        *("--eval-batch-per-device", 10),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["path"] for row in rows] == photos
    classes = {name for name, _ in trained_run.evaluated.values()}
    for row, (name, confidence) in zip(rows, trained_run.evaluated.values(), strict=True):
        assert set(row) == {"path", "class", "confidence", "runner_up"}
        assert row["class"] == name
        # Other engines' pixels may be a grey level or two away, and the temperature makes more of that.
        assert row["confidence"] == pytest.approx(confidence, abs=2e-6 if loader == "auto" else 0.05)
        assert row["runner_up"] in classes - {name} or len(classes) == 1
    with open(table, newline="") as file:
        in_csv = list(csv.DictReader(file))
    assert [{**row, "confidence": str(row["confidence"]), "error": ""} for row in rows] == in_csv


def test_the_table_and_json_on_stdout(trained_run, run_here, tmp_path):
    photo, (name, confidence) = next(iter(trained_run.evaluated.items()))
    near = tmp_path / ("a long name " * 8 + ".jpg")
    near.write_bytes(Path(photo).read_bytes())
    done = run_here(predict, trained_run.folder, near, "--cpu")
    assert done.returncode == 0
    header, row = done.stdout.splitlines()
    assert header.split() == ["photo", "class", "confidence", "runner-up"]
    assert row.startswith("…")
    assert row.split()[-4:-1] == [".jpg", name, f"{confidence:.4f}"]
    done = run_here(predict, trained_run.folder, near, "--cpu", "--json", "-")
    assert [json.loads(line)["class"] for line in done.stdout.splitlines()] == [name]


@pytest.mark.parametrize("loader", ENGINES)
def test_bad_files_are_named_and_the_rest_goes_on(trained_run, run_here, tmp_path, loader):
    write_zoo(tmp_path / "zoo", ZOO)
    gone, pipe = tmp_path / "gone.jpg", tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    done = run_here(
        *(predict, trained_run.folder, tmp_path / "zoo", gone, pipe, tmp_path, "--json", "-", "--cpu"),
        *("--loader", loader, "--eval-batch-per-device", 7),
    )
    assert done.returncode == 2
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == [*find_photos([str(tmp_path / "zoo"), str(gone), str(pipe), str(tmp_path)])]
    for row in rows[: len(ZOO)]:
        name = Path(row["path"]).name
        assert ("class" in row) == (name in SOUND), row
        assert ("error" in row) == (name not in SOUND), row
        if name in FAULTY:
            assert row["error"] == FAULTY[name].fault
        if name in BROKEN_INSIDE:
            assert row["error"].startswith("cannot be decoded (")
        if name not in SOUND:
            assert f"left out: {row['path']} ({row['error']})" in done.stderr
    assert rows[len(ZOO)] == {"path": str(gone), "error": "missing"}
    assert rows[len(ZOO) + 1] == {"path": str(pipe), "error": "not a regular file"}
    bad = 2 * (len(ZOO) - len(SOUND)) + 3
    assert f"error: {bad} of {len(rows)} files cannot be read as a photo" in done.stderr


def test_names_that_are_no_text(trained_run, run_here, tmp_path):
    photo = Path(next(iter(trained_run.evaluated)))
    odd = os.fsencode(tmp_path) + b'/latin-1 \xe9t\xe9, "quoted"\nline.jpg'
    Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    done = run_here(predict, trained_run.folder, os.fsdecode(odd), "--json", lines, "--csv", table, "--cpu")
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(lines.read_text())["path"]) == odd
    with open(table, newline="", errors="surrogateescape") as file:
        assert [os.fsencode(row["path"]) for row in csv.DictReader(file)] == [odd]


def test_answers_come_before_later_files_are_opened(trained_run, tmp_path):
    photo = Path(next(iter(trained_run.evaluated))).read_bytes()
    paths = [tmp_path / f"{number}.jpg" for number in range(12)]
    for path in paths:
        path.write_bytes(photo)
    answers = open_run(trained_run.folder, CPU, batch_size=2).classify([str(path) for path in paths])
    assert next(answers).error == ""
    paths[-1].unlink()
    rest = list(answers)
    assert [answer.error for answer in rest] == [""] * 10 + ["missing"]


def test_an_answer_does_not_depend_on_its_batch(trained_run):
    photos = list(trained_run.evaluated)[:5]
    alone = [answer.logits for answer in open_run(trained_run.folder, CPU).classify(photos)]
    together = [answer.logits for answer in open_run(trained_run.folder, CPU, batch_size=64).classify(photos)]
    np.testing.assert_allclose(np.stack(alone), np.stack(together), rtol=1e-4, atol=1e-5)


def test_rows_of_csv_read_back_as_they_were(trained_run, run_here, tmp_path):
    photo = next(iter(trained_run.evaluated))
    names = ["a\rb.jpg", "a\r\nb.jpg", 'a",\nb.jpg', "\x1b[2J.jpg", "plain.jpg"]
    for name in names:
        shutil.copy(photo, tmp_path / name)
    paths = [str(tmp_path / name) for name in names]
    done = run_here(predict, trained_run.folder, *paths, "--csv", tmp_path / "answers.csv", "--cpu")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == paths


def test_the_grid_shows_the_least_sure(trained_run, run_here, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(predict.figures, "MAX_PHOTOS", 3)
    save = predict.figures.save_answers
    monkeypatch.setattr(predict.figures, "save_answers", lambda *given: (shown.append(given), save(*given)))
    some = dict(list(trained_run.evaluated.items())[:20])
    photos, grid = list(some), tmp_path / "grid.png"
    done = run_here(predict, trained_run.folder, *photos, "--grid", grid, "--cpu")
    assert done.returncode == 0, done.stderr
    _, images, names, _, confidence = shown[0]
    assert len(images) == len(names) == 3
    expected = sorted(value for _, value in some.values())[:3]
    np.testing.assert_allclose(confidence, expected, atol=2e-6)
    with Image.open(grid) as picture:
        assert min(picture.size) > 100


def test_an_output_replaces_nothing_but_an_earlier_one(trained_run, run_here, tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("a thesis")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(Path(next(iter(trained_run.evaluated))).read_bytes())
    before = photo.read_bytes()
    for flag in ("--csv", "--json", "--grid"):
        for file in (photo, other):
            done = run_here(predict, trained_run.folder, flag, file, photo, "--cpu")
            assert done.returncode == 2
            assert f"{file} is something else than such an output: it is not replaced" in done.stderr
    assert photo.read_bytes() == before
    assert other.read_text() == "a thesis"
    outputs = [(flag, tmp_path / f"a{flag}") for flag in ("--csv", "--json", "--grid")]
    for _ in range(2):
        done = run_here(predict, trained_run.folder, photo, "--cpu", *(word for pair in outputs for word in pair))
        assert done.returncode == 0, done.stderr


def test_a_mistake_is_one_line(trained_run, run_here, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "best.pt").write_bytes((trained_run.folder / "best.pt").read_bytes())
    description = json.loads((trained_run.folder / "model.json").read_text())
    photo = next(iter(trained_run.evaluated))
    mistakes = {
        (tmp_path / "none", photo): "model.json cannot be read",
        (trained_run.folder, tmp_path / "empty"): "no photos in this folder",
        (trained_run.folder, photo, "--csv", "-", "--json", "-"): "would both write to stdout",
        (trained_run.folder, photo, "--csv", tmp_path / "no" / "a.csv"): "cannot be written",
        (trained_run.folder, photo, "--grid", tmp_path / "no" / "a.png"): "no folder",
        (trained_run.folder, photo, "--loader", "tf"): "--help",
        (trained_run.folder,): "--help",
    }
    for arguments, told in mistakes.items():
        done = run_here(predict, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert told in done.stderr.splitlines()[-1], arguments
    for key, value in {"mean": [0.5], "std": [0, 1, 1], "resize": 10, "image_size": None}.items():
        (damaged / "model.json").write_text(json.dumps(description | {key: value}))
        done = run_here(predict, damaged, photo)
        assert done.returncode == 2
        assert "model.json is damaged: " in done.stderr
        assert key in done.stderr


def test_a_picture_of_each_photo_shows_where_its_class_is_found(trained_run, run_here, tmp_path):
    photos = tmp_path / "photos"
    (photos / "others").mkdir(parents=True)
    shutil.copy(next(iter(trained_run.evaluated)), photos / "a <b>.jpg")
    shutil.copy(next(iter(trained_run.evaluated)), photos / "others" / "a <b>.jpg")
    (photos / "none.jpg").write_text("no photo")
    seen, answers = tmp_path / "seen", tmp_path / "answers.csv"
    for _ in range(2):  # its own pictures are replaced
        done = run_here(predict, trained_run.folder, photos, "--explain", seen, "--csv", answers, "--cpu")
        assert done.returncode == 2
        assert "warning" not in done.stderr
    assert sorted(path.name for path in seen.iterdir()) == ["1_a__b_.png", "3_a__b_.png"]
    with open(answers, newline="") as file:
        assert [row["picture"] for row in csv.DictReader(file)] == [
            str(seen / "1_a__b_.png"),
            "",
            str(seen / "3_a__b_.png"),
        ]
    with Image.open(seen / "1_a__b_.png") as picture:
        assert min(picture.size) > 100
    before = sorted(photos.rglob("*"))
    for folder in (photos, photos / "others", photos / "new"):
        done = run_here(predict, trained_run.folder, photos, "--explain", folder, "--cpu")
        assert done.returncode == 2
        assert f"error: --explain {folder}: it lies among the photos" in done.stderr
    done = run_here(predict, trained_run.folder, photos / "a <b>.jpg", "--explain", photos, "--cpu")
    assert "it lies among the photos" in done.stderr
    assert sorted(photos.rglob("*")) == before


def test_what_the_network_sees_is_this_part_of_the_photo(trained_run):
    preprocess = open_run(trained_run.folder, CPU).preprocess
    for path in list(trained_run.evaluated)[:3]:
        photo, box = photo_of_file(path, preprocess)
        square = photo.resize((preprocess.image_size,) * 2, Image.Resampling.BILINEAR, box=box)
        np.testing.assert_array_equal(square, view_of_file(path, preprocess))
        share = preprocess.image_size / preprocess.resize
        assert (box[3] - box[1], box[2] - box[0]) == pytest.approx((share * min(photo.size),) * 2, rel=0.02)
        assert (box[0] + box[2], box[1] + box[3]) == pytest.approx(photo.size, abs=4)  # in its middle


def test_answers_are_marked_as_unsure_below_the_runs_own_threshold(trained_run, run_here, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pt").symlink_to(trained_run.folder / "best.pt")
    photos = list(trained_run.evaluated)[:12]
    confidences = sorted(trained_run.evaluated[photo][1] for photo in photos)
    below = (confidences[4] + confidences[5]) / 2
    description = json.loads((trained_run.folder / "model.json").read_text())
    unsure = {"wanted": 0.99, "below": below, "photos": 40, "kept": 30, "right": 30}
    (run / "model.json").write_text(json.dumps(description | {"unsure": [unsure]}))
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    command = [predict, run, *photos, "--cpu", "--unsure-for"]
    done = run_here(*command, "0.99", "--json", lines, "--csv", table)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["unsure"] for row in rows] == [row["confidence"] < below for row in rows]
    assert sum(row["unsure"] for row in rows) == 5
    with open(table, newline="") as file:
        assert [row["unsure"] for row in csv.DictReader(file)] == [str(row["unsure"]) for row in rows]
    assert (
        f"unsure below a confidence of {below:.4f}: 10 of 40 validation photos; of the others 30 of 30" in done.stderr
    )
    assert "; 5 of them unsure" in done.stderr
    assert run_here(*command, "0.99").stdout.count("  unsure\n") == 5
    for wanted, told in (("0.995", "there is: 0.99"), ("0.97", "invalid choice: 0.97"), ("x", "invalid float value")):
        done = run_here(*command, wanted)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert told in done.stderr
    done = run_here(*command, "0.99", "--test-flips")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--unsure-for: the thresholds of" in done.stderr
    (run / "model.json").write_text(json.dumps(description | {"unsure": [], "calibration": None}))
    assert "it is of an earlier version" in run_here(*command, "0.99").stderr
