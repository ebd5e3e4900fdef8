"""Runs on this disk side by side: what differs, what was reached, how long it took."""

import json
from pathlib import Path

from pipelines import compare
from pipelines.config import Config, dump_yaml

import pytest
from PIL import Image


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
    header, *rows = [line.split("  ") for line in done.stdout.splitlines() if line and not line.startswith("plot")]
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
