"""How an attempt at a run ends, without one: signals, votes, the clock, status.json, what is closed, in which order."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.config import Config
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.errors import MachineError, StopAgreed, Stopped, UserError
from pipelines.run.folder import RunFolder
from pipelines.training.session import Session

import pytest
import torch
from accelerate import PartialState


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def begin(photos, tmp_path):
    """A session of a new run, or of one that goes on from `saved`."""
    dataset = load_dataset(scan_dataset(photos, tmp_path / "cache", 0.2))

    def make(saved: dict[str, Any] | None = None, **settings: Any) -> Session:
        config = Config(**{"checkpoint_minutes": 60} | settings)
        run = RunFolder(tmp_path / "run")
        before = config if saved else None
        parts = {"config": config, "run": run, "dataset": dataset, "saved": saved, "previous_config": before}
        checked: Any = SimpleNamespace(**parts, state=PartialState(cpu=True))
        return Session(checked)

    return make


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run/status.json").read_text())


def sums(stop: int = 0, save: int = 0) -> torch.Tensor:
    return torch.tensor([1.0, 1, 1, 1, 1, stop, save])


def test_a_stop_is_saved_and_told_and_then_all_is_closed(begin, tmp_path):
    done: list[Any] = []

    def attempt() -> None:
        with begin() as session:
            assert status(tmp_path)["state"] == "running"
            session.close_at_end(lambda: done.append("closed last"))
            session.close_at_end(lambda: done.append("closed first"))
            session.save_by(lambda: done.append("saved"))
            session.on_end(lambda ended: done.append(ended.exit_code))
            session.progress.global_step = 7
            os.kill(os.getpid(), signal.SIGTERM)
            assert session.votes() == (True, False)
            assert session.stop_is_asked()
            session.stop_if_agreed()  # a wish of one process is no agreement
            session.watch_step(sums(stop=1), str)
            session.stop_if_agreed()

    with pytest.raises(Stopped, match="stopped at step 7 by SIGTERM: --run run with the same settings goes on"):
        attempt()
    assert done == ["saved", 75, "closed first", "closed last"]
    assert status(tmp_path) == status(tmp_path) | {"state": "stopped", "exit_code": 75, "global_step": 7}
    RunFolder(tmp_path / "run").create(Config(), resumed=True)  # others may write into it


def test_a_stop_within_a_pass_is_the_same(begin, tmp_path):
    with pytest.raises(Stopped, match="stopped at step 0 by"), begin():
        raise StopAgreed
    assert status(tmp_path)["state"] == "stopped"


def test_a_checkpoint_that_cannot_be_written_is_what_ended_the_run(begin, tmp_path):
    def full() -> None:
        raise MachineError("disk full")

    session = begin()
    session.save_by(full)
    with pytest.raises(MachineError, match="disk full"), session:
        raise StopAgreed
    assert status(tmp_path) == status(tmp_path) | {"state": "failed", "reason": "disk full", "exit_code": 3}


def test_a_failure_is_told_and_its_photo_noted(begin, tmp_path):
    ended: list[Any] = []
    session = begin()
    session.on_end(ended.append)
    session.save_by(lambda: ended.append("saved"))
    with pytest.raises(UserError, match=r"b\.jpg"), session:
        raise UserError("b.jpg: cannot be decoded", bad_photo=("train", 1))
    assert [each.line for each in ended] == ["b.jpg: cannot be decoded"], "nothing is saved in between"
    assert status(tmp_path) == status(tmp_path) | {"state": "failed", "exit_code": 2}
    assert len(json.loads((tmp_path / "run/bad_photos.json").read_text())) == 1


def test_what_cannot_begin_leaves_the_folder_free(begin, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise MachineError("disk full")

    monkeypatch.setattr(RunFolder, "keep_photos", full)
    with pytest.raises(MachineError, match="disk full"), begin():
        raise AssertionError("it has not begun")
    assert status(tmp_path)["state"] == "failed"
    RunFolder(tmp_path / "run").create(Config(), resumed=True)


def test_a_checkpoint_is_due_by_the_clock_and_by_votes(begin):
    with begin(checkpoint_minutes=1e-9) as session:
        assert session.votes() == (False, True)
        assert not session.save_is_agreed
        session.watch_step(sums(save=1), str)
        assert session.save_is_agreed
        session.save()
        assert not session.save_is_agreed
        # On a GPU the next step's vote is on its way when the first one is seen.
        session.watch._copies.append((sums(save=1).tolist, str))
        session.save()
        assert not session.save_is_agreed
        session.watch_step(sums(), str)
        assert not session.save_is_agreed, "one checkpoint, and not two, a step apart"
    with begin({"metrics_bytes": 0, **ZERO}) as session:
        assert session.votes() == (False, False)


ZERO = {"epoch": 0, "global_step": 0, "skipped_steps": 0, "best": {"epoch": 0}}


def test_rows_after_the_checkpoint_are_taken_back(begin, tmp_path):
    with begin():
        (tmp_path / "run/metrics.jsonl").write_text('{"global_step": 1}\n{"global_step": 2}\n')
    with begin(ZERO | {"epoch": 1, "global_step": 1, "metrics_bytes": 19}) as session:
        assert (tmp_path / "run/metrics.jsonl").read_text() == '{"global_step": 1}\n'
        assert (session.progress.epoch, session.progress.global_step) == (1, 1)
