"""Runs that compute what is frozen once for each view: the same weights, stopped, with bad photos, from the cache."""

import train
from pipelines.model.features import FrozenFeatures
from tests.helpers.corpus import break_openly, break_unseen
from tests.helpers.runs import (
    ask_at,
    assert_same_weights,
    newest,
    rows,
    run_script,
    same_bits,
    succeeded,
    train_rows,
    val_rows,
)

import pytest

VIEWS = ["--image-size", "64", "--resize", "72", "--freeze", "layer3", "--views-per-photo", "2", "--tracker", "none"]
VIEWS += ["--head-init", "zeros"]


@pytest.mark.slow
def test_a_second_run_with_another_head_starts_at_the_head(photos, random_weights, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    command = ["--data", photos, "--weights", random_weights, *VIEWS, "--epochs", "3", "--runs", tmp_path]
    command = [*command, "--mode", "feature_extract"]
    first = succeeded(run_here(train, *command, "--run", "first"))
    assert "from the cache" not in first
    second = succeeded(run_here(train, *command, "--run", "second"))
    assert "frozen part: 2 views of 19 train photos and 1 view of 11 val photos from the cache" in second
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    assert same_bits(tmp_path / "first/best.pt", tmp_path / "second/best.pt")
    assert "from the cache" in succeeded(run_here(train, *command, "--run", "rate", "--lr", "0.1", "--batch-size", "6"))
    none = succeeded(run_here(train, *command, "--run", "without", "--cache-gb", "0"))
    assert "from the cache" not in none
    assert same_bits(tmp_path / "first/best.pt", tmp_path / "without/best.pt")

    for run, found in (("two", False), ("two-again", True)):
        said = succeeded(run_script("train.py", *command, "--run", run, processes=2))
        assert ("from the cache" in said) == found
    assert same_bits(tmp_path / "two/best.pt", tmp_path / "two-again/best.pt")


@pytest.mark.slow
def test_few_views_stopped_anywhere_and_on_two_processes(photos, random_weights, tmp_path, run_here, monkeypatch):
    command = ["--data", photos, "--weights", random_weights, *VIEWS, "--epochs", "5", "--batch-size", "4"]
    command += ["--cache-gb", "0", "--eval-batch-per-device", "4"]
    command += ["--lr", "0.01", "--log-every", "1", "--runs", tmp_path]
    said = succeeded(run_here(train, *command, "--run", "whole"))
    assert "frozen part: computed once for each of 2 views of a photo, 1 MiB in memory" in said
    assert (tmp_path / "whole/figures/train_batch.png").stat().st_size > 10_000
    for function, call, step in (("update", 1, 2), ("update", 12, 13), ("predict", 2, 10)):
        run = tmp_path / f"{function}-{call}"
        with monkeypatch.context() as patch:
            ask_at(patch, function, call)
            assert run_here(train, *command, "--run", run.name).returncode == 75
        assert f"resumed at step {step}" in succeeded(run_here(train, *command, "--run", run.name))
        assert rows(run) == rows(tmp_path / "whole")
        assert same_bits(run / "best.pt", tmp_path / "whole/best.pt")
        assert same_bits(newest(run) / "state.pt", newest(tmp_path / "whole") / "state.pt")

    with monkeypatch.context() as patch:  # within the pass before the second epoch
        patch.setattr("pipelines.model.features.FrozenFeatures.prepare", stop_in_the_second(FrozenFeatures.prepare))
        stopped = run_here(train, *command, "--run", "pass")
    assert stopped.returncode == 75
    assert "stopped at step 5" in stopped.stderr
    succeeded(run_here(train, *command, "--run", "pass"))
    assert rows(tmp_path / "pass") == rows(tmp_path / "whole")
    assert same_bits(newest(tmp_path / "pass") / "state.pt", newest(tmp_path / "whole") / "state.pt")

    assert "processes: 2 on cpu" in succeeded(run_script("train.py", *command, "--run", "two", processes=2))
    for select, names in ((train_rows, ("train/loss", "train/top1")), (val_rows, ("val/loss",))):
        for name in names:
            found, expected = ([row[name] for row in select(tmp_path / run)] for run in ("two", "whole"))
            assert found == pytest.approx(expected, rel=1e-3), name


def stop_in_the_second(prepare):
    def asked(self, epoch, stop):
        prepare(self, epoch, (lambda: True) if epoch == 1 else stop)

    return asked


@pytest.mark.slow
def test_a_photo_found_bad_while_features_are_computed_is_left_out(dirty, tmp_path, random_weights, run_here):
    command = [
        "--data",
        dirty,
        "--weights",
        random_weights,
        *VIEWS,
        "--cache-gb",
        "0",
        "--epochs",
        "3",
        "--batch-size",
        "5",
    ]
    command += ["--skip-bad-files", "--runs", tmp_path / "runs"]
    succeeded(run_here(train, *command, "--run", "sound", "--max-steps", 1))
    bad = dirty / "train/b/05.jpg"
    break_unseen(bad)
    met = run_here(train, *command, "--run", "met")
    assert "1 met in the run" in succeeded(met)
    assert met.stderr.count("05.jpg") == 1
    break_openly(bad)
    assert "1 of them found by the scan" in succeeded(run_here(train, *command, "--run", "known"))
    assert_same_weights(tmp_path / "runs/met", tmp_path / "runs/known")
