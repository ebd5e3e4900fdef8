"""A run of version 0.1.0 (commit 5099800) is evaluated, exported, used and resumed for ever.

tests/fixtures/run-of-0.1.0.tar.xz holds its folder, stopped at step 5 of 9, its photos, and in expected.json what that
version said of it and how it went on. Each weight is one of two values in a short pattern, so that it takes 75 kB.
"""

import json
from pathlib import Path
from typing import Any

import evaluate
import train
from deploy import export, predict

import pytest
import torch

SETTINGS = "--data photos --weights weights.pth --mode feature_extract --epochs 3 --batch-size 5 --image-size 64 "
SETTINGS += "--resize 72 --lr 0.0005 --log-every 1 --tracker none --checkpoint-minutes 600 --runs runs --run old"


@pytest.fixture
def expected(old_run) -> dict[str, Any]:
    return json.loads(Path("expected.json").read_text())


def test_an_old_run_is_evaluated(old_run, expected, run_here):
    done = run_here(evaluate, old_run, "--data", "photos", "--json", "scores.json", "--loader", "pillow")
    assert done.returncode == 0, done.stderr
    scores = json.loads(Path("scores.json").read_text())
    for key in ("confusion_matrix", "dataset_fingerprint"):
        assert scores[key] == expected["evaluate"].pop(key)
    assert {key: scores[key] for key in expected["evaluate"]} == pytest.approx(expected["evaluate"], rel=1e-4)


def test_an_old_run_predicts(old_run, expected, run_here):
    done = run_here(predict, old_run, "photos/val", "--json", "answers.jsonl", "--cpu", "--loader", "pillow")
    assert done.returncode == 0, done.stderr
    answers = {row.pop("path"): row for row in map(json.loads, Path("answers.jsonl").read_text().splitlines())}
    assert answers.keys() == expected["predict"].keys()
    for path, answer in answers.items():
        before = expected["predict"][path]
        assert answer == before | {"confidence": pytest.approx(before["confidence"], abs=1e-4)}


@pytest.mark.slow
def test_an_old_run_is_exported(old_run, expected, run_here):
    done = run_here(export, old_run, "--photos", "photos/val")
    assert done.returncode == 0, done.stderr
    assert f"same top-1 as PyTorch on {len(expected['predict'])} of" in done.stdout
    assert (old_run / "export" / "model.onnx").exists()


def test_an_old_run_goes_on_as_it_would_have(old_run, expected, run_here):
    Path("weights.pth").symlink_to(old_run / "best.pt")
    done = run_here(train, *SETTINGS.split())
    assert done.returncode == 0, done.stderr
    assert "loader: pillow (as before); " in done.stdout
    assert "resumed at step 5, from epoch-0001-step-00000005" in done.stdout
    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["global_step"]) for row in rows] == [
        (row["epoch"], row["global_step"]) for row in expected["metrics"]
    ]
    for row, before in zip(rows, expected["metrics"], strict=True):
        assert {key: row[key] for key in before} == pytest.approx(before, rel=1e-3)
    assert json.loads((old_run / "status.json").read_text())["state"] == "finished"
    assert torch.load(old_run / "best.pt", weights_only=True)["fc.bias"].shape == (2,)
