"""Trackers get every row once; whatever is wrong with them, a training hears one line and goes on.

What W&B gets is read back from its own files, and, online, from a stand-in for its server.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import pipelines.tracking.wandb as module
import train
from pipelines import wandb_sync
from pipelines.config import parse_config
from pipelines.data.engines.factory import choose_engine
from pipelines.run.folder import RunFolder, new_run_name
from pipelines.tracking.wandb_files import attempt_folders, has_key, history_row, read_records, steps_on_disk
from tests.helpers.paths import ROOT
from tests.helpers.tracked_runs import (
    SECONDS,
    Attempt,
    attempts,
    history_of,
    killed,
    one_line,
    records_of,
    rows_until,
    wait_until,
    without_own,
)
from tests.helpers.wandb_server_standin import KEY

import psutil
import pytest
import torch
import wandb
import yaml

SWEEP = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
LATER = "send the run later with: python -m pipelines.wandb_sync"
TRAINING = ["--image-size", "64", "--resize", "72", "--weights", "none", "--freeze", "none", "--batchnorm", "train"]
TRAINING += ["--head-init", "zeros", "--batch-size", "4"]


# Weights & Biases, offline


def test_without_a_key_wandb_is_offline(folder, dataset, capfd):
    Attempt(folder, dataset).steps(8).finish()
    assert one_line(capfd) == f"wandb: offline (no key); {LATER} {folder}"
    assert history_of(folder) == rows_until(8)


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_the_mode_of_the_environment(folder, dataset, capfd, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    Attempt(folder, dataset).steps(4).finish()
    if mode == "disabled":
        assert capfd.readouterr() == ("", "")
        assert not attempts(folder)
        return
    reason = "WANDB_MODE=offline" if mode == "offline" else "no key"
    assert one_line(capfd).startswith(f"wandb: offline ({reason}); ")
    assert history_of(folder) == rows_until(4)


def test_flags_win_over_wandbs_variables(folder, dataset, monkeypatch, tmp_path):
    variables = {"PROJECT": "p", "TAGS": "x,y", "RUN_GROUP": "g", "NAME": "n", "DIR": tmp_path, "RUN_ID": "fromagent"}
    variables |= {"SWEEP_ID": "s"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    Attempt(folder, dataset).finish()
    assert (folder / "wandb_id").read_text() == "fromagent"
    (attempt,) = attempt_folders(tmp_path, "fromagent")
    run = next(record.run for record in records_of(attempt) if record.WhichOneof("record_type") == "run")
    assert (run.project, list(run.tags), run.run_group, run.display_name) == ("p", ["x", "y"], "g", "n")

    monkeypatch.delenv("WANDB_SWEEP_ID")  # in a sweep W&B takes the sweep's project
    wandb.teardown()  # as in another process
    monkeypatch.setenv("WANDB_RUN_ID", "another")  # the run has its id for good
    time.sleep(1.1)  # the folders of W&B are named by the second
    Attempt(folder, dataset, project="q", tags="a, b", group="h").finish()
    (_, attempt) = attempt_folders(tmp_path, "fromagent")
    run = next(record.run for record in records_of(attempt) if record.WhichOneof("record_type") == "run")
    assert (run.project, list(run.tags), run.run_group) == ("q", ["a", "b"], "h")


@pytest.mark.slow
def test_rows_lost_in_a_torn_file_are_sent_once_by_the_next_attempt(folder, dataset, capfd):
    Attempt(folder, dataset).steps(20).tracking.abandon()
    (first,) = attempts(folder)
    records_of(first)
    (file,) = first.glob("run-*.wandb")
    whole = file.read_bytes()
    step_of = {history_row(record).get("_step"): record for record in read_records(file)}
    lost_from = whole.index(step_of[14].history.item[0].value_json.encode(), len(whole) // 2)
    for cut, checkpoint in ((lost_from, 16), (lost_from, 12), (len(whole), 16), (7, 16), (0, 4)):
        file.write_bytes(whole[:cut])  # as a kill leaves it
        for attempt in attempts(folder)[1:]:
            shutil.rmtree(attempt)
        RunFolder(folder).metrics.write_text(
            "".join(
                json.dumps({"global_step": step} | part) + "\n"
                for step in range(2, 21, 2)
                for part in ({"train/loss": 1 / step}, {"val/top1": step / 100})[: 1 + (step % 4 == 0)]
            )
        )
        time.sleep(1.1)
        Attempt(folder, dataset, checkpoint).steps(24).finish()
        assert history_of(folder) == rows_until(24), (cut, checkpoint)
    assert "tracking has stopped" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_attempt_offline(folder, dataset, monkeypatch):
    monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "0.2")  # seconds; W&B's own default is 15

    def attempt() -> None:
        first = Attempt(folder, dataset).steps(12)
        wait_until(lambda: steps_on_disk(attempts(folder)))
        first.steps(20)

    killed(attempt)
    (first,) = attempts(folder)
    (file,) = first.glob("run-*.wandb")
    kept = steps_on_disk([first])
    assert kept
    assert not [record for record in read_records(file) if record.WhichOneof("record_type") == "exit"]
    time.sleep(1.1)
    Attempt(folder, dataset, checkpoint=16).steps(24).finish()
    assert history_of(folder) == rows_until(24)


def test_a_stopped_run_is_preempting_and_a_failed_one_has_failed(folder, dataset):
    Attempt(folder, dataset).steps(4).tracking.stopped()
    time.sleep(1.1)
    Attempt(folder, dataset, checkpoint=4).steps(8).tracking.abandon()
    first, second = (
        [record.WhichOneof("record_type") for record in records_of(attempt)] for attempt in attempts(folder)
    )
    assert "preempting" in first
    assert "preempting" not in second
    assert [records_of(attempt)[-1].exit.exit_code for attempt in attempts(folder)] == [75, 1]
    assert history_of(folder) == rows_until(8)


def test_the_newest_row_waits_for_its_validation_row(folder, dataset):
    first = Attempt(folder, dataset).steps(6)
    first._row({"global_step": 8, "train/loss": 1 / 8}, hold=True)
    first.tracking.stopped()  # in the evaluation
    assert history_of(folder) == rows_until(6)
    time.sleep(1.1)
    second = Attempt(folder, dataset, checkpoint=8)
    second._row({"global_step": 8, "val/top1": 8 / 100})
    second.steps(12).finish()
    assert history_of(folder) == rows_until(12)


def kill_wandb_core(and_wait: float) -> None:
    """and_wait: seconds. At once the death is met in any call, and as anything from a broken pipe to silence."""
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.kill()
    time.sleep(and_wait)


@pytest.mark.slow
@pytest.mark.parametrize("and_wait", [0.0, 0.5])
@pytest.mark.parametrize("last", [8, 16])  # with 8 it is killed when all rows are given, and only `finish` meets it
def test_a_killed_wandb_core_is_replaced_and_no_row_is_lost(folder, dataset, capfd, last, and_wait):
    attempt = Attempt(folder, dataset).steps(8)
    one_line(capfd)
    time.sleep(1.1)
    kill_wandb_core(and_wait)
    started = time.monotonic()
    attempt.steps(last).finish()
    assert time.monotonic() - started < SECONDS
    assert one_line(capfd).startswith("wandb: offline (W&B's own process has ended: ")
    assert history_of(folder) == rows_until(last)
    summary = {}
    for record in records_of(attempts(folder)[-1]):
        summary |= {update.key: json.loads(update.value_json) for update in record.summary.update}
    assert summary["best/val_top1"] == 0.75


@pytest.mark.slow
@pytest.mark.parametrize("and_wait", [0.0, 0.5])
def test_a_stopped_run_waits_for_no_other_wandb_core(folder, dataset, capfd, and_wait):
    attempt = Attempt(folder, dataset).steps(8)
    time.sleep(1.1)
    capfd.readouterr()
    kill_wandb_core(and_wait)
    attempt.tracking.stopped()
    assert one_line(capfd).startswith("tracking has stopped (")
    wandb.teardown()  # as at the end of the process: no error
    Attempt(folder, dataset, checkpoint=8).steps(12).finish()
    assert history_of(folder) == rows_until(12)


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing_else(folder, dataset, capfd, monkeypatch, small_disk):
    disk = small_disk("size=4m")
    monkeypatch.setenv("WANDB_DIR", str(disk))
    attempt = Attempt(folder, dataset).steps(8)
    (disk / "full").write_bytes(b"x" * (4 * 2**20 - 200_000))
    with pytest.raises(OSError, match="No space left"):
        (disk / "fuller").write_bytes(b"x" * 2**20)
    capfd.readouterr()
    attempt.steps(16).finish()
    assert "rows are not in" in one_line(capfd)
    Attempt(folder, dataset, checkpoint=16).steps(20).finish()
    assert one_line(capfd).startswith(f"tracking has stopped (the disk under {disk} is full)")
    assert len(RunFolder(folder).read_metrics()) == 15


# Weights & Biases, online: a stand-in for its server


def test_online_a_run_is_created_and_streamed(folder, dataset, capfd, server):
    attempt = Attempt(folder, dataset, tags="a,b", group="g").steps(12)
    wait_until(lambda: len(server.run(attempt.run_id)["history"]) >= 3)
    run_id = (folder / "wandb_id").read_text()
    assert server.runs[run_id]["history"]  # while it runs
    attempt.finish()
    run = server.runs[run_id]
    assert [without_own(row) for row in run["history"]] == rows_until(12)
    assert run["summary"]["best/val_top1"] == 0.75
    assert (run["displayName"], run["groupName"], run["tags"]) == ("one", "g", ["a", "b"])
    assert run["config"]["lr"]["value"] == 0.01
    assert run["exit_code"] == 0
    assert one_line(capfd) == f"wandb: {server.url}/me/dalitune/runs/{run_id}"
    assert [artifact["artifactTypeName"] for artifact in server.artifacts] == ["dataset"]


@pytest.mark.slow
@pytest.mark.parametrize("sent_before", [0.0, 3.0])  # seconds
def test_online_a_killed_run_goes_on_with_no_row_twice(folder, dataset, server, sent_before):
    def attempt() -> None:
        first = Attempt(folder, dataset).steps(12)
        time.sleep(sent_before)
        first.steps(20)

    killed(attempt)
    run_id = (folder / "wandb_id").read_text()
    time.sleep(0.5)
    before = len(server.runs[run_id]["history"])
    assert before < 10  # on an idle machine some, where there was time to send them
    Attempt(folder, dataset, checkpoint=16).steps(24).finish()
    assert list(server.runs) == [run_id]
    assert [without_own(row) for row in server.runs[run_id]["history"]] == rows_until(24)
    assert server.runs[run_id]["exit_code"] == 0


@pytest.mark.slow
def test_online_a_server_that_dies_in_mid_run_holds_nothing_up(folder, dataset, capfd, server):
    attempt = Attempt(folder, dataset).steps(8)
    wait_until(lambda: any(run["history"] for run in server.runs.values()))
    server.stop()
    capfd.readouterr()
    started = time.monotonic()
    attempt.steps(16).finish()
    wandb.teardown()  # as at the end of the process
    assert time.monotonic() - started < SECONDS
    line = one_line(capfd)
    assert line == f"wandb: the server has not taken everything; {LATER.replace('run', 'rest', 1)} {folder}"
    server.start()
    (run,) = server.runs.values()
    assert 0 < len(run["history"]) < 8
    for _ in range(2):
        assert wandb_sync.main([str(folder)]) == 0
        assert [without_own(row) for row in run["history"]] == rows_until(16)
    assert run["summary"]["best/val_top1"] == 0.75


def test_a_server_that_swallows_everything_is_asked_once(monkeypatch):
    """As behind a firewall that drops packets: whatever is to be sent, a run ends in a few seconds."""
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = SimpleNamespace(base_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = object.__new__(module.WandbTracker)  # of which only what is sent at the end counts
        tracker._wandb = SimpleNamespace(offline=False, settings=settings)
        tracker._artifacts = [SimpleNamespace(name=f"best {number}", wait=None) for number in range(9)]
        started = time.monotonic()
        tracker._wait_for_uploads()
        assert 0.2 < time.monotonic() - started < 1.2


@pytest.mark.slow
def test_weights_may_take_longer_than_a_dead_server_may(folder, dataset, capfd, server):
    attempt = Attempt(folder, dataset).steps(4)
    (folder / "best.pt").write_bytes(b"weights")
    preprocessing = {"image_size": 64, "resize": 72, "mean": [0.5] * 3, "std": [0.5] * 3}
    description = {"arch": "resnet18", "classes": ["ant", "bee"], "scores": {"val/top1": 0.5}, **preprocessing}
    (folder / "model.json").write_text(json.dumps(description))
    attempt.tracking.log_best(4)
    capfd.readouterr()
    server.upload_seconds = 7.0  # W&B's `finish` has 5
    attempt.finish()
    assert server.uploads["artifact/best.pt"] == b"weights"
    assert "is being sent" in capfd.readouterr().err
    (model,) = (artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model")
    assert {"best", "one"} <= {alias["alias"] for alias in model["aliases"]}
    assert json.loads(model["metadata"]) == {"val/top1": 0.5}


@pytest.mark.slow
def test_a_run_goes_on_offline_and_is_sent_when_the_server_is_back(folder, dataset, capfd, server):
    Attempt(folder, dataset).steps(8).tracking.stopped()
    (run,) = server.runs.values()
    assert run["preempting"]
    server.stop()
    capfd.readouterr()
    started = time.monotonic()
    second = Attempt(folder, dataset, checkpoint=8)
    assert time.monotonic() - started < SECONDS
    assert one_line(capfd).startswith("wandb: offline (the server does not answer); send the run later with: ")
    second.steps(16).tracking.abandon()

    server.start()
    time.sleep(1.1)
    # The second attempt has to be sent before a third one may go on online, or the order would be lost.
    Attempt(folder, dataset, checkpoint=16).steps(20).finish()
    assert one_line(capfd).startswith("wandb: offline (as the earlier parts of the run, which are not sent yet); ")
    assert wandb_sync.main([str(folder)]) == 0
    assert [without_own(row) for row in run["history"]] == rows_until(20)
    time.sleep(1.1)
    Attempt(folder, dataset, checkpoint=20).steps(24).finish()
    assert [without_own(row) for row in run["history"]] == rows_until(24)
    assert wandb_sync.main([str(folder)]) == 0
    assert [without_own(row) for row in run["history"]] == rows_until(24)


@pytest.mark.slow
def test_sending_that_broke_off_goes_on_where_it_was(folder, dataset, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    Attempt(folder, dataset).steps(16).finish()
    monkeypatch.delenv("WANDB_MODE")
    run_id = (folder / "wandb_id").read_text()
    server.run(run_id)["history"] = [row | {"_step": row["global_step"]} for row in rows_until(6)]
    for said in ("sent, 5 rows", ""):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = [str(ROOT / "slurm" / "wandb_sync.sh")]  # in its default, all of runs/
        done = subprocess.run(
            script, env={**os.environ, "PATH": path}, cwd=folder.parent.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert [without_own(row) for row in server.runs[run_id]["history"]] == rows_until(16)
    assert [artifact["artifactTypeName"] for artifact in server.artifacts] == ["dataset"]


def test_a_run_that_is_being_trained_is_not_sent(folder, dataset, capfd, server):
    Attempt(folder, dataset, tracker="wandb").finish()
    lock = RunFolder(folder)._lock
    lock.acquire()
    assert wandb_sync.main([str(folder)]) == 1
    assert "is being trained" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_an_unreachable_server_costs_seconds_and_one_line(folder, dataset, capfd, monkeypatch, kind):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    port = silent.getsockname()[1] if kind == "is silent" else 9
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    Attempt(folder, dataset).steps(4).finish()
    assert time.monotonic() - started < SECONDS
    assert one_line(capfd).startswith("wandb: offline (the server does not answer); ")
    assert history_of(folder) == rows_until(4)
    silent.close()


# Whole runs


def content(attempt: Path) -> dict[str, Any]:
    """What W&B shows of an attempt: records by type, config and summary flat."""
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "artifacts": [], "files": [], "metrics": []}
    for record in records_of(attempt):
        kind = record.WhichOneof("record_type")
        if kind in ("config", "summary"):
            for item in getattr(record, kind).update:
                found[kind][".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "history":
            found["history"].append(history_row(record))
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
        elif kind == "files":
            found["files"] += [file.path for file in record.files.files]
        elif kind == "metric":
            found["metrics"].append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def merged(run: Path) -> dict[int, dict[str, Any]]:
    rows = dict[int, dict[str, Any]]()
    for row in RunFolder(run).read_metrics():
        rows[row["global_step"]] = rows.get(row["global_step"], {}) | row
    return rows


@pytest.fixture
def whole(photo_folder, tmp_path, run_here) -> Path:
    """The folder of a small training of six classes, three epochs."""
    classes = dict.fromkeys(["a", "b", "c", "d", os.fsdecode(b"K\xe4fer"), "蚂蚁"], 4)
    settings = [*TRAINING, "--data", photo_folder({"train": classes, "val": classes}), "--runs", tmp_path]
    settings += ["--run", "whole", "--epochs", "3", "--log-every", "4", "--lr", "0.002", "--tags", "a,b"]
    done = run_here(train, *settings)
    assert done.returncode == 0, done.stderr
    return tmp_path / "whole"


@pytest.mark.slow
def test_a_whole_run_tells_its_story(whole, tmp_path, run_here):
    (attempt,) = attempts(whole)
    found, rows = content(attempt), merged(whole)

    # The config is flat and says what explains a difference between runs.
    config = found["config"]
    expected = {"lr": 0.002, "batch_size": 4, "train_photos": 24, "val_photos": 24, "classes": 6, "world_size": 1}
    expected |= {
        "engine": choose_engine("auto", torch.device("cpu"))[0],
        "precision": "no",
        "devices": "cpu",
        "parameters": 11179590,
    }
    assert expected.items() <= config.items()
    assert config["trained_parameters"] == config["parameters"]
    assert len(config["dataset_fingerprint"]) == 32
    assert {"git_commit", "git_dirty", "version_torch", "version_python"} <= config.keys()
    assert not [key for key, value in config.items() if isinstance(value, dict) and key != "_wandb"]

    # Every step once, with what metrics.jsonl has, under names that stay.
    assert found["metrics"] == [("global_step", ""), ("*", "global_step")]
    assert [row["_step"] for row in found["history"]] == [4, 6, 8, 12, 16, 18] == list(rows)
    for row in found["history"]:
        assert rows[row["global_step"]].items() <= row.items()
    training = {"train/loss", "train/top1", "lr/head", "lr/body", "grad_norm", "perf/images_per_s", "perf/data_wait"}
    assert all(training | {"epoch"} <= row.keys() for row in found["history"])
    evaluated = [row["global_step"] for row in found["history"] if "val/loss" in row]
    assert evaluated == [6, 12, 18]
    evaluation = {"val/loss", "val/top1", "val/balanced_top1", "val/top5", "val/ece", "predictions.path"}
    evaluation |= {SWEEP["metric"]["name"], "best/val_balanced_top1"}
    assert all(evaluation <= row.keys() for row in found["history"] if row["global_step"] in evaluated)
    assert all(row["grad_norm"] > 0 for row in found["history"])
    best = max(rows.values(), key=lambda row: row.get("val/top1", -1))
    so_far = [row["best/val_top1"] for row in found["history"] if "val/top1" in row]
    assert so_far == [max(rows[step]["val/top1"] for step in evaluated[: n + 1]) for n in range(3)], "to stop early by"
    assert (found["summary"]["best/val_top1"], found["summary"]["best/epoch"]) == (best["val/top1"], best["epoch"])

    # The pictures, and the same photos in each table.
    pictures = {Path(path).name.rsplit("_", 2)[0] for path in found["files"] if path.startswith("media/images/")}
    assert {"train_batch", "curves", "confusion_matrix", "per_class"} <= pictures
    tables = [json.loads(path.read_text()) for path in (attempt / "files/media/table").glob("predictions_*.json")]
    assert len(tables) == 3
    assert tables[0]["columns"] == ["photo", "file", "truth", "prediction", "confidence", "right"]
    shown = [[tuple(row[:3]) for row in table["data"]] for table in tables]
    assert shown[0] == shown[1] == shown[2]
    assert len(set(shown[0])) == 16
    assert {truth for _, _, truth in shown[0]} == {*"abcd", r"K\xe4fer", "蚂蚁"}

    # The weights each time they improved, and the index of the photos.
    scores = [-1.0, *(rows[step]["val/top1"] for step in evaluated)]
    improved = sum(score > max(scores[:index]) for index, score in enumerate(scores) if index)
    models = [artifact for artifact in found["artifacts"] if artifact.type == "model"]
    assert len(models) == improved
    assert {"best", "whole"} <= set(models[-1].aliases)
    weights = {entry.path: Path(entry.local_path) for entry in models[-1].manifest.contents}
    assert weights["best.pt"].read_bytes() == (whole / "best.pt").read_bytes()
    assert json.loads(weights["model.json"].read_text())["scores"]["val/top1"] == best["val/top1"]
    (index,) = (artifact for artifact in found["artifacts"] if artifact.type == "dataset")
    assert config["dataset_fingerprint"] in index.metadata
    lines = Path(index.manifest.contents[0].local_path).read_text().splitlines()
    assert (lines[0], lines[1], len(lines)) == ("split,label,path", r"train,K\xe4fer,train/K\xe4fer/00.jpg", 1 + 48)
    assert found["exit"] == 0

    # An evaluation is added to the summary of the same run.
    time.sleep(1.1)
    done = run_here(evaluate, whole, "--tracker", "wandb", "--figures", tmp_path)
    assert done.returncode == 0, done.stderr
    (_, attempt) = attempts(whole)
    found = content(attempt)
    assert found["summary"]["test/top1"] == best["val/top1"]
    assert {"test/loss", "test/balanced_top1", "test/top5", "test/ece"} <= found["summary"].keys()
    assert not found["history"]
    assert found["exit"] == 0


def test_an_evaluation_of_what_wandb_does_not_know_is_refused(tmp_path, run_here):
    done = run_here(evaluate, tmp_path, "--tracker", "wandb", "--data", "shapes")
    assert done.returncode == 2
    assert "is no run that was trained with --tracker wandb" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_killed_training_and_its_resumed_half_are_one_run(photos, tmp_path, run_here, server, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "0.5")
    settings = [*TRAINING, "--data", photos, "--runs", tmp_path, "--run", "r", "--epochs", "3", "--log-every", "1"]
    settings = [str(setting) for setting in [*settings, "--log-model", "never"]]
    run = tmp_path / "r"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    first = psutil.Popen([sys.executable, ROOT / "train.py", *settings], env=environment, stdout=subprocess.DEVNULL)
    while first.poll() is None and (not (run / "metrics.jsonl").exists() or len(merged(run)) < 8):
        time.sleep(0.05)
    for process in (*first.children(recursive=True), first):
        process.kill()
    assert first.wait() == -signal.SIGKILL
    done = run_here(train, *settings)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    run_id = (run / "wandb_id").read_text()
    if mode == "online":
        history = server.runs[run_id]["history"]
        assert server.runs[run_id]["exit_code"] == 0
    else:
        assert len(attempts(run)) == 2
        history = [row for attempt in attempts(run) for record in records_of(attempt) if (row := history_row(record))]
    rows = merged(run)
    assert [row["global_step"] for row in history] == list(range(1, 16)) == list(rows)
    for row in history:  # the steps that were computed twice took another time
        expected = {key: value for key, value in rows[row["global_step"]].items() if not key.startswith("perf/")}
        assert expected.items() <= row.items()


# Keys


def test_a_key_that_wandb_login_has_stored_is_found(monkeypatch, tmp_path):
    assert not has_key()
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    assert has_key()
    # As `wandb login --host` leaves it: the server in W&B's settings, its key in the netrc file.
    settings = tmp_path / "home" / "wandb_config_dir" / "settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[default]\nbase_url = http://wandb.example.org:8080\n")
    wandb.teardown()
    assert not has_key()
    netrc.write_text("machine wandb.example.org:8080\n  login user\n  password 0123456789\n")
    assert has_key()
    netrc.write_text("no netrc file")
    assert not has_key()


# Sweeps


def test_what_an_agent_of_the_sweep_starts_is_accepted(monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = SWEEP
    assert (ROOT / sweep["program"]).is_file()
    chosen = {}
    for name, parameter in sweep["parameters"].items():
        chosen[name] = {"value": parameter.get("value", parameter.get("max", parameter.get("values", [None])[-1]))}
    flags = create_sweep_command_args({"args": chosen})["args"]
    assert "--lr=0.1" in flags
    config, recipe = parse_config(flags)
    assert recipe == "finetune"
    assert sweep["early_terminate"]["min_iter"] < config.epochs
    assert all(getattr(config, name) == given["value"] for name, given in chosen.items())
    # One process: with several GPUs each agent would take all of them.
    launch = ["accelerate", "launch", "--num_processes", "1", "${program}", "${args}"]
    assert create_sweep_command(sweep["command"])[-6:] == launch

    # No two tasks meet in one folder: it has the name of the agent's run, also in a Slurm array.
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for task in ("1", "2"):
        monkeypatch.setenv("WANDB_RUN_ID", f"run{task}")
        assert new_run_name(recipe) == f"run{task}"


# Alerts


@pytest.mark.slow
def test_alerts_tell_how_a_run_ends(folder, dataset, server):
    for number, (end, level, words) in enumerate(
        [
            (lambda tracking: tracking.finish({"best/val_top1": 0.75, "of": "A"}), "INFO", "best/val_top1 0.75, of A"),
            (lambda tracking: tracking.stopped("stopped at step 4 by SIGUSR1"), "WARN", "stopped at step 4 by SIGUSR1"),
            (lambda tracking: tracking.abandon(2, "the loss is not finite"), "ERROR", "the loss is not finite"),
        ]
    ):
        one = folder.parent / f"run{number}"
        one.mkdir()
        end(Attempt(one, dataset, alerts=True).steps(4).tracking)
        alert = server.alerts[-1]
        assert (alert["severity"], alert["text"], len(server.alerts)) == (level, words, number + 1)
        assert alert["title"].startswith(f"run{number}: ")
    Attempt(folder, dataset).steps(4).finish()
    assert len(server.alerts) == 3, "off by default"
