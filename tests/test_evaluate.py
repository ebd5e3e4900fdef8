"""evaluate.py: which photos it scores, which class is which, and what leaves it, whatever the names."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import evaluate
import train
from deploy import export, predict, serve
from pipelines.config import Config, dump_yaml
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.inference import open_run
from pipelines.run import figures
from pipelines.run.folder import describe_model
from pipelines.run.predictions import predictions_of, read_predictions, source_of
from tests.helpers.runs import run_script

import numpy as np
import pytest
import torch
from starlette.responses import JSONResponse
from torchvision.models import resnet18

SMALL = {"image_size": 64, "resize": 72, "tracker": "none"}
BARE = ["--image-size=64", "--resize=72"]
ODD = os.fsdecode(b"K\xe4fer")
CHINESE = "蚂蚁"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[Path], Path]:
    """A run folder as training on `data` leaves it, with random weights."""

    def make(data: Path) -> Path:
        dataset = load_dataset(scan_dataset(data, tmp_path / "index", 0.2))
        folder, config = tmp_path / "run", Config(**SMALL, data=str(data))
        folder.mkdir()
        torch.manual_seed(0)
        torch.save(resnet18(num_classes=len(dataset.splits["train"].classes)).state_dict(), folder / "best.pt")
        scores = {"val/top1": 0.5, "val/loss": 1.0, "correct": 1, "count": 2}
        text = json.dumps(describe_model(config, dataset, scores), ensure_ascii=False)
        (folder / "model.json").write_text(text, "utf-8", "backslashreplace")
        (folder / "config.yaml").write_text(dump_yaml(config))
        return folder

    return make


@pytest.fixture
def flat(photo_folder) -> Callable[[Mapping[str, int]], Path]:
    """CLASS/*"""
    return lambda counts: photo_folder({".": counts})


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("data", "flags", "count", "told"),
    [
        ("another", [], 24, "split all: 24 of 24 photos"),
        ("another as CSV", [], 24, "split all: 24 of 24 photos"),
        (
            "another",
            ["--split=val"],
            5,
            "split val: the 5 of 24 photos that are set aside here (--split all: all of them)",
        ),
        ("own", [], 4, "split val: the 4 of 20 photos that are set aside from training"),
        ("own, given", [], 4, "split val: the 4 of 20 photos that are set aside from training"),
        ("own", ["--split=all"], 20, "split all: 20 of 20 photos"),
        ("train beside test", [], None, "no split 'val'; it has train, test: name one with --split"),
        ("train beside test", ["--split=test"], 3, "split test: 3 of 10 photos"),
    ],
)
def test_photos_without_splits_are_scored_as_a_whole(
    data: str, flags: list[str], count: int | None, told: str, make_run, flat, photo_folder, run_here, tmp_path: Path
) -> None:
    own = flat({"ant": 10, "bee": 10})
    run = make_run(own)
    if data.startswith("another"):
        photos = flat({"ant": 14, "bee": 10})
        if data.endswith("CSV"):
            rows = [f"{path.relative_to(photos)},{path.parent.name}\n" for path in sorted(photos.glob("*/*.jpg"))]
            (photos / "all.csv").write_text("path,label\n" + "".join(rows))
            photos = photos / "all.csv"
        flags = [*flags, f"--data={photos}"]
    elif data == "own, given":
        flags = [*flags, f"--data={own}"]
    elif data.startswith("train"):
        flags = [*flags, f"--data={photo_folder({'train': {'ant': 4, 'bee': 3}, 'test': {'ant': 1, 'bee': 2}})}"]
    done = run_here(evaluate, run, *flags, "--json", tmp_path / "scores.json")
    assert done.returncode == (0 if count else 2), done.stderr
    assert told in (done.stdout if count else done.stderr)
    assert ("on others of these: some of them may be among its own" in done.stdout) == ("set aside here" in told)
    if count:
        assert read(tmp_path / "scores.json")["count"] == count


@pytest.mark.parametrize("flags", [[], ["--class-order=text"]])
def test_numbers_are_classes_in_numeric_order_for_a_bare_file(flags: list[str], flat, run_here, tmp_path: Path) -> None:
    data = flat({str(number): 1 for number in range(11)})
    network = resnet18(num_classes=11)
    torch.nn.init.zeros_(network.fc.weight)
    with torch.no_grad():
        network.fc.bias[:] = torch.arange(11.0) == 2  # always the third class
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    scores = tmp_path / "scores.json"
    done = run_here(
        evaluate, tmp_path / "bare.pth", "--data", data, *flags, *BARE, "--figures", tmp_path, "--json", scores
    )
    assert done.returncode == 0, done.stderr
    found, third = read(scores), "10" if flags else "2"
    right = [name for name, row in zip(found["classes"], found["per_class"], strict=True) if row["recall"]]
    assert right == [third]
    order = "text order: 0, 1, 10, 2, 3" if flags else "numeric order: 0, 1, 2, 3, 4"
    assert f"classes: those of the data, in {order} and 6 more" in done.stdout
    refused = run_here(evaluate, tmp_path / "bare.pth", "--data", flat({"a": 1, "b": 1}), "--class-order=numeric")
    assert refused.returncode == 2


def test_a_runs_best_weights_are_taken_for_the_run(make_run, flat, run_here, tmp_path: Path) -> None:
    run = make_run(flat({"2": 3, "10": 3}))
    done = run_here(evaluate, run / "best.pt", "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "scores.json")["classes"] == ["10", "2"]


def test_names_that_are_no_text_and_a_class_that_val_lacks(make_run, photo_folder, run_here, tmp_path: Path) -> None:
    data = photo_folder({"train": {ODD: 2, CHINESE: 2, "bee": 2}, "val": {ODD: 1, "bee": 3}})
    run = make_run(data)
    done = run_here(evaluate, run, "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    done.stdout.encode()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [CHINESE, "n/a", "n/a", "n/a", "0"] in lines
    assert lines.index([CHINESE, "n/a", "n/a", "n/a", "0"]) == max(i for i, line in enumerate(lines) if len(line) == 5)
    assert "commonest class    0.7500   top-1 of always answering bee" in done.stdout
    found = read(tmp_path / "scores.json")
    (tmp_path / "scores.json").read_text(encoding="utf-8").encode("utf-8")
    assert found["classes"] == [r"K\xe4fer", "bee", CHINESE]
    assert found["per_class"][found["classes"].index(CHINESE)] == {
        "precision": None,
        "recall": None,
        "f1": None,
        "count": 0,
    }
    recalls = [row["recall"] for row in found["per_class"] if row["count"]]
    assert found["balanced_top1"] == pytest.approx(np.mean(recalls))
    assert found["majority_top1"] == 0.75
    pictures = {path.name for path in (run / "figures").iterdir()}
    answers = {"predictions_val.csv", "predictions_val.png"}
    assert pictures == {"calibration_val.png", "confusion_matrix_val.png", "predictions_val.json", *answers}
    answers_of_all = read_predictions(run / "figures" / "predictions_val.csv")
    assert (len(answers_of_all), int(answers_of_all.right.sum())) == (found["count"], found["correct"])
    assert set(answers_of_all.classes) == set(found["classes"])
    answers = tmp_path / "answers.jsonl"
    done = run_here(predict, run, data / "val", "--json", answers, "--grid", tmp_path / "grid.png", "--cpu")
    assert done.returncode == 0, done.stderr
    for line in answers.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["class"] in found["classes"]


def test_the_page_and_programs_get_printable_names(make_run, photo_folder) -> None:
    run = make_run(photo_folder({"train": {ODD: 1, CHINESE: 1}, "val": {ODD: 1, CHINESE: 1}}))
    classes = [r"K\xe4fer", CHINESE]
    assert serve.describe(run)["classes"] == classes
    classifier = open_run(run, torch.device("cpu"))
    assert list(classifier.classes) == classes
    assert json.loads(JSONResponse(serve.describe(run)).body)["classes"] == classes
    assert export._properties(classifier, 1.0)["classes"] == json.dumps(classes)


def test_of_many_classes_json_has_the_pairs(monkeypatch, make_run, flat, run_here, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "_DENSE_CLASSES", 2)
    done = run_here(
        evaluate, make_run(flat(dict.fromkeys("abc", 5))), "--split=all", "--json", tmp_path / "scores.json"
    )
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "scores.json")
    assert "confusion_matrix" not in found
    assert sum(photos for _, _, photos in found["confusion_pairs"]) == 15


def test_a_picture_that_fails_costs_no_score(monkeypatch, make_run, flat, run_here, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    for name in ("save_confusion_matrix", "save_predictions"):
        monkeypatch.setattr(figures, name, fail)
    done = run_here(evaluate, make_run(flat({"a": 5, "b": 5})), "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert "top-1 " in done.stdout
    assert done.stderr.splitlines() == [
        "warning: confusion_matrix_val.png: not drawn (MemoryError)",
        "warning: predictions_val.png: not drawn (MemoryError)",
    ]
    assert read(tmp_path / "scores.json")["count"] == 2


@pytest.mark.slow
def test_best_by_balanced_in_a_training_whose_pictures_all_fail(
    monkeypatch, photo_folder, run_here, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    for name in ("save_train_batch", "save_curves", "save_calibration", "save_confusion_matrix", "save_per_class"):
        monkeypatch.setattr(figures, name, fail)
    rows = iter([(0.9, 0.5), (0.7, 0.8), (0.9, 0.6)])

    def validation_row(records: np.ndarray, classes: int) -> dict[str, float]:
        top1, balanced = next(rows)
        return {"val/loss": 1.0, "val/top1": top1, "val/balanced_top1": balanced, "val/ece": 0.1}

    monkeypatch.setattr(train, "validation_row", validation_row)
    data = photo_folder({"train": {"ant": 4, "bee": 2}, "val": {"ant": 3, "bee": 1}})
    flags = ["--weights=none", "--freeze=none", "--batchnorm=train", "--epochs=3", "--best-by=balanced", *BARE]
    flags += ["--head-init=zeros"]
    done = run_here(train, *flags, "--tracker=none", f"--data={data}", f"--runs={tmp_path}", "--run=r")
    assert done.returncode == 0, done.stderr
    assert "best val balanced_top1 0.8000 (top1 0.7000) at epoch 2" in done.stdout
    assert "always answering ant, the commonest class of val: top1 0.7500, balanced 0.5000" in done.stdout
    assert [line.count("not drawn (no font)") for line in done.stderr.splitlines()] == [1] * 5
    assert read(tmp_path / "r" / "model.json")["scores"]["val/balanced_top1"] == 0.8


@pytest.mark.slow
def test_a_run_with_test_flips_is_evaluated_with_them(photos, random_weights, run_here, tmp_path: Path) -> None:
    command = ["--data", photos, "--weights", random_weights, "--freeze=layer3", *BARE, "--batch-size=4"]
    command += ["--head-init=zeros", "--tracker=none", "--runs", tmp_path, "--run=r"]
    assert run_here(train, *command, "--epochs=2", "--test-flips", "--max-steps=5").returncode == 0
    refused = run_here(train, *command, "--epochs=3", "--test-flips=false")
    assert refused.returncode == 2
    assert "other settings (test_flips): it goes on with test_flips true" in refused.stderr
    done = run_here(train, *command, "--epochs=2", "--test-flips")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 5" in done.stdout
    run = tmp_path / "r"
    best = read(run / "model.json")["scores"]
    assert read(run / "model.json")["test_flips"] is True
    assert (run / "metrics.jsonl").read_text().count("val/loss") == 2
    (run / "model.json").write_text(json.dumps(read(run / "model.json") | {"temperature": 1.5}))

    found = []
    for processes, more in ((1, []), (2, []), (1, ["--test-flips=false"])):
        arguments = [run, "--json", tmp_path / "scores.json", "--figures", tmp_path / "figures", *more]
        done = run_here(evaluate, *arguments) if processes == 1 else run_script("evaluate.py", *arguments, processes=2)
        assert done.returncode == 0, done.stderr
        assert ("test_flips: an answer is the mean" in done.stdout) == (not more)
        told = "temperature: fitted to answers with the run's own test_flips true, and not to these"
        assert (told in done.stdout) == bool(more)
        found.append(read(tmp_path / "scores.json"))
    mirrored, on_two, plain = found
    assert [scores["test_flips"] for scores in found] == [True, True, False]
    assert [scores["count"] for scores in found] == [11, 11, 11]
    assert mirrored["without_temperature"]["loss"] == pytest.approx(best["val/loss"], rel=1e-5)
    assert mirrored["correct"] == best["correct"]
    assert on_two["confusion_matrix"] == mirrored["confusion_matrix"]
    assert on_two["loss"] == pytest.approx(mirrored["loss"], rel=1e-5)
    assert plain["loss"] != pytest.approx(mirrored["loss"], rel=1e-5)
    refused = run_here(evaluate, run, "--test-flips", "perhaps")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "cannot be 'perhaps'; possible: true or false" in refused.stderr


def test_it_shows_where_it_looks_in_the_worst_and_the_best_photos(
    make_run, flat, run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shown = make_run(flat({"ant": 10, "bee": 10})), []
    save = figures.save_explanations
    monkeypatch.setattr(figures, "save_explanations", lambda *given: (shown.append(given), save(*given)), raising=False)
    done = run_here(evaluate, run, "--split=all", "--explain")
    assert done.returncode == 0, done.stderr
    path, images, heated, predicted, true, remarks = shown[0]
    assert f"where it looks:   {path}" in done.stdout
    assert path == run / "figures" / "explanations_all.png"
    assert path.exists()
    assert images.shape == heated.shape == (16, 64, 64, 3)
    assert (images != heated).any(axis=(1, 2, 3)).all()
    answers = read_predictions(run / "figures" / "predictions_all.csv")
    losses = np.sort(answers.losses)[::-1]
    sureness = [float(remark.split()[1]) for remark in remarks]
    right = [guess == truth for guess, truth in zip(predicted, true, strict=True)]
    for at, loss in [*enumerate(losses[:8]), *((8 + at, loss) for at, loss in enumerate(losses[:-9:-1]))]:
        probability = sureness[at] if right[at] else 1 - sureness[at]  # of the label, there being two
        assert np.exp(-loss) == pytest.approx(probability, abs=0.006)
    assert [remark.split("(")[1] for remark in remarks[::8]] == ["worst 1)", "best 1)"]


def test_an_output_that_cannot_be_is_refused_before_the_evaluation(make_run, flat, run_here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of somebody")
    done = run_here(evaluate, make_run(flat({"ant": 1, "bee": 1})), "--json", tmp_path / "file" / "scores.json")
    assert done.returncode == 2
    assert f"--json: {tmp_path / 'file'} is no folder that can be written to" in done.stderr


def test_a_split_of_any_name_is_scored_and_its_answers_say_of_which_photos(
    make_run, flat, run_here, tmp_path: Path
) -> None:
    data = flat({"ant": 4, "bee": 4})
    run = make_run(data)
    (tmp_path / "photos").symlink_to(data)
    photos = [path.relative_to(data) for path in sorted(data.glob("*/*.jpg"))]
    rows = [f"photos/{path},{path.parent},hold/out\n" for path in photos]
    table = tmp_path / "held.csv"
    for number, count in enumerate((8, 7)):
        table.write_text("path,label,split\n" + "".join(rows[:count]))
        done = run_here(evaluate, run, "--data", table, "--split", "hold/out", "--json", "-")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["split"], found["count"]) == ("hold/out", count)
        answers = run / "figures" / "predictions_hold%2Fout.csv"
        assert answers == predictions_of(run, "hold/out")
        assert f"all answers:      {answers}" in done.stderr
        assert ("(those that were there were to other photos)" in done.stderr) == bool(number)
        assert (source := source_of(answers))
        assert (source.data, source.dataset) == (str(table), found["dataset_fingerprint"])
    same = answers.with_suffix(".json")
    same.unlink()
    done = run_here(evaluate, run, "--data", table, "--split", "hold/out", "--json", same)
    assert done.returncode == 2
    assert f"--json and {same.name} are one file" in done.stderr
