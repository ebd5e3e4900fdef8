"""The numbers a person sees are means over photos, and a training that has gone wrong ends."""

import json
import re
from types import SimpleNamespace

from pipelines.errors import UserError
from pipelines.training import progress
from pipelines.training.progress import EpochTable, Interval, StepWatch

import pytest
import torch

CPU = torch.device("cpu")
ROW = {
    "lr/head": 0.01,
    "train/loss": 0.5123,
    "train/top1": 0.75,
    "val/loss": 12.3456,
    "val/top1": 0.8765,
    "val/balanced_top1": 0.8123,
    "perf/images_per_s": 1234.5,
    "perf/data_wait": 0.123,
}


def sums(
    loss: float, correct: int = 1, photos: int = 2, norm: float | None = None, stop: int = 0, save: int = 0
) -> torch.Tensor:
    return torch.tensor([loss, correct, photos, norm or 0, norm is not None, stop, save], dtype=torch.float32)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Stands in for the machine's; `now` is in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# Means


def test_an_interval_takes_means_over_photos_and_not_over_steps(clock):
    interval = Interval(CPU)
    interval.start(wait_seconds=5.0)
    interval.add(sums(8.0, correct=6, photos=8))
    interval.add(sums(4.0, correct=0, photos=2))  # a short step counts less
    clock.now += 0.1
    row = interval.row(wait_seconds=5.05)
    assert row["train/loss"] == pytest.approx(1.2)
    assert row["train/top1"] == pytest.approx(0.6)
    assert row["perf/images_per_s"] == pytest.approx(100)
    assert row["perf/data_wait"] == pytest.approx(0.5)

    interval.start(wait_seconds=5.05)
    interval.add(sums(3.0, correct=1, photos=1))
    row = interval.row(wait_seconds=5.05)
    assert (row["train/loss"], row["train/top1"], row["perf/data_wait"]) == (3.0, 1.0, 0.0)


def test_the_gradient_norm_is_a_mean_over_finite_ones():
    interval = Interval(CPU)
    for norm in (1.0, None, 3.0):
        interval.add(sums(1.0, norm=norm))
    assert interval.row(0.0)["grad_norm"] == 2.0
    assert Interval(CPU).row(0.0)["grad_norm"] == 0.0


def test_an_interval_without_photos_has_no_division_by_zero():
    assert Interval(CPU).row(0.0)["train/loss"] == 0.0


def test_sums_over_a_long_epoch_stay_exact():
    interval = Interval(CPU)
    for _ in range(3):
        interval.add(sums(0.0, correct=2**24 - 1, photos=2**24))  # float32 would lose the ones
    assert interval.row(0.0)["train/top1"] == (2**24 - 1) / 2**24


# Divergence


def watch(losses: list[float], device: torch.device = CPU) -> None:
    watching = StepWatch()
    for step, loss in enumerate(losses, start=1):
        watching.add(sums(loss).to(device), lambda step=step: f"step {step}, lr 0.1, photos a.jpg")
    watching.check()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("losses", [[], [1.0], [NAN, INF, 1.0, NAN, NAN, 2.0], [1.0, NAN, -INF]])
def test_two_losses_in_a_row_may_be_not_finite(losses):
    watch(losses)


@pytest.mark.parametrize(("losses", "step"), [([1.0, NAN, INF, NAN, 1.0], 4), ([NAN] * 3, 3), ([-INF] * 5, 3)])
def test_three_in_a_row_end_the_run_with_step_lr_and_photos(losses, step):
    with pytest.raises(UserError, match=rf"3 updates in a row, last at step {step}, lr 0.1, photos a.jpg: lower --lr"):
        watch(losses)


def test_a_request_of_one_process_lasts_until_it_is_answered():
    watching = StepWatch()
    watching.add(sums(1.0), str)
    assert (watching.stop, watching.save) == (False, False)
    watching.add(sums(1.0, save=1), str)
    assert (watching.stop, watching.save) == (False, True)
    watching.add(sums(1.0, stop=2), str)
    watching.add(sums(1.0), str)
    assert (watching.stop, watching.save) == (True, True)


def test_an_interval_goes_on_after_a_resume(clock):
    before, after = Interval(CPU), Interval(CPU)
    before.start(2.0)
    before.add(sums(0.1, 1, 3))
    before.add(sums(0.2, 2, 3))
    clock.now += 0.1
    after.restore(json.loads(json.dumps(before.state(wait_seconds=2.5))))
    for interval, waited in ((before, 2.5), (after, 0.0)):  # the second attempt's loader has not waited yet
        interval.add(sums(0.7, 0, 3))
        assert interval.state(waited)["waited"] == pytest.approx(0.5)
    rows = [interval.row(waited) for interval, waited in ((before, 2.5), (after, 0.0))]
    assert all(rows[0][name] == rows[1][name] for name in ("train/loss", "train/top1"))
    assert rows[1]["perf/images_per_s"] == pytest.approx(rows[0]["perf/images_per_s"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_a_loss_is_checked_later():
    watch([1.0, NAN, NAN, 1.0], torch.device("cuda"))
    with pytest.raises(UserError, match="last at step 3"):
        watch([NAN] * 3, torch.device("cuda"))


# The table


def right_edges(line: str) -> list[int]:
    """Where the columns end: two words are of one column where a single space stands between them."""
    return [match.end() for match in re.finditer(r"\S+( \S+)*", line)]


@pytest.mark.parametrize("epochs", [3, 90, 300, 1000])
def test_rows_stand_under_the_header(capsys, epochs):
    table = EpochTable(visible=True, epochs=epochs, steps_per_epoch=2)
    for epoch in (1, epochs):
        table.start_epoch(epoch)
        table.step()
        table.end_epoch(epoch, ROW | {"perf/data_wait": epoch / epochs}, best=1.0)
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2
    for epoch, row in zip((1, epochs), rows, strict=True):
        assert right_edges(row) == right_edges(header)
        assert row.split()[0] == f"{epoch}/{epochs}"
    assert rows[0].split()[1:-2] == ["1.00e-02", "0.5123", "0.7500", "12.3456", "0.8765", "0.8123", "1234.5"]


def test_a_plain_log_where_there_is_no_terminal(capsys):
    table = EpochTable(visible=True, epochs=3, steps_per_epoch=100)
    table.start_epoch(1)
    table.training_row(ROW | {"global_step": 50}, epoch_ends=False)
    table.training_row(ROW | {"global_step": 100}, epoch_ends=True)  # the table has it
    table.end_epoch(1, ROW, best=0.9)
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert len(lines) == 3
    assert lines[1] == "step 50: loss 0.5123, top1 0.7500, 1234.5 images/s"


def test_a_bar_and_no_plain_log_where_there_is_one(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    table = EpochTable(visible=True, epochs=3, steps_per_epoch=4)
    table.start_epoch(2)
    table.step()
    table.training_row(ROW | {"global_step": 5}, epoch_ends=False)
    table.end_epoch(2, ROW, best=0.9)
    output = capsys.readouterr()
    assert "epoch 2/3" in output.err
    assert "loss 0.512, 1234 images/s" in output.err
    assert len(output.out.splitlines()) == 2


def test_the_other_processes_say_nothing(capsys):
    table = EpochTable(visible=False, epochs=3, steps_per_epoch=4)
    table.start_epoch(1)
    table.step()
    table.training_row(ROW | {"global_step": 1}, epoch_ends=False)
    table.end_epoch(1, ROW, best=0.9)
    assert capsys.readouterr() == ("", "")
