"""Photos that fail in the run: named, or left out while no other photo moves, alike on both engines."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import evaluate
import train
from tests.helpers.corpus import break_openly, break_unseen
from tests.helpers.engines import ENGINES, HERE
from tests.helpers.paths import ROOT
from tests.helpers.runs import FROZEN, assert_same_weights, run_script, succeeded

import pytest

BAD = ["train/a/03.jpg", "train/b/05.jpg", "train/b/06.jpg"]


def settings(root: Path, weights: Path, runs: Path, engine: str) -> list[str]:
    flags = ["--data", root, "--weights", weights, "--runs", runs, "--loader", engine, "--epochs", 2, "--batch-size", 5]
    return [str(flag) for flag in [*flags, *FROZEN, "--skip-bad-files"]]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_photo_that_fails_in_the_run_ends_it_with_its_name(dirty, tmp_path, random_weights, run_here, engine):
    flags = settings(dirty, random_weights, tmp_path / "runs", engine)[:-1]
    assert run_here(train, *flags, "--run", "scan", "--max-steps", 1).returncode == 0
    break_unseen(dirty / BAD[1])
    done = run_here(train, *flags, "--run", "met")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*train/b/05\.jpg: cannot be decoded \(.+\).*--skip-bad-files\n", done.stderr)
    assert json.loads((tmp_path / "runs/met/status.json").read_text())["state"] == "failed"
    (dirty / BAD[1]).unlink()
    done = run_here(train, *flags, "--run", "gone")
    assert done.returncode == 0, "a file that is gone before the scan is no photo"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_three_bad_photos_met_or_known_give_the_same_weights(dirty, tmp_path, random_weights, run_here, engine):
    flags = settings(dirty, random_weights, tmp_path / "runs", engine)
    assert run_here(train, *flags, "--run", "sound", "--max-steps", 1).returncode == 0
    for name in BAD:
        break_unseen(dirty / name)
    met = run_here(train, *flags, "--run", "met")
    assert met.returncode == 0, met.stderr
    assert "left out: 3 photos, 0 of them found by the scan and 3 met in the run" in met.stdout
    assert [met.stderr.count(name) for name in BAD] == [1, 1, 1], "each is said once in two epochs"
    for name in BAD:
        break_openly(dirty / name)
    known = run_here(train, *flags, "--run", "known")
    assert known.returncode == 0, known.stderr
    assert "left out: 3 photos, 3 of them found by the scan and 0 met in the run" in known.stdout
    assert "train: 14 photos" in known.stdout
    assert_same_weights(tmp_path / "runs/met", tmp_path / "runs/known")


RUNS_IN_ONE_LAUNCH = """
import json, os, sys
from pathlib import Path
import train
from pipelines.distributed.launch import start_processes
state = start_processes()
assert state.num_processes == 2
for cut_off, flags in json.loads(Path(sys.argv[1]).read_text()):
    state.wait_for_everyone()
    for name in cut_off if state.is_main_process else []:
        Path(name).write_bytes(Path(name).read_bytes()[:-400])
    state.wait_for_everyone()
    train.main(flags)
"""


@pytest.mark.slow
def test_and_on_two_processes(dirty, tmp_path, random_weights, run_here):
    """Runs that share one launch, since each costs ten seconds of imports."""
    (tmp_path / "script.py").write_text(RUNS_IN_ONE_LAUNCH)
    runs, plan = tmp_path / "runs", []
    for engine in HERE:
        root = tmp_path / engine
        shutil.copytree(dirty, root)
        flags = settings(root, random_weights, runs, engine)
        assert run_here(train, *flags, "--run", f"sound-{engine}", "--max-steps", 1).returncode == 0
        for name in BAD:
            break_unseen(root / name)
        plan += [([], [*flags, "--run", f"met-{engine}"])]
        plan += [([str(root / name) for name in BAD], [*flags, "--run", f"known-{engine}"])]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run_script(str(tmp_path / "script.py"), tmp_path / "plan.json", processes=2, PYTHONPATH=str(ROOT))
    assert succeeded(done).count("processes: 2 on cpu") == 2 * len(HERE)
    assert done.stdout.count("3 met in the run") == len(HERE)
    for engine in HERE:
        said = [line for line in done.stderr.splitlines() if "left out" in line and f"/{engine}/train" in line]
        assert sorted(Path(line.split(":")[1]).name for line in said) == ["03.jpg", "05.jpg", "06.jpg"], "each once"
        assert_same_weights(runs / f"met-{engine}", runs / f"known-{engine}")


@pytest.mark.slow
def test_a_photo_that_fails_on_one_process_is_reported_once(dirty, tmp_path, random_weights, run_here):
    flags = settings(dirty, random_weights, tmp_path / "runs", "pillow")[:-1]
    assert run_here(train, *flags, "--run", "sound", "--max-steps", 1).returncode == 0
    break_unseen(dirty / BAD[0])
    done = run_script("train.py", *flags, "--run", "met", processes=2)
    assert "processes: 2 on cpu" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "train/a/03.jpg" in errors[0]
    status = json.loads((tmp_path / "runs/met/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert f"error: {status['reason']}" == errors[0]
    assert json.loads((tmp_path / "runs/met/bad_photos.json").read_text()).keys() == {"train/a/03.jpg"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", ["vanishes", "other size"])
def test_what_changes_between_scan_and_use_in_an_evaluation(
    dirty, tmp_path, random_weights, run_here, monkeypatch, photo_folder, engine, change
):
    flags = settings(dirty, random_weights, tmp_path / "runs", engine)
    assert run_here(train, *flags, "--run", "r", "--max-steps", 1).returncode == 0
    photo = dirty / "val/a/02.jpg"
    check: Callable = evaluate.check_dataset

    def change_after_the_scan(*arguments, **options) -> None:
        check(*arguments, **options)
        if change == "vanishes":
            photo.unlink()
        else:
            shutil.copy(dirty / "train/b/00.jpg", photo)

    monkeypatch.setattr(evaluate, "check_dataset", change_after_the_scan)
    scores = tmp_path / "scores.json"
    done = run_here(evaluate, tmp_path / "runs/r", "--loader", engine, "--skip-bad-files", "--json", scores)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("02.jpg") == 1
    assert json.loads(scores.read_text())["count"] == 6
