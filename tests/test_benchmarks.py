"""The benchmarks' own arithmetic: what they print must be what they measured."""

import json
import sys

from benchmarks import accuracy

import pytest


def row(recipe: str, best: float, *, processor: float = 100.0, seed: int = 0) -> dict:
    key = {"recipe": recipe, "seed": seed, "data": None, "set": []}
    return key | {"best": best, "last": best, "last_loss": 0.25, "seconds": 60.4, "processor": processor}


def test_the_table_has_mean_sample_deviation_range_and_median_seconds():
    rows = [row("finetune", best, processor=cost) for best, cost in ((0.94, 90), (0.95, 100), (0.96, 400))]
    lines = accuracy.table([*rows, row("my/own.yaml", 0.9)], ["finetune", "my/own.yaml"]).splitlines()
    assert lines[2] == ("| `finetune` | 3 | 0.9500 ± 0.0100 | 0.9400-0.9600 | 0.9500 ± 0.0100 | 0.2500 | 60 | 100 |")
    assert lines[3].startswith("| `own` | 1 | 0.9000 ± 0.0000 |")


def test_the_tutorial_takes_turns_with_the_recipes_and_ignores_their_settings(tmp_path, monkeypatch, capsys):
    asked = []

    def run(recipe, seed, data, settings):
        asked.append((recipe, seed, settings))
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
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    in_turn = [("tutorial.py finetune", []), ("tutorial.py features", []), ("finetune", ["lr=1"])]
    assert asked == [(recipe, seed, settings) for seed in range(2) for recipe, settings in in_turn]
    assert "| `tutorial.py features` | 2 |" in capsys.readouterr().out


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
    assert accuracy.hardware() in printed
    assert "| `finetune` | 3 |" in printed


def test_processor_seconds_are_those_of_the_ended_children():
    before = accuracy._processor_seconds()
    work = "import time; start = time.process_time()\nwhile time.process_time() < start + 0.3: pass"
    accuracy.subprocess.run([sys.executable, "-c", work], check=True)
    assert 0.3 <= accuracy._processor_seconds() - before < 5


@pytest.mark.slow
def test_a_row_has_the_scores_and_what_they_depend_on():
    settings = ["epochs=1", "max_steps=1", "image_size=64", "resize=64"]
    measured = accuracy._run("quickstart", 3, None, settings)
    assert 0 <= measured["last"] <= measured["best"] <= 1
    assert measured["processor"] > 0
    assert measured["seconds"] > 0
    assert measured["config"]["seed"] == 3
    assert measured["config"]["max_steps"] == 1
    assert measured["versions"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", accuracy.TUTORIAL)
def test_a_row_of_the_tutorials_own_code(recipe, photos, random_weights, monkeypatch):
    monkeypatch.setenv("DALITUNE_WEIGHTS", str(random_weights))
    measured = accuracy._run(recipe, 3, str(photos), [])
    assert 0 <= measured["last"] <= measured["best"] <= 1
    assert measured["last_loss"] > 0
    assert measured["processor"] > 0
