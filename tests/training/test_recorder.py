"""In which order a training's rows, pictures, weights and lines leave it, without a training."""

import json
from types import SimpleNamespace
from typing import Any

from pipelines.config import Config
from pipelines.distributed.exits import ExitStatus
from pipelines.model.optimizer import Schedule
from pipelines.run.checkpoint import Progress
from pipelines.run.folder import RunFolder
from pipelines.training import recorder as module
from pipelines.training import report
from pipelines.training.evaluation import RECORD
from pipelines.training.recorder import Recorder

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState

CONFIG = Config(epochs=2, log_every=2)


@pytest.fixture
def said(monkeypatch) -> list[Any]:
    """What the tracker, which is a stand-in, is told; with the number of rows in metrics.jsonl by then."""
    calls: list[Any] = []

    class StandIn:
        def __init__(self, accelerator: Any, config: Any, run: RunFolder, *_: Any) -> None:
            self._run = run

        def log(self, row: dict, records: Any = None, *, hold: bool = False) -> None:
            calls.append((row["global_step"], "held" if hold else "sent", len(self._run.read_metrics())))

        def __getattr__(self, name: str) -> Any:
            return lambda *given, **_: calls.append((name, *map(str, given[:1])))

    monkeypatch.setattr(module, "Tracking", StandIn)
    return calls


@pytest.fixture
def recorder(tmp_path, said) -> Recorder:
    run = RunFolder(tmp_path / "run")
    run.create(Config())
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "name": "head"}], lr=0.5)
    training = SimpleNamespace(wait_seconds=0.0)
    checked: Any = SimpleNamespace(run=run, accelerator=Accelerator(cpu=True), state=PartialState(), config=CONFIG)
    checked.classes, checked.dataset, checked.steps_per_epoch = ("a", "b"), None, 3
    parts: Any = SimpleNamespace(
        resolved_config=CONFIG, schedule=Schedule(CONFIG, 3), training=training, optimizer=optimizer
    )
    parts.facts, parts.head_row, parts.features = {}, {}, SimpleNamespace(are_kept=True)
    session: Any = SimpleNamespace(progress=Progress(), close_at_end=lambda _: None, on_end=lambda _: None)
    made = Recorder(checked, parts, session)
    made.start()
    return made


def train(recorder: Recorder, steps: int) -> None:
    """Updates with a loss of 1 and 2 photos each."""
    for _ in range(steps):
        recorder._progress.global_step += 1
        recorder.step(torch.tensor([2.0, 1, 2, 1, 1, 0, 0]), SimpleNamespace(images=[]))  # type: ignore[arg-type]


def test_the_row_of_a_fitted_head_comes_first(recorder, said):
    recorder._components.head_row = {"epoch": 0, "global_step": 0, "head/penalty": 0.001}
    recorder.start()
    assert said == [("show", str(recorder._run.figures / "head_penalty.png")), (0, "held", 1)]


def test_rows_are_written_before_they_are_told(recorder, said, capsys):
    recorder.start_epoch(0)
    train(recorder, 3)
    assert [call for call in said if call[0] != "show"] == [(2, "sent", 1), (3, "held", 2)]
    row = {"epoch": 1, "global_step": 3, "val/loss": 0.7, "val/top1": 0.5}
    recorder.evaluation(row, np.zeros(0, RECORD))
    recorder.best_weights()
    assert said[-2:] == [(3, "sent", 3), ("log_best", "3")]
    recorder._progress.epoch = 1
    recorder.end_epoch(recorder.epoch_means() | row)
    rows = [json.loads(line) for line in recorder._run.metrics.read_text().splitlines()]
    assert [(each["epoch"], each["global_step"]) for each in rows] == [(1, 2), (1, 3), (1, 3)]
    assert rows[0] == rows[0] | {"lr/head": 0.5, "train/loss": 1.0, "train/top1": 0.5}
    assert "1/2  5.00e-01" in capsys.readouterr().out


@pytest.mark.parametrize("are_kept", [True, False])
def test_a_first_batch_without_photos_leaves_a_loader_at_work_alone(recorder, said, monkeypatch, are_kept):
    drawn: list[Any] = []
    monkeypatch.setattr(recorder, "_draw_train_batch", drawn.append)
    recorder._components.features = SimpleNamespace(are_kept=are_kept)
    train(recorder, 1)
    assert len(drawn) == are_kept


def test_the_last_row_waits_for_the_end(recorder, said):
    recorder._progress.global_step = 6
    recorder.evaluation({"epoch": 2, "global_step": 6}, np.zeros(0, RECORD))
    assert said[-1] == (6, "held", 1)


def test_an_epoch_goes_on_where_it_was_left(recorder):
    recorder.start_epoch(0)
    train(recorder, 1)
    state = json.loads(json.dumps(recorder.state_dict()))
    train(recorder, 1)
    recorder.load_state_dict(state)
    recorder._progress.global_step = 1
    recorder.start_epoch(1)
    train(recorder, 2)
    assert recorder.epoch_means()["train/loss"] == pytest.approx(1)
    assert recorder._whole_epoch._sums[2] == 6, "photos"


@pytest.mark.parametrize(("code", "told"), [(75, "stopped"), (2, "abandon")])
def test_the_tracker_is_told_how_a_run_ends_early(recorder, said, code, told):
    recorder.end_early(ExitStatus("why", code))
    assert said[-1][0] == told


def test_an_epoch_that_waits_for_photos_says_once_what_may_help(recorder, monkeypatch, capsys):
    split = SimpleNamespace(sizes=np.full((1000, 2), 3000), faults=np.zeros(1000))
    recorder._components.training = SimpleNamespace(split=split, plan=SimpleNamespace(length=1000), wait_seconds=0.0)
    recorder._components.network = SimpleNamespace(frozen_part_is_fixed=True)
    recorder._components.features = SimpleNamespace(are_kept=False)
    monkeypatch.setattr(report, "cpu_cores", lambda: 1024)
    recorder._checked.dataset = SimpleNamespace(decoded_bytes=lambda: 27 * 10**9)
    recorder._checked.engine = "pillow"
    row = {"lr/head": 0.5, "train/loss": 1.0, "perf/images_per_s": 120.0}
    for waited in (0.04, 0.4, 0.5):
        recorder.end_epoch(row | {"perf/data_wait": waited})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("input: ")]
    assert line.startswith("input: 40% of the epoch was spent waiting for photos: 120 a second, 200 without it; ")
    assert "what may help: --loader_threads 1024, --shrink 512, --views_per_photo 4; " in line


@pytest.mark.parametrize(
    ("engine", "are_kept", "views", "advice"),
    [
        ("pillow", False, None, "--memory_gb 1.05, --views_per_photo 4"),
        ("dali", False, None, "--views_per_photo 4"),  # keeps no photos
        ("pillow", True, 4, ""),
        ("pillow", False, 4, "--memory_gb 1.05"),  # four views are more than is kept
    ],
)
def test_no_advice_is_one_that_cannot_help(engine, are_kept, views, advice, recorder, monkeypatch):
    split = SimpleNamespace(sizes=np.full((1000, 2), 400), faults=np.zeros(1000))
    components: Any = SimpleNamespace(
        training=SimpleNamespace(split=split, plan=SimpleNamespace(length=1000)),
        network=SimpleNamespace(frozen_part_is_fixed=True),
        features=SimpleNamespace(are_kept=are_kept),
        resolved_config=SimpleNamespace(views_per_photo=views),
    )
    dataset = SimpleNamespace(decoded_bytes=lambda: 1_044_300_000)
    checked: Any = SimpleNamespace(config=CONFIG, engine=engine, dataset=dataset)
    monkeypatch.setattr(report, "cpu_cores", lambda: 1)
    monkeypatch.setattr(report, "memory_bytes", lambda: 10**10)
    (line,) = report.input_report(checked, components, {"perf/data_wait": 0.5, "perf/images_per_s": 100.0})
    assert (f"what may help: {advice};" in line) if advice else ("may help" not in line)
