"""What a person sees of a training: the table of epochs, a progress bar, and the sums that both are made of."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.distributed.copies import read_later
from pipelines.errors import UserError
from pipelines.training.step import METRICS, StepSums

import torch
from tqdm import tqdm

_HEADER = "      lr  train loss  train top1    val loss    val top1  balanced  images/s  data wait    best"
_COLUMNS = (  # of _HEADER: key, format, width
    ("lr/head", ".2e", 8),
    *((f"{split}/{name}", ".4f", 10) for split in ("train", "val") for name in ("loss", "top1")),
    ("val/balanced_top1", ".4f", 8),
    ("perf/images_per_s", ".1f", 8),
    ("perf/data_wait", ".1%", 9),
)
_DIVERGED_AFTER = 3  # losses in a row that are not finite; fp16's search for a scale gives single ones


class Interval:
    """Sums over the photos and steps since the last row; seconds, waiting.

    Everything stays on the device until `row` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        self._device = device
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(METRICS.stop, device=device, dtype=kind)
        self._started, self._waited_before = time.perf_counter(), 0.0

    def start(self, wait_seconds: float) -> None:
        """Begins a new interval now. wait_seconds: how long the loader has waited so far, all in all."""
        self._sums.zero_()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started, self._waited_before = time.perf_counter(), wait_seconds

    def add(self, sums: torch.Tensor) -> None:
        """sums: of one step over all processes, the tensor of `StepSums`."""
        self._sums += sums[METRICS]

    def state(self, wait_seconds: float) -> dict[str, Any]:
        """What `restore` needs to go on with this interval in another attempt at the run; JSON."""
        seconds = time.perf_counter() - self._started
        return {"sums": self._sums.tolist(), "seconds": seconds, "waited": wait_seconds - self._waited_before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with an interval, with a loader that has not waited yet."""
        sums = [math.nan if value is None else value for value in state["sums"]]  # JSON has no NaN
        self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))
        self._started, self._waited_before = time.perf_counter() - state["seconds"], -state["waited"]

    def row(self, wait_seconds: float) -> dict[str, float]:
        """The interval's means and rates, under the names of metrics.jsonl."""
        loss, correct, photos, norms, steps = self._sums.tolist()
        seconds = max(time.perf_counter() - self._started, 1e-9)
        row = {
            "train/loss": loss / max(1, photos),
            "train/top1": correct / max(1, photos),
            "perf/images_per_s": photos / seconds,
            "perf/data_wait": min(1.0, (wait_seconds - self._waited_before) / seconds),
            "grad_norm": norms / max(1, steps),
        }
        if self._device.type == "cuda":
            row["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return row


class StepWatch:
    """Looks at every step's sums without waiting for the GPU: they are copied in the background and read a step later.

    Ends a run whose loss is not finite for three updates in a row. stop, save: whether a process has asked, in a step
    that was looked at, for a stop or for a checkpoint. All processes look at the same steps, so they agree.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self.not_finite_in_a_row = 0
        self._copies: deque[tuple[Callable[[], list[float]], Callable[[], str]]] = deque()

    def add(self, sums: torch.Tensor, where: Callable[[], str]) -> None:
        """sums: of one step over all processes, the tensor of `StepSums`.

        where: names step, lr and photos, for the message.
        """
        self._copies.append((read_later(sums), where))
        self.check(keep=1 if sums.device.type == "cuda" else 0)

    def check(self, keep: int = 0) -> None:
        """Looks at all steps but the last `keep`. Raises UserError once three losses in a row are not finite."""
        while len(self._copies) > keep:
            read, where = self._copies.popleft()
            sums = StepSums(*read())
            self.stop, self.save = self.stop or sums.stop_votes > 0, self.save or sums.save_votes > 0
            self.not_finite_in_a_row = 0 if math.isfinite(sums.loss) else self.not_finite_in_a_row + 1
            if self.not_finite_in_a_row == _DIVERGED_AFTER:
                raise UserError(
                    f"the loss was not finite in {_DIVERGED_AFTER} updates in a row, last at {where()}: lower --lr, "
                    "add --warmup-epochs or --clip-grad-norm, in a new run (another --run name, or --overwrite); "
                    "earlier best weights, if any, are kept"
                )

    def state_dict(self) -> dict[str, int]:
        """JSON: how many losses in a row were not finite."""
        return {"not_finite_in_a_row": self.not_finite_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """state: what `state_dict` has returned, maybe among other things."""
        self.not_finite_in_a_row = state["not_finite_in_a_row"]


class EpochTable:
    """One aligned row per epoch on stdout, under a header that is printed once; a progress bar while an epoch runs."""

    def __init__(self, *, visible: bool, epochs: int, steps_per_epoch: int) -> None:
        self._visible = visible
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._width = max(len("epoch"), len(f"{epochs}/{epochs}"))
        self._bar: tqdm | None = None
        self._has_header = False

    def close(self) -> None:
        """Takes the bar away, so that what is said next stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def start_epoch(self, epoch: int, start_step: int = 0) -> None:
        """epoch: 1 is the first. start_step: steps of it that are done. Shows a bar where there is a terminal."""
        self._print_header()
        self._bar = tqdm(
            total=self._steps_per_epoch,
            initial=start_step,
            desc=f"epoch {epoch}/{self._epochs}",
            unit="step",
            leave=False,
            disable=not self._visible or not sys.stderr.isatty(),
        )

    def step(self) -> None:
        """One global step is done."""
        if self._bar is not None:
            self._bar.update()

    def training_row(self, row: Mapping[str, float], *, epoch_ends: bool) -> None:
        """A row of metrics: beside the bar, or a plain line where there is no terminal and the epoch goes on."""
        if not self._visible or self._bar is None:
            return
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {row['train/loss']:.3f}, {row['perf/images_per_s']:.0f} images/s")
        elif not epoch_ends:
            print(
                f"step {row['global_step']}: loss {row['train/loss']:.4f}, top1 {row['train/top1']:.4f}, "
                f"{row['perf/images_per_s']:.1f} images/s",
                flush=True,
            )

    def end_epoch(self, epoch: int, row: Mapping[str, float], *, best: float) -> None:
        """row: the epoch's means (`train/*`, `perf/*`), `val/*` and `lr/head`; of epoch 0, before the training, only
        `val/*`. best: the run's best so far."""
        if self._bar is not None:
            self._bar.close()
        self._print_header()
        if self._visible:
            cells = [f"{row[key]:{form}}" if key in row else "-" for key, form, _ in _COLUMNS]
            line = "  ".join(f"{cell:>{width}}" for cell, (*_, width) in zip(cells, _COLUMNS, strict=True))
            print(f"{f'{epoch}/{self._epochs}':>{self._width}}  {line}  {best:6.4f}", flush=True)

    def _print_header(self) -> None:
        if self._visible and not self._has_header:
            print(f"{'epoch':>{self._width}}  {_HEADER}", flush=True)
        self._has_header = True
