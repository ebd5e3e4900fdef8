"""The benchmarks' own arithmetic: what they print must be what they measured."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks import accuracy, affine, forward, gpu, headroom, loader, review, tutorial
from pipelines.distributed.hardware import machine
from pipelines.model.label_errors import LabelErrors

import numpy as np
import pytest
import torch
from PIL import Image


def row(recipe: str, best: float, *, processor: float = 100.0, seed: int = 0) -> dict:
    key = {"recipe": recipe, "seed": seed, "data": None, "set": []}
    if not recipe.endswith(".yaml"):
        key["inputs"] = accuracy.inputs(recipe)
    return key | {
        "hardware": machine(),
        "best": best,
        "last": best,
        "last_balanced": 0.5,
        "last_loss": 0.25,
        "seconds": 60.4,
        "processor": processor,
    }


def test_the_table_of_accuracies():
    rows = [row("finetune", best, processor=cost) for best, cost in ((0.94, 90), (0.95, 100), (0.96, 400))]
    lines = accuracy.table([*rows, row("my/own.yaml", 0.9)], ["finetune", "my/own.yaml"]).splitlines()
    assert lines[2] == ("| `finetune` | 3 | 0.9500 ± 0.0100 | 0.9400-0.9600 | 0.9500 ± 0.0100 | 0.2500 | 60 | 100 |")
    assert lines[3].startswith("| `own` | 1 | 0.9000 ± 0.0000 |")


def test_the_tutorial_and_the_recipes_take_turns(tmp_path, monkeypatch, capsys):
    asked = []

    def run(recipe, seed, data, settings, precision, again):
        asked.append((recipe, seed, settings, precision))
        return row(recipe, 0.9)

    monkeypatch.setattr(accuracy, "_run", run)
    arguments = [
        "--recipes",
        "finetune",
        "finetune",
        "--seeds",
        "2",
        "--set",
        "lr=1",
        "--tutorial",
        "--precision",
        "bf16",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    in_turn = [("tutorial.py finetune", [], "no"), ("tutorial.py features", [], "no"), ("finetune", ["lr=1"], "bf16")]
    assert asked == [(recipe, seed, *rest) for seed in range(2) for recipe, *rest in in_turn]
    assert "| `tutorial.py features` | 2 |" in capsys.readouterr().out


def test_a_change_is_compared_with_the_recipe_as_it_is_seed_by_seed(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "out"

    def run(recipe, seed, data, settings, precision, again):
        asked.append((recipe, seed, settings))
        last = 0.5 + 0.1 * seed + 0.02 * len(settings)
        return row(recipe, last, seed=seed) | {"set": settings}

    monkeypatch.setattr(accuracy, "_run", run)
    command = ["accuracy.py", "--recipes", "finetune", "--seeds", "2", "--set", "epochs=2", "--out", str(out)]
    changes = ["--vary", "augment=light", "eval_size=288 resize=329"]
    # What an older version has measured lacks the mean recall.
    older = row("finetune", 0.1) | {"set": ["epochs=2"], "precision": "no"}
    del older["last_balanced"]
    out.write_text(json.dumps(older) + "\n")
    monkeypatch.setattr(sys, "argv", [*command, *changes])
    accuracy.main()
    sets = [["epochs=2"], ["epochs=2", "augment=light"], ["epochs=2", "eval_size=288", "resize=329"]]
    assert asked == [("finetune", seed, settings) for seed in range(2) for settings in sets]
    printed = capsys.readouterr().out.splitlines()
    of_changes = printed[printed.index("finetune, changed:") + 3 :]
    assert of_changes[0].startswith("| none | 2 | 0.5700 ± 0.0707 |  |  | 0.2500 |  |")
    assert of_changes[1].startswith("| `augment=light` | 2 | 0.5900 ± 0.0707 | +0.0200 ± 0.0000 | +0.0000 ± 0.0000 |")
    assert of_changes[2].startswith("| `eval_size=288 resize=329` | 2 | 0.6100 ± 0.0707 | +0.0400 ± 0.0000 |")

    accuracy.main()
    assert len(asked) == 6, "what is in --out already is not run again"


@pytest.mark.parametrize("words", ["augment", "", "lr=1 augment"])
def test_a_change_that_is_no_setting_is_refused_before_anything_runs(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--vary", words])
    with pytest.raises(SystemExit, match="2"):
        accuracy.main()
    assert f"'{words}' is no KEY=VALUE" in capsys.readouterr().err


def test_best_weights_are_evaluated_again_and_compared_with_themselves(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "out"

    def run(recipe, seed, data, settings, precision, again):
        asked.append((seed, again))
        found = {"top1": 0.5 + 0.1 * seed, "balanced_top1": 0.5, "loss": 1.0, "ece": 0.1}
        larger = found | {"top1": found["top1"] + 0.02, "loss": 0.75 + 0.1 * seed}
        return row(recipe, 0.5, seed=seed) | {"evaluated": {flags: larger if flags else found for flags in again}}

    monkeypatch.setattr(accuracy, "_run", run)
    out.write_text(
        json.dumps(row("finetune", 0.1) | {"precision": "no"}) + "\n"
    )  # seed 0, which nobody evaluated again
    larger = "--image-size 288 --resize 329"
    command = ["accuracy.py", "--recipes", "finetune", "--seeds", "2", "--out", str(out), "--evaluate", larger]
    monkeypatch.setattr(sys, "argv", command)
    accuracy.main()
    assert asked == [(0, ["", larger]), (1, ["", larger])]
    printed = capsys.readouterr().out.splitlines()
    lines = printed[printed.index("finetune, evaluated again:") + 3 :]
    assert lines[0] == "| none | as it is | 2 | 0.5500 ± 0.0707 |  |  |  |"
    differences = "+0.0200 ± 0.0000 | -0.2000 ± 0.0707 | +0.0000 ± 0.0000 |"
    assert lines[1] == f"| none | `{larger}` | 2 | 0.5700 ± 0.0707 | {differences}"

    accuracy.main()
    assert len(asked) == 2, "what is in --out already is not run again"


def test_the_last_accuracy_is_that_of_the_averaged_weights_where_there_are_some(tmp_path):
    rows = [
        {"train/loss": 1.0},
        {"val/top1": 0.9, "val/balanced_top1": 0.8, "val/loss": 0.5},
        {"val/top1": 0.7, "val/balanced_top1": 0.6, "val/loss": 0.4},
    ]
    (tmp_path / "config.yaml").write_text("run: a\nlr: 0.01\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    scores = {"best": 0.9, "last": 0.7, "last_balanced": 0.6, "last_loss": 0.4, "config": {"lr": 0.01}}
    assert accuracy._scores(tmp_path) == scores
    rows[-1] |= {"ema/top1": 0.95, "ema/balanced_top1": 0.85, "ema/loss": 0.3}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    scores |= {"best": 0.95, "last": 0.95, "last_balanced": 0.85, "last_loss": 0.3}
    assert accuracy._scores(tmp_path) == scores


def test_whole_commands_take_turns_cold(tmp_path, monkeypatch, capsys):
    caches = []

    def run(command, env, **_):  # stands for the training
        caches.append(env["DALITUNE_CACHE"])
        assert not Path(env["DALITUNE_CACHE"]).exists()
        if runs := next((each.removeprefix("--runs=") for each in command if each.startswith("--runs=")), None):
            Path(runs, "run").mkdir(parents=True)
            Path(runs, "run/model.json").write_text(json.dumps({"scores": {"val/top1": 0.75}}))
        return subprocess.CompletedProcess(command, 0, json.dumps({"best": 0.5}), "")

    monkeypatch.setattr(tutorial.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["tutorial.py", "compare", "--runs", "2", "--data", str(tmp_path)])
    tutorial.main()
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        *("| `tutorial.py features`", "| `feature_extract.yaml`", "| `tutorial.py finetune`", "| `finetune.yaml`")
    ]
    assert [line.split(" | ")[-1] for line in table[2:4]] == ["0.5000 |", "0.7500 |"]
    assert len(set(caches)) == 4, "each turn of the two has a folder of its own"


def test_runs_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "accuracy.jsonl"
    out.write_text(json.dumps(row("finetune", 0.5)) + "\n")
    asked = []
    monkeypatch.setattr(accuracy, "_run", lambda recipe, seed, *_: asked.append(seed) or row(recipe, 0.7, seed=seed))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--recipes", "finetune", "--seeds", "3", "--out", str(out)])
    accuracy.main()
    assert asked == [1, 2]
    assert [json.loads(line)["best"] for line in out.read_text().splitlines()] == [0.5, 0.7, 0.7]
    printed = capsys.readouterr().out
    assert "accuracy.py --recipes finetune --seeds 3" in printed
    assert machine() in printed
    assert "| `finetune` | 3 |" in printed


def test_what_runs_of_another_recipe_or_version_have_reached_is_not_told_as_todays(tmp_path, monkeypatch, capsys):
    recipe, asked = tmp_path / "own.yaml", []

    def run(recipe, seed, data, settings, *_):
        asked.append(settings)
        return row(recipe, 0.5, seed=seed) | {"set": settings, "commit": f"c{len(asked)}"}

    monkeypatch.setattr(accuracy, "_run", run)
    command = [
        "accuracy.py",
        "--recipes",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--set",
        "lr=1 lr_body=2",
        "x=3",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1"])
    for text, runs in (("epochs: 1\n", 1), ("epochs: 1\n", 1), ("epochs: 2\n", 2)):
        recipe.write_text(text)
        accuracy.main()
        assert len(asked) == runs
    monkeypatch.setenv("DALITUNE_WEIGHTS", "others.pth")
    accuracy.main()
    assert asked == [["lr=1", "lr_body=2", "x=3"]] * 3
    assert f"{machine()}; commit c3; " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "2"])
    accuracy.main()
    assert "these are not all of one machine, code and versions:\n1: " in capsys.readouterr().out


def test_steps_of_the_headroom_are_whole_ones():
    training = SimpleNamespace(config=SimpleNamespace(batch_size=16), split=range(20))
    loader = SimpleNamespace(epoch=lambda _: [SimpleNamespace(size=16), SimpleNamespace(size=4)])
    assert [step.size for step in islice(headroom.Training.steps(training, loader), 3)] == [16, 16, 16]


def test_processor_seconds_are_those_of_the_ended_children():
    before = accuracy._processor_seconds()
    work = "import time; start = time.process_time()\nwhile time.process_time() < start + 0.3: pass"
    accuracy.subprocess.run([sys.executable, "-c", work], check=True)
    assert 0.3 <= accuracy._processor_seconds() - before < 5


@pytest.mark.slow
def test_a_row_has_the_scores_and_what_they_depend_on():
    settings = ["epochs=1", "max_steps=1", "image_size=64", "resize=64"]
    measured = accuracy._run("quickstart", 3, None, settings, "no", ["", "--image-size 72 --resize 72"])
    assert 0 <= measured["last"] <= measured["best"] <= 1
    assert measured["processor"] > 0
    assert measured["seconds"] > 0
    assert measured["config"]["seed"] == 3
    assert measured["config"]["max_steps"] == 1
    assert measured["versions"]["torch"]
    as_it_is, larger = measured["evaluated"].values()
    assert as_it_is["top1"] == pytest.approx(measured["best"])
    assert larger["loss"] != as_it_is["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", accuracy.TUTORIAL)
def test_a_row_of_the_tutorials_own_code(recipe, photo_folder, random_weights, monkeypatch):
    photos = photo_folder({"train": {"ant": 2, "bee": 2}, "val": {"ant": 1, "bee": 1}})  # ten epochs of 224 pixels
    monkeypatch.setenv("DALITUNE_WEIGHTS", str(random_weights))
    measured = accuracy._run(recipe, 3, str(photos), [], "no", [])
    assert 0 <= measured["last"] <= measured["best"] <= 1
    assert measured["last_loss"] > 0
    assert measured["processor"] > 0


# benchmarks/loader.py


def test_a_loader_that_gives_fewer_photos_than_it_should_is_left_out_with_a_word(photos, monkeypatch, capsys, tmp_path):
    counts = {"whole": 38, "drops a last batch": 35, "fails in silence": 20, "shrink, once": 19, "empty": 0}
    variants = {name: lambda run, count=count: count for name, count in counts.items()}
    monkeypatch.setattr(loader, "_variants", lambda *_: dict(variants))
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path))
    arguments = ["--data", str(photos), "--views", "train", "--runs", "1", "--epochs", "2"]  # 19 photos
    monkeypatch.setattr(sys, "argv", ["loader.py", *arguments])
    loader.main()
    said = capsys.readouterr().out.splitlines()
    assert "fails in silence: left out (of 38 photos it gave 20)" in said
    assert "empty: left out (of 38 photos it gave 0)" in said
    measured = [line[:34].strip() for line in said[said.index(next(s for s in said if s.startswith("variant"))) + 1 :]]
    assert measured[:3] == ["whole", "drops a last batch", "shrink, once"]


# benchmarks/forward.py


@pytest.mark.slow
def test_the_ways_of_a_forward_pass_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(forward, "SIZE", 64)
    monkeypatch.setattr(sys, "argv", ["forward.py", "--runs", "2", "--batch", "2", "--seconds", "0.01"])
    forward.main()
    machine_here, versions_here, title, _, *rows = capsys.readouterr().out.splitlines()
    assert machine_here == machine()
    assert "torch 2" in versions_here
    assert title.startswith("| 2 photos at a time |")
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names[:4] == ["as the tutorial", "channels last", "BatchNorm folded, as here", "the same, bf16"]
    assert all(row.split(" | ")[1] == "2" for row in rows)


# benchmarks/gpu.py


def setup(tmp_path: Path) -> gpu.Setup:
    return gpu.Setup(tmp_path, dry=True, engine="pillow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "page")])
    assert gpu.main() == 3
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "no NVIDIA GPU" in said.err
    assert not (tmp_path / "page").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code 139, SIGSEGV"),
        ("print('a word'); raise SystemExit(5)", "exit code 5: a word"),
        ("import time; time.sleep(60)", "nothing within 3 s"),
    ],
)
def test_a_check_that_crashes_or_hangs_does_not_stop_the_next(code, found, tmp_path, monkeypatch, capsys):
    check = gpu.Check("one", 3 / 60, "all is well", lambda _: gpu.Finding(""))
    other = gpu.Check("other", 1, "all is well", lambda _: gpu.Finding(""))
    answer = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'found': 'a | b', 'ok': True, 'numbers': {}}))"
    commands = {
        "one": [sys.executable, "-c", code],
        "other": [sys.executable, "-c", answer, str(tmp_path / "other.json")],
    }
    monkeypatch.setattr(gpu, "_command", lambda setup, name: commands[name])
    (tmp_path / "logs").mkdir()
    rows = gpu.run_all([check, other], setup(tmp_path), tmp_path, 600)
    assert found in rows[0]["found"]
    assert [row["ok"] for row in rows] == [False, True]
    assert len(capsys.readouterr().out.splitlines()) == 2, "a line of progress each"
    page = (tmp_path / "page.md").read_text().splitlines()
    assert page[0] == "**A dry run on a CPU: no GPU was seen, and no figure here means anything.**"
    assert page[-1].startswith("| other | all is well | a \\| b | as expected. |")
    assert json.loads((tmp_path / "page.json").read_text())["gpu"] is None


def test_what_is_left_out_is_said(tmp_path, monkeypatch):
    failing, passing = gpu.Finding("exit code 139", False), gpu.Finding("16 photos", True)
    whole = [gpu.Check(f"decode whole, {n}", 1, "", lambda _: failing) for n in range(2)]
    checks = [gpu.Check("decode roi", 1, "", lambda _: failing), *whole]
    checks += [gpu.Check("with", 1, "", lambda _: passing, dali=True), gpu.Check("either", 1, "", lambda _: passing)]
    engines = []

    def stand_in(check: gpu.Check, where: gpu.Setup, *_: object) -> gpu.Finding:
        engines.append(where.engine)
        return check.run(where)

    monkeypatch.setattr(gpu, "run_check", stand_in)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    rows = gpu.run_all(checks, setup(tmp_path), tmp_path, 600)
    assert [row["ok"] for row in rows] == [None, False, False, None, True]
    assert rows[3]["found"] == "left out: DALI does not decode here"
    assert engines == ["dali", "dali", "pillow", "pillow"]
    assert gpu.run_all(checks, setup(tmp_path), tmp_path, 0)[0]["found"] == "left out: the time was up"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_tries_the_code_of_every_check(tmp_path):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(gpu.ROOT)})
    page = json.loads((tmp_path / "page.json").read_text())
    wrong = {row["name"]: row["found"] for row in page["checks"] if row["ok"] is False}
    assert (done.returncode, wrong) == (0, {}), done.stdout + done.stderr
    assert [row["name"] for row in page["checks"]] == [check.name for check in gpu.CHECKS]
    assert (tmp_path / "page.md").read_text().startswith(gpu.DRY)


def test_a_review_is_scored_by_what_was_planted():
    labels, is_wrong = review.with_wrong_labels(np.repeat([0, 1, 2], 20), 3, 0.1, seed=1)
    assert is_wrong.sum() == 6
    assert ((labels != np.repeat([0, 1, 2], 20)) == is_wrong).all()
    first, second, *others = np.flatnonzero(is_wrong)
    suggested, margins = np.full(60, -1), np.full(60, 0.5)
    suggested[[first, 0]], margins[[first, second, *others[:2]]] = 1, -0.9
    margins[0] = np.nan
    is_wrong[0] = False
    found = review.scores_of(LabelErrors(suggested, margins), is_wrong)
    assert found["in_doubt"] == 2
    assert found["precision"] == 0.5
    assert found["at_number"] >= 4 / is_wrong.sum()
    lines = review.label_table([{"set": "a", "split": "train", "seeds": [found, found]}])
    assert lines[-1].startswith(f"| a | train | {is_wrong.sum()} | {found['at_number']:.2f} ± 0.00 | 2 | 0.50 |")


def test_both_ways_of_turning_a_crop_mean_the_same_on_a_smooth_photo(tmp_path, monkeypatch, capsys):
    rows, columns = np.mgrid[:300, :400]
    smooth = np.stack([rows * 0.8, columns * 0.6, 255 - rows * 0.5], 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "smooth.jpg", quality=95)
    monkeypatch.setattr(sys, "argv", ["affine.py", "--data", str(tmp_path), "--runs", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    affine.main()
    *_, here, fused, of_floats = capsys.readouterr().out.splitlines()
    assert here.startswith("| resized, then turned (as here) |")
    assert fused.startswith("| one affine map |")
    for line in (here, fused, of_floats):
        mean, most = (float(cell) for cell in line.split("|")[4:6])
        assert mean <= 1
        assert most <= 3
