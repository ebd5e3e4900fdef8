"""Runs on this disk side by side: what differs, what was reached, how long it took; which is better, photo by photo."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import train
from pipelines import compare
from pipelines.config import Config, dump_yaml
from pipelines.run.pairing import compared_with
from pipelines.run.predictions import Source, note_source, read_predictions
from pipelines.run.significance import difference_interval, mcnemar
from pipelines.tracking.tracking import Tracking
from tests.helpers.run_files import DESCRIPTION
from tests.helpers.runs import SMALL, one_error_line, succeeded

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADER = "path,split,label,answer,probability,loss,answer_2,probability_2\n"


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs and what else may stand beside them."""
    for name, lr, scores, state in (("slow", 0.001, (0.5, 0.6, 0.6), "finished"), ("fast", 0.1, (0.7, 0.4), "failed")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_yaml(Config(run=name, lr=lr, batch_size=10)))
        (folder / "status.json").write_text(
            json.dumps({"state": state, "reason": "", "exit_code": None, "epoch": 3, "global_step": 90})
        )
        rows = []
        for epoch, score in enumerate(scores, start=1):
            at = {"epoch": epoch, "global_step": 30 * epoch}
            rows += [at | {"train/loss": 1 / epoch, "perf/images_per_s": 5.0}]
            rows += [at | {"val/loss": None if score == 0.4 else 1 - score, "val/top1": score}]
            if name == "fast":  # the other one is of an earlier version
                rows[-1]["val/balanced_top1"] = epoch / 4
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path / "runs"


def test_the_table_has_what_differs_and_the_best_run_first(runs, run_here):
    done = run_here(compare, *sorted(runs.iterdir()))
    assert done.returncode == 0, done.stderr
    assert (
        "not by photo, as there is no predictions.csv: fast, slow (`accelerate launch evaluate.py RUN`" in done.stdout
    )
    header, *rows = [line.split("  ") for line in done.stdout.split("\n\n")[0].splitlines()]
    header, *rows = [[cell.strip() for cell in row if cell.strip()] for row in (header, *rows)]
    names = [
        "run",
        "lr",
        "best top1",
        "balanced",
        "at epoch",
        "last top1",
        "last val loss",
        "last loss",
        "minutes",
        "state",
    ]
    assert header == names
    assert rows == [
        [
            "fast",
            "0.1",
            "0.7000",
            "0.2500",
            "1",
            "0.4000",
            "0.3000",
            "0.5000",
            "2.0",
            "failed",
        ],  # 60 steps of 10 photos, 5 a second
        ["slow", "0.001", "0.6000", "-", "2", "0.6000", "0.4000", "0.3333", "3.0", "finished"],
    ]
    with Image.open(runs / "comparison.png") as plot:
        assert plot.width > 500
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 10
    assert run_here(compare, *sorted(runs.iterdir())).returncode == 0  # its own plot is no run


def test_a_run_is_shown_at_what_it_takes_for_its_best(runs, run_here):
    settings = dump_yaml(Config(run="fast", best_by="balanced"))
    (runs / "fast" / "config.yaml").write_text(settings)
    done = run_here(compare, runs / "fast")
    assert done.stdout.splitlines()[1].split()[:5] == ["fast", "0.4000", "0.5000", "2", "0.4000"]


def test_a_run_whose_averaged_weights_are_its_best_is_shown_at_theirs(runs, run_here):
    scores = {"epoch": 2, "global_step": 60, "val/loss": 0.2, "val/top1": 0.9, "averaged": 1}
    (runs / "fast" / "model.json").write_text(json.dumps(DESCRIPTION | {"scores": scores}))
    done = run_here(compare, runs / "fast")
    assert done.stdout.splitlines()[1].split()[:2] == ["fast", "0.9000"]


def test_a_run_that_has_only_begun_stands_in_the_table(runs, run_here):
    (runs / "slow" / "metrics.jsonl").unlink()
    (runs / "slow" / "status.json").unlink()
    done = run_here(compare, runs / "slow", "--figure", runs / "plot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["slow", "-", "-", "-", "-", "-", "-", "0.0", "-"]


def test_no_run_and_a_damaged_one_are_one_line(runs, run_here):
    done = run_here(compare, runs / "empty")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "none of these is a run folder" in done.stderr
    (runs / "slow" / "metrics.jsonl").write_text("{\n")
    done = run_here(compare, runs / "slow")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "slow/metrics.jsonl, line 1 is damaged" in done.stderr


def test_what_is_passed_over_is_said_and_a_name_of_nothing_refused(runs, run_here, tmp_path):
    done = run_here(compare, runs / "slow", *sorted(runs.iterdir()), "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    told = f"passed over, without a config.yaml: {runs / 'empty'}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert told in done.stdout.splitlines()
    assert found["notes"][0] == told
    assert sorted(run["run"] for run in found["runs"]) == ["fast", "slow"], "each once, and no word of notes.txt"
    done = run_here(compare, runs / "slwo", runs / "fast")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"compare: there is no {runs / 'slwo'}: give run folders" in done.stderr


def test_stdout_is_for_programs_where_json_is_to_go_there(runs, run_here):
    done = run_here(compare, *sorted(runs.iterdir()), "--json", "-")
    assert done.returncode == 0, done.stderr
    assert [run["run"] for run in json.loads(done.stdout)["runs"]] == ["fast", "slow"]
    assert f"plot: {runs / 'comparison.png'}" in done.stderr


def test_outputs_that_cannot_be_are_told_before_a_comparison(runs, run_here, tmp_path):
    for flags, line in (
        (["--json", tmp_path / "x", "--html", tmp_path / "x"], "--json and --html are one file"),
        (["--figure", tmp_path / "gone" / "x.png"], "--figure: "),
        (["--html", "-"], "--html -: this is not for stdout"),
    ):
        done = run_here(compare, runs / "slow", *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert line in one_error_line(done)


# By photo


@pytest.fixture
def answered(tmp_path, photo_folder) -> Callable[..., Path]:
    """A run whose right answers to 60 photos are given, as positions; the first six photos are there."""
    data = photo_folder({"val": {"ant": 3, "bee": 3}})

    def make(name: str, wrong: Sequence[int], photos: int = 60, **settings: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_yaml(Config(**settings)))
        rows = []
        for at in range(photos):
            label, other = ("ant", "bee") if at % 2 else ("bee", "ant")
            answers = f"{other},0.75,1.386294,{label},0.25" if at in wrong else f"{label},0.75,0.287682,{other},0.25"
            rows.append(f"val/{label}/{at // 2:02}.jpg,val,{label},{answers}\n")
        (folder / "predictions.csv").write_text(HEADER + "".join(rows))
        scores = DESCRIPTION["scores"] | {"correct": photos - len(wrong), "count": photos}
        description = DESCRIPTION | {"data": str(data), "scores": scores}
        (folder / "model.json").write_text(json.dumps(description))
        metrics = [{"epoch": at, "global_step": at, "val/top1": at / 4, "val/loss": 1 / at} for at in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return folder

    return make


def compared(run_here, file: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    done = run_here(compare, *arguments, "--json", file)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_two_runs_are_compared_on_the_photos_that_both_have(answered, run_here, tmp_path):
    one, other = answered("A", range(10), lr=0.1), answered("B", [8, 20], 50, lr=0.2)
    said, found = compared(run_here, tmp_path / "found.json", one, other)
    (pairing,) = found["comparisons"]
    assert (pairing["photos"], pairing["only_first"], pairing["only_second"]) == (50, 1, 9)
    assert pairing["p"] == mcnemar(1, 9)
    assert pairing["interval"] == list(difference_interval(1, 9, 50))
    assert pairing["is_shown"]
    assert "B is better than A on photos like these 50 (+16.0 points, 95 % interval +4.5 to +29.3; p = 0.021)" in said
    assert [photo["path"] for photo in pairing["differing"]][:2] == ["val/bee/00.jpg", "val/ant/00.jpg"]
    assert pairing["differing"][0]["second"] == [{"run": "B", "answer": "bee", "probability": 0.75}]
    said, _ = compared(run_here, tmp_path / "found.json", other, one)
    assert "B is better than A on photos like these 50 (-16.0 points" in said


def test_what_few_photos_cannot_show_is_said(answered, run_here, tmp_path):
    said, found = compared(run_here, tmp_path / "found.json", answered("A", [1, 2]), answered("B", [3], lr=0.2))
    assert "no difference between B and A that 60 photos could show (+1.7 points, 95 % interval" in said
    assert "about 5,100 photos would be needed for one point" in said
    assert "with another seed each might have been better or worse" in said
    assert not found["comparisons"][0]["is_shown"]
    said, _ = compared(run_here, tmp_path / "found.json", tmp_path / "runs/A", answered("none", [], 0, lr=0.2))
    assert "none and A have no photo in common" in said


def test_seeds_of_one_recipe_have_a_mean_and_a_spread(answered, run_here, tmp_path):
    first = [answered(f"A{seed}", range(10 + seed), seed=seed) for seed in range(3)]
    second = [answered(f"B{seed}", range(seed), seed=seed, lr=0.2, loader_threads=1 + seed) for seed in range(3)]
    said, found = compared(run_here, tmp_path / "found.json", *first, *second)
    assert [each["runs"] for each in found["recipes"]] == [["A0", "A1", "A2"], ["B0", "B1", "B2"]]
    assert "A0 (3 seeds): 81.67 % \u00b1 1.67, 95 % interval of the mean 77.53 to 85.81" in said
    (pairing,) = found["comparisons"]
    assert pairing["p"] is None
    assert pairing["difference"] == pytest.approx(10 / 60)
    half = 2.776445 * (1 / 60) * (2 / 3) ** 0.5
    assert pairing["seeds_interval"] == pytest.approx([10 / 60 - half, 10 / 60 + half], abs=1e-5)
    assert "B0 (3 seeds) is better than A0 (3 seeds) on photos like these 60 (+16.7 points" in said
    said, _ = compared(run_here, tmp_path / "found.json", *first)
    assert "the runs differ in nothing but the seed" in said


def test_several_comparisons_hold_together(answered, run_here, tmp_path):
    runs = [answered(name, wrong, lr=lr) for name, wrong, lr in (("A", [0], 0.1), ("B", [1], 0.2), ("C", [2], 0.3))]
    said, found = compared(run_here, tmp_path / "found.json", *runs)
    assert [each["level"] for each in found["comparisons"]] == [0.975, 0.975]
    assert "2 comparisons: 97.5 % each, so that all hold with 95 %" in said


def test_two_runs_of_one_name_are_told_apart(answered, run_here, tmp_path):
    one = answered("A", [1, 2])
    other = tmp_path / "others" / "A"
    shutil.copytree(one, other)
    _, found = compared(run_here, tmp_path / "found.json", one, other)
    assert [run["run"] for run in found["runs"]] == [str(one), str(other)]
    assert found["comparisons"][0]["p"] == 1, "of one seed, so not two of a recipe"


def test_another_split_is_compared_by_what_evaluate_has_left(answered, run_here, tmp_path):
    one, other = answered("A", [1]), answered("B", [3], lr=0.2)
    for run in (one, other):
        (run / "figures").mkdir()
        (run / "predictions.csv").rename(run / "figures" / "predictions_test.csv")
    said, found = compared(run_here, tmp_path / "found.json", one, other, "--split", "test")
    assert found["comparisons"][0]["photos"] == 60
    assert "have chosen each run's best epoch" not in said
    assert "evaluated before" not in said
    (one / "best.pt").touch()
    said, _ = compared(run_here, tmp_path / "found.json", one, other, "--split", "test")
    assert "evaluated before best.pt was last written, maybe of other weights: A" in said


def test_answers_to_different_photos_are_told(answered, run_here, tmp_path):
    """By what evaluate.py has noted beside them; of an earlier version by the runs' own data."""
    runs = [answered("A", [1]), answered("B", [3], lr=0.2)]
    files = [run / "figures" / "predictions_test.csv" for run in runs]
    for file in files:
        file.parent.mkdir()
        shutil.copy(file.parent.parent / "predictions.csv", file)
    other = json.loads((runs[1] / "model.json").read_text()) | {"dataset_fingerprint": "abd"}

    def told(*flags: str) -> bool:
        said, _ = compared(run_here, tmp_path / "found.json", *runs, *flags)
        return "photos of one path and label are taken for the same" in said

    assert not told("--split", "test")
    (runs[1] / "model.json").write_text(json.dumps(other))
    assert told("--split", "test")
    for one, two, is_told in (("0a", "0a", False), ("0a", "0b", True)):
        for file, data, split in zip(files, ("/x", "/y"), (one, two), strict=True):
            note_source(file, Source(data, data, split))
        assert told("--split", "test") == is_told
    assert "answers to different data (/x, /y)" in compared(run_here, tmp_path / "f.json", *runs, "--split=test")[0]
    assert told(), "of the validation photos the runs know"
    assert "answers to different data" in compared_with(*runs)[0]


def test_the_page_has_the_photos_that_were_answered(answered, run_here, tmp_path, photo_folder):
    runs, elsewhere = [answered("A", [1]), answered("B", [3], lr=0.2)], photo_folder({"test": {"ant": 3, "bee": 3}})
    for run in runs:
        (run / "figures").mkdir()
        text = (run / "predictions.csv").read_text().replace("val/", "test/").replace(",val,", ",test,")
        file = run / "figures" / "predictions_test.csv"
        file.write_text(text)
        note_source(file, Source(str(elsewhere), "abe", "0a"))
    done = run_here(compare, *runs, "--split", "test", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "page.html").read_text().partition('application/json">')[2].partition("</script>")[0]
    differing = json.loads(content)["comparisons"][0]["differing"]
    assert [photo["path"] for photo in differing] == ["test/ant/00.jpg", "test/ant/01.jpg"]
    assert all(photo["picture"] for photo in differing)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("predictions.csv", (",0.75,", ",7.5,"), "A/predictions.csv, line 2: not as predictions.csv is"),
        ("model.json", ('"correct": 59', '"correct": 58'), "by model.json 58 of 60: it is not of these weights"),
    ],
)
def test_predictions_that_are_damaged_or_of_other_weights_are_refused(file, change, told, answered, run_here):
    run = answered("A", [1])
    (run / file).write_text((run / file).read_text().replace(*change, 1))
    done = run_here(compare, run)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert told in done.stderr


def test_a_page_shows_no_picture_from_beside_the_data(answered, run_here, tmp_path):
    """A run from elsewhere may name any path, and any names."""
    one, other = answered("A", [1, 2, 3]), answered("<script>alert(1)", [3], lr=0.2)
    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (80, 80)).save(secret)
    for run in (one, other):
        text = (run / "predictions.csv").read_text().replace("val/bee/01.jpg", str(secret))
        (run / "predictions.csv").write_text(text.replace("val/ant/00.jpg", "val/../../../secret.jpg"))
    done = run_here(compare, one, other, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    content = json.loads(page.partition('application/json">')[2].partition("</script>")[0])
    assert [bool(photo["picture"]) for photo in content["comparisons"][0]["differing"]] == [False, False]
    assert "<script>alert" not in page
    assert run_here(compare, one, other, "--html", tmp_path / "page.html").returncode == 0, "its own page is replaced"
    (tmp_path / "page.html").write_text("<!doctype html><p>mine")
    assert run_here(compare, one, other, "--html", tmp_path / "page.html").returncode == 2


def test_a_training_says_whether_it_is_better_than_another(photos, run_here, tmp_path, monkeypatch):
    summaries: list[dict[str, Any]] = []
    monkeypatch.setattr(Tracking, "finish", lambda _, summary: summaries.append(dict(summary)))
    flags = [*SMALL, "--data", photos, "--runs", tmp_path, "--epochs", "1", "--batch-size", "8"]
    succeeded(run_here(train, *flags, "--run", "one"))
    said = succeeded(run_here(train, *flags, "--run", "two", "--compare-to", tmp_path / "one", "--seed", "1"))
    assert "compare_to: no difference between two and one that 11 photos could show" in said
    first, second = (read_predictions(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert "compare/to" not in summaries[0]
    assert summaries[1]["compare/difference"] == pytest.approx(second.right.mean() - first.right.mean())
    assert {"compare/p", "compare/low", "compare/high", "compare/verdict"} <= summaries[1].keys()
    refused = run_here(train, *flags, "--run", "three", "--compare-to", tmp_path)
    assert refused.returncode == 2
    assert "compare_to: " in one_error_line(refused)
    assert not (tmp_path / "three").exists()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_sorts_filters_and_draws_with_nothing_from_outside(width, answered, run_here, tmp_path):
    from playwright.sync_api import sync_playwright

    runs = [answered("A", [0, 1, 2]), answered("B", [3], lr=0.2)]
    assert run_here(compare, *runs, "--html", tmp_path / "page.html").returncode == 0
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM).new_page(viewport={"width": width, "height": 800})
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto((tmp_path / "page.html").as_uri())
        assert "no difference between B and A that 60 photos could show" in page.inner_text("#verdicts")
        first = page.locator("#runs tbody tr").first
        for expected in ("B", "A"):  # descending, ascending
            page.click("#runs th button")
            assert first.locator("td").first.inner_text() == expected
        assert page.locator("#curves polyline").count() == 2
        page.fill("#filter", "0.2")
        assert page.locator("#runs tbody tr:visible").count() == page.locator("#curves polyline").count() == 1
        page.locator("#legend input").nth(1).click()
        assert page.locator(".photo:visible").count() == 4
        assert page.locator(".photo img").count() == 4
        assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
        page.fill("section input", "01.jpg")
        assert page.locator(".photo:visible").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert not faults
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
