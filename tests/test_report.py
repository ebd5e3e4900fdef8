"""A run's page: what it says, whatever the names in it, and nothing from outside."""

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import train
from pipelines import report
from pipelines.config import Config, dump_yaml, parse_config
from pipelines.run.predictions import Source, note_source, read_predictions
from pipelines.training.evaluation import wilson_interval
from tests.helpers.run_files import DESCRIPTION
from tests.helpers.runs import SMALL, succeeded

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADER = "path,split,label,answer,probability,loss,answer_2,probability_2\n"
HOSTILE = "<script>alert(1)</script>&\"'"


@pytest.fixture
def run(tmp_path, photo_folder) -> Callable[..., Path]:
    """A run of two classes, 3 of whose 20 photos are taken for the other one; the first six photos are there."""
    data = photo_folder({"val": {"ant": 3, "bee": 3}})

    def make(names: tuple[str, str] = ("ant", "bee"), epochs: int = 4, **settings: Any) -> Path:
        folder = tmp_path / "runs" / "one"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_yaml(Config(**settings)))
        rows = []
        for at in range(20):
            label, other = names if at % 2 == 0 else names[::-1]
            cells = (
                [f"{other},0.75,1.386294,{label},0.25"] if at in (0, 1, 2) else [f"{label},0.75,0.287682,{other},0.25"]
            )
            place = "ant" if at % 2 == 0 else "bee"
            rows.append(",".join([f"val/{place}/{at // 2:02}.jpg", "val", label, *cells]) + "\n")
        (folder / "predictions.csv").write_text(HEADER + "".join(rows))
        scores = DESCRIPTION["scores"] | {"correct": 17, "count": 20, "epoch": 3, "val/top1": 0.85, "val/loss": 0.4}
        description = DESCRIPTION | {"data": str(data), "classes": list(names), "scores": scores}
        description |= {"temperature": 1.0, "calibration": None, "unsure": []}
        (folder / "model.json").write_text(json.dumps(description))
        metrics = []
        for epoch in range(1, 1 + epochs):
            at = {"epoch": epoch, "global_step": 10 * epoch}
            metrics += [at | {"train/loss": 1 / epoch, "train/top1": 0.5}]
            metrics += [at | {"val/loss": None if epoch == 2 else 2 / epoch, "val/top1": epoch / 5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return folder

    return make


def written(run_here, folder: Path) -> str:
    done = run_here(report, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"page: {folder / 'report.html'}\n"
    return (folder / "report.html").read_text("utf-8")


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])).split())


def test_it_says_what_was_reached_and_with_which_settings(run, run_here):
    page = written(run_here, run(lr=0.125, runs="elsewhere"))
    text = words(page)
    low, high = wilson_interval(17, 20)
    assert f"85.0 % 17 of 20, 95 % interval {100 * low:.1f} to {100 * high:.1f} %" in text
    low, high = wilson_interval(8, 10)
    assert f"ant - 10 80.0 % {100 * low:.1f} to {100 * high:.1f} % 88.9 %" in text
    assert "Confusion matrix true ↓ answer → ant bee ant 8 2 bee 1 9" in text
    assert "Settings that differ from the defaults of docs/settings.md setting here" in text
    assert "lr 0.125 0.01 Compared with" in text
    assert "torchvision.models.resnet18(num_classes=2)" in text
    worst = text.partition("Worst validation photos")[2]
    assert worst.split()[:4] == ["ant", "✗", "bee", "0.75"]
    assert page.count('src="data:image/jpeg;base64,') == 12, "the six photos that are there, in both sheets"
    assert page.count("no picture") == 12
    assert page.count("<polyline") == 4
    points = re.findall(r'<polyline class="b" points="([^"]*)"', page)
    assert [len(each.split()) for each in points] == [3, 4], "a loss that was not finite is left out"
    assert "Calibration" not in text


def test_the_curves_have_the_average_and_the_last_epoch(run, run_here, monkeypatch):
    monkeypatch.setattr(report, "_POINTS", 3)
    folder = run(best_by="balanced")
    with open(folder / "metrics.jsonl", "a") as file:
        for epoch in range(5, 9):
            at = {"epoch": epoch, "global_step": 10 * epoch, "val/top1": epoch / 10, "val/balanced_top1": 0.5}
            file.write(json.dumps(at | {"ema/top1": 0.25, "ema/balanced_top1": epoch / 8}) + "\n")
    page = written(run_here, folder)
    legends = re.findall(r'<p class="legend quiet">(.*?)</p>', page)
    assert [words(f"<body>{each}") for each in legends] == [
        "train validation",
        "train validation averaged balanced averaged, balanced",
    ]
    points = re.findall(r'<polyline class="c dashed" points="([^"]*)"', page)
    assert points[0].split()[0].startswith("217.4,"), "of epoch 5 of 1 to 8"
    assert points[0].split()[-1] == "346.0,12.0", "epoch 8, the highest of all"


@pytest.mark.parametrize("name", ["BODY", "TITLE"])
def test_a_run_may_have_any_name(name, run, run_here):
    folder = run()
    folder = folder.rename(folder.with_name(name))
    page = written(run_here, folder)
    assert f"<title>{name}</title>" in page
    assert words(page).startswith(f"{name} resnet18")


def test_settings_are_compared_with_the_nearest_recipe(run, run_here):
    config, _ = parse_config(["--config=configs/quickstart.yaml", "--momentum=0.5"])
    text = words(written(run_here, run(**{key: value for key, value in asdict(config).items() if key != "runs"})))
    assert "Settings that differ from configs/quickstart.yaml setting here" in text
    assert "momentum 0.5 0.9 Compared with configs/quickstart.yaml" in text


def test_the_code_on_it_loads_the_weights(run, run_here, tmp_path):
    import torch
    from torchvision.models import resnet18

    folder = run()
    torch.manual_seed(0)
    weights = resnet18(num_classes=2).state_dict()
    torch.save(weights, folder / "best.pt")
    code = html.unescape(written(run_here, folder).partition("<pre>")[2].partition("</pre>")[0])
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(found["model"].state_dict()["fc.weight"], weights["fc.weight"])


def test_names_are_text_whatever_they_are(run, run_here):
    folder = run(names=(HOSTILE, "x" * 100_000), data=f"/{HOSTILE}")
    page = written(run_here, folder)
    assert "<script" not in page
    assert "'&" not in page.partition("<main>")[2]
    assert html.escape(HOSTILE) in page
    assert len(page.encode()) < report.MOST_BYTES


def test_the_largest_page_is_bounded(run, run_here, monkeypatch):
    folder = run(epochs=5000)
    names = [f"{at:04}{'&' * 4000}" for at in range(500)]
    rows = [f"{'&' * 4000}{at},val,{names[at]},{names[at - 1]},0.75,9,{names[at]},0.25\n" for at in range(500)]
    (folder / "predictions.csv").write_text(HEADER + "".join(rows))
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"classes": names}))
    monkeypatch.setattr(report, "photo_address", lambda *_: "x" * int(4 / 3 * report._LARGEST))
    page = written(run_here, folder)
    assert "Commonest confusions" in page
    assert len(page.encode()) < report.MOST_BYTES


def test_it_shows_no_picture_from_beside_the_data(run, run_here, tmp_path):
    folder = run()
    Image.new("RGB", (80, 80)).save(tmp_path / "secret.jpg")
    text = (folder / "predictions.csv").read_text()
    text = text.replace("val/ant/00.jpg", str(tmp_path / "secret.jpg")).replace("val/bee/00.jpg", "../secret.jpg")
    (folder / "predictions.csv").write_text(text)
    assert written(run_here, folder).count('src="data:image/jpeg;base64,') == 8


def test_photos_that_take_too_long_are_left_out(run, run_here, monkeypatch):
    monkeypatch.setattr(report, "_SECONDS", -1.0)
    page = written(run_here, run())
    assert "<img" not in page
    assert "Worst validation photos" in page


def test_it_has_the_calibration_where_there_is_one(run, run_here):
    folder = run()
    reliability = {"loss": 0.4, "ece": 0.0312, "bins": [[20, 0.8, 0.85]]}
    found = {"photos": 20, "folds": 5, "reason": "", "before": reliability, "after": reliability | {"ece": 0.0123}}
    unsure = [{"wanted": 0.95, "below": 0.9987, "photos": 20, "kept": 12, "right": 11}]
    description = json.loads((folder / "model.json").read_text())
    description |= {"temperature": 1.5, "calibration": found, "unsure": unsure}
    (folder / "model.json").write_text(json.dumps(description))
    text = words(written(run_here, folder))
    assert "logits / 1.5; calibration error 0.0312 before and 0.0123 after" in text
    assert "each by the others of 5 folds" in text
    assert "95.0 % 0.9987 12 of 20 11" in text
    assert "0.4000 cross-entropy, of logits that no temperature divides" in text
    (folder / "figures").mkdir()
    os.mkfifo(folder / "figures" / "calibration.png")
    assert "<img class" not in written(run_here, folder)
    (folder / "figures" / "calibration.png").unlink()
    Image.new("RGB", (30, 20)).save(folder / "figures" / "calibration.png")
    assert 'class="wide" src="data:image/png;base64,' in written(run_here, folder)


def test_answers_to_very_many_photos_are_left_out_and_that_is_said(run, run_here, monkeypatch):
    monkeypatch.setattr(report, "_LARGEST_ANSWERS", 500)
    text = words(written(run_here, run()))
    assert "predictions.csv is too large for a page" in text
    assert "17 of 20" in text
    assert "Worst" not in text


def test_a_mistake_is_one_line_and_replaces_nothing(run, run_here, tmp_path):
    folder = run()
    (folder / "report.html").write_text("<p>mine")
    done = run_here(report, folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "report.html is something else" in done.stderr
    (folder / "report.html").unlink()
    written(run_here, folder)
    written(run_here, folder)  # its own is replaced
    other = json.loads((folder / "model.json").read_text()) | {"classes": ["ant", "wasp"]}
    (folder / "model.json").write_text(json.dumps(other))
    assert "of classes that model.json does not have" in run_here(report, folder).stderr
    done = run_here(report, tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_training_leaves_it_and_ends_without_it(photos, run_here, tmp_path, monkeypatch):
    flags = [*SMALL, "--data", photos, "--runs", tmp_path, "--epochs", "1", "--batch-size", "8"]
    said = succeeded(run_here(train, *flags, "--run", "one"))
    page = tmp_path / "one" / "report.html"
    assert f"page:         {page}" in said
    text = words(page.read_text("utf-8"))
    right = int(read_predictions(tmp_path / "one" / "predictions.csv").right.sum())
    assert f"{right} of 11, 95 % interval" in text
    assert "3 classes, 19 training photos, 11 validation photos" in text

    def fail(_: Path) -> str:
        raise ValueError("no page today")

    monkeypatch.setattr(report, "page_of", fail)
    done = run_here(train, *flags, "--run", "two")
    assert done.returncode == 0
    assert "warning: report.html: not drawn (no page today)" in done.stderr
    assert json.loads((tmp_path / "two" / "status.json").read_text())["state"] == "finished"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_fits_a_screen_and_loads_nothing(width, scheme, run, run_here):
    from playwright.sync_api import sync_playwright

    folder = run(names=(HOSTILE, "w" * 60), lr=0.125)
    written(run_here, folder)
    with sync_playwright() as driver:
        context = driver.chromium.launch(executable_path=CHROMIUM).new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        page = context.new_page()
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto((folder / "report.html").as_uri())
        assert page.locator("h1").inner_text() == "one"
        assert page.get_by_text(HOSTILE).count() > 2
        assert page.locator("figure img").count() == 12
        assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(246, 247, 248)" if scheme == "light" else "rgb(20, 24, 28)")
    assert not faults
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_answers_to_other_photos_are_not_shown(run, run_here):
    folder = run()
    answers = folder / "figures" / "predictions_val.csv"
    answers.parent.mkdir()
    (folder / "predictions.csv").rename(answers)
    for fingerprint, is_shown in (("abc", True), ("abd", False)):
        note_source(answers, Source("/others", fingerprint, "0a"))
        succeeded(run_here(report, folder))
        page = (folder / "report.html").read_text()
        assert ("predictions_val.csv is of other photos than the run's" in page) != is_shown
