"""What a faster input could win: a training as it is, in turn with the same steps on one batch that stays in memory.

    python benchmarks/headroom.py --data photos/                    # any settings of train.py, a recipe too
    python benchmarks/headroom.py --steps 50 --turns 5 --config configs/imagenet.yaml --loader_threads 4

Steps are train.py's own, of one process, with the stages frozen that a setting names (`freeze: auto` trains all), and
nothing is kept of what those make of photos. On a CPU decoding and training share the cores, so that input costs more
than the waiting for it. The rates are medians over the turns; one before them warms up.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

from pipelines.config import parse_config
from pipelines.data.engines.factory import agree_on_engine, engine_module
from pipelines.data.loader import Loader, Step, train_loader
from pipelines.data.open import open_dataset
from pipelines.data.preprocess import choose_crop_mode
from pipelines.data.shrink_pass import make_copies
from pipelines.distributed.exits import run_script
from pipelines.distributed.hardware import machine
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.node_memory import node_memory
from pipelines.errors import UserError
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TrainedPart, build_model, frozen_stages
from pipelines.model.optimizer import make_optimizer
from pipelines.model.weights import read_weights
from pipelines.run.folder import versions
from pipelines.text import lasting_streams
from pipelines.training.progress import Interval, StepWatch
from pipelines.training.step import update

import numpy as np
import torch


class Training:
    """train.py's own step and what belongs to it, of one process. arguments: settings, as on its command line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        config, _ = parse_config([*arguments, "--views-per-photo", "null"])
        if config.teacher or config.first_image_size or config.freeze_epochs:
            raise UserError("headroom: each step is to cost the same: without teacher, first_image_size, freeze_epochs")
        freeze = "none" if config.freeze == "auto" else config.freeze
        batch = config.max_batch_per_device if isinstance(config.max_batch_per_device, int) else config.batch_size
        self.config = replace(config, freeze=freeze, max_batch_per_device=min(batch, config.batch_size))
        self.state = start_processes()
        self._dataset = open_dataset(self.state, self.config)
        self.split = self._dataset.splits["train"]
        if config.crop_mode == "auto":
            self.config = replace(self.config, crop_mode=choose_crop_mode(self.split.sizes)[0])
        self.accelerator = start_accelerator(self.config, self.state, None, steps=450_000)
        self.network = build_model(self.config, read_weights(self.config), self.split.classes).to(self.state.device)
        self.network.freeze(frozen_stages(self.config, freeze))
        optimizer = make_optimizer(self.network, self.config)
        self.model, self.optimizer = self.accelerator.prepare(TrainedPart(self.network), optimizer)
        self.network.train()
        self._interval, self._watch = Interval(self.state.device), StepWatch()
        make_copies([self.split], self.config, self.state)

    def loader(self, engine: str) -> Loader:
        """train.py's, of the photos."""
        labels, micro_batch = self.split.labels.astype(np.int64), self.config.max_batch_per_device
        assert isinstance(micro_batch, int)
        split, memory = self.split, int(self.config.memory_gb * 1e9)
        if memory and engine_module(engine).USES_MEMORY:
            split = self._dataset.remembered(memory, partial(node_memory, self.state)).splits["train"]
        return train_loader(self.config, split, labels, self.state, engine, micro_batch)

    def steps(self, loader: Loader) -> Iterator[Step]:
        """Epoch after epoch, whole steps alone."""
        whole = min(self.config.batch_size, len(self.split))
        return (step for epoch in count() for step in loader.epoch(epoch) if step.size == whole)

    def resident(self, loader: Loader) -> Iterator[Step]:
        """One step's batches again and again: what the loop could do if photos cost nothing."""
        step = next(loader.epoch(0))
        batches = list(step.batches)
        while True:
            yield Step(step.size, step.rounds, iter(batches))

    def train(self, loader: Loader, steps: Iterator[Step], number: int, watched: Any = nullcontext) -> float:
        """Seconds for so many steps, all of the GPU's work included. watched: a context for the steps alone."""
        features = FrozenFeatures(self.network, loader, self.accelerator, views_per_photo=None, epochs=1, micro_batch=1)
        self._wait()
        started = time.perf_counter()
        with watched():
            for step in islice(steps, number):
                sums, _ = update(
                    self.model, features, self.optimizer, step, (False, False), loader, self.accelerator, self.config
                )
                self._interval.add(sums)
                self._watch.add(sums, str)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()


@lasting_streams()
def main(arguments: list[str]) -> None:
    """Measures and prints. arguments: what follows the script's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each way, after one that warms up")
    options, settings = parser.parse_known_args(arguments)
    training = Training(settings)
    engine, reason = agree_on_engine(training.config.loader, training.state)
    as_it_is, resident = training.loader(engine), training.loader(engine)
    ways = {"as it is": (as_it_is, training.steps(as_it_is)), "free": (resident, training.resident(resident))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    waits = []
    photos = options.steps * min(training.config.batch_size, len(training.split))
    for _ in range(options.turns + 1):
        for name, (loader, steps) in ways.items():
            waited = loader.wait_seconds
            seconds[name].append(training.train(loader, steps, options.steps))
            if name == "as it is":
                waits.append((loader.wait_seconds - waited) / seconds[name][-1])
    for loader, _ in ways.values():
        loader.close()
    rates = {name: statistics.median(photos / each for each in found[1:]) for name, found in seconds.items()}
    print(machine(), ", ".join(f"{name} {version}" for name, version in versions().items()), sep="\n")
    print(f"loader: {engine} ({reason}); {options.steps} steps of {training.config.batch_size}, n = {options.turns}")
    now, free, waiting = rates["as it is"], rates["free"], statistics.median(waits[1:])
    print(f"as it is:            {now:>8.1f} photos/s; {waiting:.1%} of the time it waits for photos")
    print(f"if photos were free: {free:>8.1f} photos/s, {free / now:.2f} times as many")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
