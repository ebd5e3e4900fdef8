"""What settings and environment may say of a tracker; what it would not take is refused at the start."""

import os
import sys
from typing import Any

import train
from pipelines import wandb_sync
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.tracking.settings import TrackerNames, check_tracker, tracker_names
from tests.helpers.tracked_runs import Attempt, history_of, one_line, rows_until

import pytest


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_tracker(Config(**settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_names_are_made_whole(monkeypatch):
    assert tracker_names(Config()) == TrackerNames("dalitune")
    assert tracker_names(Config(tags="a,, b ,a,")) == TrackerNames("dalitune", tags=("a", "b"))
    assert tracker_names(Config(project="team/proj")) == TrackerNames("proj", "team")
    for name, value in {"TAGS": ",x,", "PROJECT": "us/p/", "ENTITY": "", "MODE": " ", "RUN_GROUP": " g "}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert tracker_names(Config()) == TrackerNames("p", "us", "g", ("x",))
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_ENTITY"]) == ("p", "us"), "as W&B itself reads them"
    assert "WANDB_MODE" not in os.environ
    assert tracker_names(Config(project="them/q", tags="y", group="h")) == TrackerNames("q", "them", "h", ("y",))
    # Another tracker has rules of its own.
    assert tracker_names(Config(tracker="mlflow", project="a/b")) == TrackerNames("a/b")


@pytest.mark.parametrize(
    ("settings", "variables", "line"),
    [
        ({"tags": f"a,{'b' * 65}"}, {}, "tags: the tag bbbbbbbbbbbbbbbbbbbb... has 65 characters, and W&B takes 64"),
        ({}, {"TAGS": "b" * 65}, "WANDB_TAGS: the tag bbbbbbbbbbbbbbbbbbbb... has 65 characters"),
        ({"project": "a/b/c"}, {}, "project: entity 'a/b' cannot have '/'"),
        ({"project": "what?"}, {}, "project: project 'what?' cannot have '?': it is a name, or ENTITY/PROJECT"),
        ({}, {"PROJECT": "p" * 129}, "WANDB_PROJECT: W&B takes one line of at most 128 characters"),
        ({}, {"PROJECT": "a/p", "ENTITY": "b"}, "WANDB_PROJECT: a/p and WANDB_ENTITY b contradict each other"),
        ({}, {"ENTITY": "my team"}, "WANDB_ENTITY: entity 'my team' cannot have ' '"),
        ({"group": "a\nb"}, {}, "group: W&B takes one line of at most 128 characters"),
        ({}, {"NAME": "n" * 129}, "WANDB_NAME: W&B takes one line of at most 128 characters"),
        ({}, {"MODE": "bogus"}, "WANDB_MODE: Input should be 'online', 'offline'"),
        ({}, {"INIT_TIMEOUT": "soon"}, "WANDB_INIT_TIMEOUT: Input should be a valid number"),
        ({}, {"BASE_URL": "nowhere"}, "WANDB_BASE_URL: Input should be a valid URL"),
        ({}, {"RUN_ID": "a/b"}, "WANDB_RUN_ID: Run ID cannot contain the characters"),
        ({}, {"FORK_FROM": "a?_step=3"}, "WANDB_FORK_FROM: a run goes on in its folder here"),
        ({}, {"DIR": "/dev/null/x"}, "WANDB_DIR: /dev/null/x/wandb is no folder that can be written to"),
        ({}, {"DIR": "/proc/x"}, "WANDB_DIR: /proc/x/wandb is no folder that can be written to"),
        ({}, {"CACHE_DIR": "/proc/x"}, "WANDB_CACHE_DIR: /proc/x is no folder that can be written to"),
        ({}, {"IDENTITY_TOKEN_FILE": "/nowhere"}, "WANDB_IDENTITY_TOKEN_FILE: /nowhere cannot be read"),
        ({}, {"MODE": "shared"}, "WANDB_MODE: shared is for several writers of one run"),
        ({"tracker": "none", "alerts": True}, {}, "alerts: they are W&B's"),
        ({"tracker": "clearml"}, {}, "tracker: clearml is not installed: pip install clearml, or --tracker none"),
    ],
)
def test_what_wandb_would_not_take_is_refused_at_the_start(monkeypatch, settings, variables, line):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert refusal(**settings).startswith(line)


def test_a_tracker_with_a_broken_installation_is_refused(monkeypatch, tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise RuntimeError('of another protobuf')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    told = (
        "tracker: tensorboard cannot be imported (of another protobuf): pip install -U tensorboard, or --tracker none"
    )
    assert refusal(tracker="tensorboard").startswith(told)


def test_the_service_of_a_shell_that_is_gone_is_not_asked(folder, dataset, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere/socket")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(Config())
    Attempt(folder, dataset).steps(4).finish()
    assert one_line(capfd).startswith("wandb: offline (WANDB_MODE=offline)")
    assert history_of(folder) == rows_until(4)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"TRACKING_URI": "foo://x"}, "tracker: mlflow cannot file the run in 'p' of foo://x ("),
        ({"TRACKING_URI": "file:///proc/x"}, "tracker: mlflow cannot file the run in 'p' of file:///proc/x ("),
        ({"TAGS": "a=b"}, "MLFLOW_TAGS: it must be a mapping in JSON, and not 'a=b'"),
        ({"TAGS": "[]"}, "MLFLOW_TAGS: it must be a mapping"),
        ({"RUN_ID": "0" * 32}, "tracker: mlflow cannot file the run in 'p'"),
        ({"EXPERIMENT_NAME": "it's"}, 'tracker: mlflow cannot file the run in "it\'s"'),
        ({"EXPERIMENT_NAME": "gone"}, "tracker: MLflow's experiment 'gone' is deleted"),
        ({"TRACKING_URI": "http://127.0.0.1:1"}, ""),  # no server now: not the settings' fault
    ],
)
def test_what_mlflow_cannot_use_is_refused_at_the_start(monkeypatch, tmp_path, variables, line):
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny, of the dev group, is not installed")
    for name, value in {"ALLOW_FILE_STORE": "true", "TRACKING_URI": str(tmp_path / "mlruns"), **variables}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    for name in ("MAX_RETRIES", "TIMEOUT"):  # which the check sets
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    if variables.get("EXPERIMENT_NAME") == "gone":
        mlflow.delete_experiment(mlflow.create_experiment("gone"))
    if line:
        assert refusal(tracker="mlflow", project="p").startswith(line)
    else:
        check_tracker(Config(tracker="mlflow", project="p"))


def test_a_training_ends_with_that_line_before_anything_is_made(photos, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "b" * 65)
    done = run_here(train, "--data", photos, "--runs", tmp_path / "runs")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: WANDB_TAGS: the tag ")
    assert not (tmp_path / "runs").exists()


def test_a_run_id_that_was_left_in_the_shell_is_not_this_runs(folder, dataset, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "left")
    monkeypatch.setenv("WANDB_MODE", "offline")
    attempt = Attempt(folder, dataset).steps(4)
    assert attempt.run_id != "left"
    assert "WANDB_RUN_ID=left is not used: no agent has set it" in capfd.readouterr().err
    attempt.finish()
    assert history_of(folder) == rows_until(4)


def test_wandb_sync_shows_its_help_and_names_a_bad_variable(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        wandb_sync.main(["--help"])
    assert (ended.value.code, "RUN" in capsys.readouterr().out) == (0, True)
    monkeypatch.setenv("WANDB_MODE", "bogus")
    assert wandb_sync.main(["runs/none"]) == 2
    assert capsys.readouterr().err.startswith("error: WANDB_MODE: Input should be 'online'")
