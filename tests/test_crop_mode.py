"""Wide photos, whose class only their ends tell: seen where they are squeezed into the square, by every script."""

import csv
import json

import evaluate
import train
from deploy import export, predict

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}


@pytest.fixture
def wide_photos(tmp_path):
    """80 x 240 pixels: grey but for 60 columns at either end."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, colour in COLOURS.items():
            (folder := tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                photo = rng.integers(90, 160, (80, 240, 3), np.uint8)
                photo[:, :60] = photo[:, -60:] = colour
                Image.fromarray(photo).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_every_script_sees_all_of_wide_photos(wide_photos, random_weights, run_here, tmp_path):
    flags = ["--config", "configs/feature_extract.yaml", "--data", wide_photos, "--weights", random_weights]
    flags += ["--image-size", "64", "--resize", "72", "--tracker", "none", "--runs", tmp_path]
    done = run_here(train, *flags, "--run", "wide")
    assert done.returncode == 0, done.stderr
    assert "crop_mode: squash, as the median photo's sides are 3.00 to 1: all of a photo is seen\n" in done.stdout
    run = tmp_path / "wide"
    description = json.loads((run / "model.json").read_text())
    assert (description["crop_mode"], description["scores"]["val/top1"]) == ("squash", 1.0)
    assert description["format"] == 2, "a version that would cut refuses it"
    assert "\ncrop_mode: squash\n" in (run / "config.yaml").read_text()

    done = run_here(evaluate, run, "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["top1"] == 1.0
    refused = run_here(evaluate, run, "--resize", "96")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--resize plays no part with crop_mode squash" in refused.stderr
    done = run_here(predict, run, wide_photos / "val", "--csv", tmp_path / "answers.csv", "--cpu")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "answers.csv", newline="") as file:
        assert all(f"/{row['class']}/" in row["path"] for row in csv.DictReader(file))
    pytest.importorskip("onnx", reason="needs the extra deploy")
    done = run_here(export, run)
    assert done.returncode == 0, done.stderr
    card = (run / "export" / "README.md").read_text()
    assert "all of it squeezed into 64 x 64 pixels" in card
    assert "transforms.Resize((64, 64))," in card

    # It goes on as it began, and the central square tells the classes apart no better than chance would.
    assert "is finished: nothing to do" in run_here(train, *flags, "--run", "wide").stdout
    done = run_here(train, *flags, "--run", "centre", "--crop-mode", "center")
    assert json.loads((tmp_path / "centre" / "model.json").read_text())["scores"]["val/top1"] < 0.9
