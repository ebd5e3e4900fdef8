"""The trackers besides W&B: TensorBoard, another of Accelerate's, and none."""

import time

from pipelines.config import Config
from pipelines.tracking.settings import check_tracker
from tests.helpers.tracked_runs import Attempt, one_line

import pytest
from accelerate import Accelerator


def test_tensorboard_has_every_row_once_after_a_resume(folder, dataset, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Attempt(folder, dataset, tracker="tensorboard").steps(8).tracking.abandon()
    time.sleep(1.1)
    Attempt(folder, dataset, checkpoint=4, tracker="tensorboard", tags="a").steps(12).finish()
    assert one_line(capfd) == "tags and group are W&B's: tensorboard does not get them"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = [(event.step, round(event.value, 4)) for event in events.Scalars("val/top1")]
    assert values == [(4, 0.04), (8, 0.08), (12, 0.12)]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_mlflow_has_the_settings_and_every_row_of_each_attempt(folder, dataset, capfd, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny, of the dev group, is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    check_tracker(Config(tracker="mlflow", project="p"))
    Attempt(folder, dataset, tracker="mlflow", project="p").steps(8).tracking.stopped()
    Attempt(folder, dataset, checkpoint=4, tracker="mlflow", project="p").steps(12).finish()
    assert capfd.readouterr().err.count("tracking has stopped") == 0
    client = mlflow.MlflowClient()
    runs = client.search_runs(
        [client.get_experiment_by_name("p").experiment_id], order_by=["attributes.start_time ASC"]
    )
    assert [run.info.run_name for run in runs] == ["one", "one"]
    assert all(run.data.params["lr"] == "0.01" and run.info.status == "FINISHED" for run in runs)
    for run, last in zip(runs, (8, 12), strict=True):
        history = {key: client.get_metric_history(run.info.run_id, key) for key in ("val/top1", "train/loss")}
        assert [(each.step, each.value) for each in history["val/top1"]] == [
            (step, step / 100) for step in range(4, last + 1, 4)
        ]
        assert [each.step for each in history["train/loss"]] == list(range(2, last + 1, 2))


def test_a_tracker_that_asks_for_a_key_is_left_behind(folder, dataset, capfd, monkeypatch):
    def asking(*_: object) -> None:  # stands in for Comet and others without a key
        input("key: ")

    monkeypatch.setattr(Accelerator, "init_trackers", asking)
    Attempt(folder, dataset, tracker="tensorboard").steps(4).finish()
    assert one_line(capfd).startswith("tracking has stopped (")


def test_no_tracker_makes_nothing(folder, dataset, capfd):
    Attempt(folder, dataset, tracker="none").steps(4).finish()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert capfd.readouterr() == ("", "")
