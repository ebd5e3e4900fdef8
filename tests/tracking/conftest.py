"""No account of this machine, a server's stand-in, photos and a folder for a run."""

import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.dataset import Dataset, load_dataset, scan_dataset
from tests.helpers.wandb_server_standin import KEY, StandInServer

import pytest
import wandb


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path) -> Iterator[None]:
    """No W&B account, settings or server of this machine, and none left by another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # A prompt would now be read from a terminal.
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()
    os.environ.pop("WANDB_DATA_DIR", None)


@pytest.fixture
def server(monkeypatch) -> Iterator[StandInServer]:
    server = StandInServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")  # seconds; W&B's own default is 15
    yield server
    server.stop()


@pytest.fixture(scope="session")
def dataset(photos, tmp_path_factory) -> Dataset:
    return load_dataset(scan_dataset(photos, tmp_path_factory.mktemp("index"), 0.2))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    return folder
