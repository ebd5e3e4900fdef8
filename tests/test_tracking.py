"""Trackers get every row; whatever is wrong with them, a training hears one line and goes on."""

import os
import time
from dataclasses import asdict
from pathlib import Path

from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.tracking import Tracking, tracker_names

import pytest
import wandb
from accelerate import Accelerator

ROWS = [
    {"epoch": 1, "global_step": 1, "train/loss": 0.7},
    {"epoch": 1, "global_step": 1, "val/top1": 0.5},
    {"epoch": 2, "global_step": 2, "val/top1": 0.75},
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No W&B account, settings or server of this machine, and none left by another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    # A prompt would now be read from a terminal.
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    return folder


def track(tracker: str, folder: Path) -> Tracking:
    config = Config(tracker=tracker, runs=str(folder.parent))
    accelerator = Accelerator(cpu=True, log_with=tracker_names(config), project_dir=config.runs)
    return Tracking(accelerator, config, folder, {**asdict(config), "world_size": 1})


def run_through(tracker: str, folder: Path) -> None:
    tracking = track(tracker, folder)
    for row in ROWS:
        tracking.log(row)
    tracking.finish({"best/val_top1": 0.75})


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def one_line(capfd) -> str:
    output = capfd.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    return output.err.rstrip("\n")


# Weights & Biases


def test_without_a_key_wandb_is_offline_and_says_how_to_send_the_run(folder, capfd):
    run_through("wandb", folder)
    (run,) = offline_runs(folder)
    assert one_line(capfd) == f"wandb: offline (no key); send the run later with: wandb sync {run}"
    (file,) = run.glob("*.wandb")
    run_id = (folder / "wandb_id").read_text()
    assert file.name == f"run-{run_id}.wandb"
    content = file.read_bytes()
    for part in (b"train/loss", b"val/top1", b"best/val_top1", b"world_size", b"0.75"):
        assert part in content


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_the_mode_of_the_environment(folder, capfd, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    run_through("wandb", folder)
    if mode == "disabled":
        assert capfd.readouterr() == ("", "")
        assert not offline_runs(folder)
        return
    reason = "WANDB_MODE=offline" if mode == "offline" else "no key"
    assert one_line(capfd).startswith(f"wandb: offline ({reason}); ")
    assert len(offline_runs(folder)) == 1


def test_a_run_keeps_its_id_for_life(folder, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    run_through("wandb", folder)
    assert (folder / "wandb_id").read_text() == "fromagent"
    monkeypatch.delenv("WANDB_RUN_ID")
    time.sleep(1.1)  # the folders of W&B are named by the second
    run_through("wandb", folder)
    assert [run.name.split("-")[-1] for run in offline_runs(folder)] == ["fromagent"] * 2


def test_a_tracker_that_fails_is_left_behind_in_one_line(folder, capfd):
    tracking = track("wandb", folder)
    one_line(capfd)
    wandb.finish()
    for row in ROWS:
        tracking.log(row)
    tracking.finish({})
    assert one_line(capfd).startswith("tracking has stopped (")


def test_a_tracker_that_cannot_start_is_left_behind_in_one_line(folder, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    run_through("wandb", folder)
    assert one_line(capfd).startswith("tracking has stopped (")


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_costs_seconds_and_one_line(folder, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    run_through("wandb", folder)
    assert time.monotonic() - started < 30
    assert len(offline_runs(folder)) == 1
    line = one_line(capfd)
    assert line.startswith("wandb: offline (")
    assert "wandb sync" in line


def test_a_key_that_wandb_login_has_stored_is_found(monkeypatch, tmp_path):
    from pipelines.tracking import _has_key

    assert not _has_key()
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    assert _has_key()
    # As `wandb login --host` leaves it: the server in W&B's settings, its key in the netrc file.
    settings = tmp_path / "home" / "wandb_config_dir" / "settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[default]\nbase_url = http://wandb.example.org:8080\n")
    wandb.teardown()
    assert not _has_key()
    netrc.write_text("machine wandb.example.org:8080\n  login user\n  password 0123456789\n")
    assert _has_key()
    netrc.write_text("no netrc file")
    assert not _has_key()


# TensorBoard, and none


def test_tensorboard_has_every_row_in_the_runs_folder(folder, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_through("tensorboard", folder)
    assert "tracking has stopped" not in capfd.readouterr().err
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/top1")] == [(1, 0.5), (2, 0.75)]
    assert [event.step for event in events.Scalars("global_step")] == [1, 1, 2]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_tensorboard_that_is_not_installed_is_the_users_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard is not installed: pip install tensorboard"):
        tracker_names(Config(tracker="tensorboard"))
    assert tracker_names(Config(tracker="wandb")) == "wandb"


def test_no_tracker_makes_nothing(folder, capfd):
    assert tracker_names(Config(tracker="none")) is None
    run_through("none", folder)
    assert list(folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")
