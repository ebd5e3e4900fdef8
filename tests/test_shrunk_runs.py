"""A training on shrunk copies: stopped, resumed, evaluated, predicted and exported, with the same pixels everywhere."""

import json
import shutil
from pathlib import Path

import evaluate
import train
from deploy import export, predict
from pipelines.run_files import read_description
from tests.helpers.engines import write_photo
from tests.helpers.runs import ask_at, newest, one_error_line, rows, same_bits, succeeded

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def large_photos(tmp_path, monkeypatch) -> Path:
    """Of two classes, with noise, transparency and EXIF, about 200 pixels; and a cache folder of their own."""
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    root, turned = tmp_path / "photos", Image.Exif()
    turned[0x0112] = 6
    for split, count in (("train", 9), ("val", 4)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                write_photo(root / split / name / f"{number}.jpg", 200 + number, 260, 10 * number + label, exif=turned)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (180, 150, 4), np.uint8)).save(root / "val/ant/x.png")
    return root


@pytest.mark.slow
def test_every_script_sees_the_copies_and_a_stopped_run_goes_on(
    large_photos, random_weights, answers_of_evaluate, run_here, tmp_path, monkeypatch
):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in large_photos.rglob("*")}
    flags = ["--data", large_photos, "--weights", random_weights, "--image-size", "64", "--resize", "72", "--shrink"]
    flags = [
        *flags,
        "96",
        "--freeze",
        "none",
        "--head-init",
        "zeros",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--log-every",
        "1",
    ]
    flags += ["--tracker", "none", "--runs", tmp_path / "runs"]
    said = succeeded(run_here(train, *flags, "--run", "whole"))
    assert "shrink: 27 of 27 photos are read from copies of 96 pixels, about 0 MB in " in said
    run, stopped = tmp_path / "runs/whole", tmp_path / "runs/stopped"
    made = {path.name: path.read_bytes() for path in (tmp_path / "cache/shrunk").rglob("*.jpg")}
    assert len(made) == 27

    with monkeypatch.context() as patch:
        ask_at(patch, "update", 3)
        assert run_here(train, *flags, "--run", "stopped").returncode == 75
    shutil.rmtree(tmp_path / "cache")
    assert "resumed at step 4" in succeeded(run_here(train, *flags, "--run", "stopped"))
    assert rows(stopped) == rows(run)
    assert same_bits(newest(stopped) / "state.pt", newest(run) / "state.pt")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache/shrunk").rglob("*.jpg")} == made

    assert (read_description(run, "run")["shrink"], read_description(run, "run")["format"]) == (96, 3)
    answers = answers_of_evaluate(run)
    succeeded(run_here(predict, run, *answers, "--json", tmp_path / "answers.jsonl", "--cpu"))
    for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()):
        assert (row["class"], row["confidence"]) == (
            answers[row["path"]][0],
            pytest.approx(answers[row["path"]][1], abs=2e-6),
        )
    other = run_here(evaluate, run, "--shrink", "null", "--json", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["loss"] != rows(run)[-1]["val/loss"], succeeded(other)
    settings = (run / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "cache/shrunk")
    (run / "config.yaml").write_text(settings.replace("cache_gb: 4", "cache_gb: 0"))
    assert answers_of_evaluate(run) == answers, "without a cache copies are made in memory"
    assert not (tmp_path / "cache/shrunk").exists()
    (run / "config.yaml").write_text(settings)
    full = run_here(train, *flags, "--run", "full", "--cache-gb", "1e-6")
    assert "copies of 96 pixels take about" in one_error_line(full)
    assert not (tmp_path / "runs/full").exists()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in large_photos.rglob("*")} == before

    pytest.importorskip("onnx", reason="needs the extra deploy")
    assert "the same top-1 as PyTorch on 9 of 9 photos" in succeeded(run_here(export, run))
    assert "a shorter side above 96 pixels" in (run / "export/README.md").read_text()
