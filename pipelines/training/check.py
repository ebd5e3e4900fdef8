"""What must hold before a model or a run folder is made: settings, launcher, photos, weights, in this order."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import Config, not_named, parse_config, recipe_given
from pipelines.data.dataset import Dataset, check_dataset
from pipelines.data.engines.factory import agree_on_engine, engine_module
from pipelines.data.open import open_dataset
from pipelines.data.preprocess import choose_crop_mode
from pipelines.data.shrink_pass import check_room
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.node_memory import check_node_memory, node_memory
from pipelines.distributed.sync import main_then_others, on_main_process
from pipelines.errors import UserError
from pipelines.model.teacher import Teacher, read_teacher
from pipelines.model.weights import Weights, read_weights
from pipelines.run.checkpoint import newest_checkpoint
from pipelines.run.folder import RunFolder, new_run_name
from pipelines.run.pairing import check_compared
from pipelines.run_files import is_run_config
from pipelines.text import printable
from pipelines.tracking.settings import check_tracker
from pipelines.training.fitted_head import LONG

from accelerate import Accelerator, PartialState


@dataclass(frozen=True)
class Checked:
    """A run that may begin, or go on.

    config: with the `crop_mode` that auto has come to, which `crop_mode_line` says, or "". previous_config: that of the
    attempt before, None for a new run. saved: the progress of the checkpoint that it goes on from, or None.
    first_weights: the digest of the weights that the run has begun with, where it is known. teacher: on the CPU, or
    None. engine: which one decodes, for `engine_reason`.
    """

    config: Config
    crop_mode_line: str
    run: RunFolder
    previous_config: Config | None
    saved: Mapping[str, Any] | None
    dataset: Dataset
    weights: Weights
    first_weights: str | None
    teacher: Teacher | None
    engine: str
    engine_reason: str
    state: PartialState
    accelerator: Accelerator
    steps_per_epoch: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.splits["train"].classes

    def say(self, report: Callable[[], list[str]]) -> None:
        """Makes a report and prints its lines, once however many processes there are."""
        if self.state.is_main_process:  # accelerator.print would speak once on every node
            print(*report(), sep="\n", flush=True)


def check(arguments: list[str]) -> Checked | None:
    """What the command line asks for; None where nothing is left to do. Raises UserError or MachineError."""
    config, recipe = parse_config(arguments)
    state = start_processes()
    on_main_process(state, partial(check_tracker, config))
    name = config.run or on_main_process(state, lambda: new_run_name(recipe, config.runs))
    if config.overwrite and not config.run:
        line = f"overwrite: plays no part without --run: {printable(name)} is a new run"
        on_main_process(state, partial(print, line, flush=True))
    config = replace(config, run=name)  # with which its config.yaml goes on with it
    run = RunFolder(Path(config.runs) / name, writes=state.is_main_process, not_named=not_named(arguments))
    beginning = "new" if config.prepare else on_main_process(state, partial(run.beginning, config))
    if beginning == "new":
        on_main_process(state, partial(check_compared, config))
    if not config.prepare:
        on_main_process(state, partial(_say_whose_recipe, recipe_given(arguments), run, is_new=beginning == "new"))
    nothing_to_do = f"{run.folder} is finished: nothing to do (--overwrite starts it anew)"
    if beginning == "finished" and on_main_process(state, partial(run.has_the_same_data, config)):
        on_main_process(state, partial(print, nothing_to_do))
        return None
    if beginning != "new":
        config = replace(config, **on_main_process(state, partial(run.meant_before, config)))
    dataset = open_dataset(state, config, run.arrange) if beginning != "new" else open_dataset(state, config)
    if beginning == "resumed":  # what is found bad now may be mended or removed before the next start
        on_main_process(state, partial(run.note_faulty, dataset))
    on_main_process(state, partial(check_dataset, dataset, skip_bad_files=config.skip_bad_files))
    on_main_process(state, partial(check_room, [dataset.splits[name] for name in ("train", "val")], config))
    crop_mode_line = ""
    if config.crop_mode == "auto":
        train_split = dataset.splits["train"]
        crop_mode, crop_mode_line = choose_crop_mode(train_split.sizes[train_split.faults == 0])
        config = replace(config, crop_mode=crop_mode)
    saved = None if beginning == "new" else on_main_process(state, partial(newest_checkpoint, run, dataset))
    if beginning == "finished":
        on_main_process(state, partial(print, nothing_to_do))
        return None
    if saved:  # it holds all weights, and the first ones may be gone
        on_main_process(state, partial(run.check_first_weights, config, saved.get("first_weights")))
        weights = Weights(None if config.weights == "none" else {}, "of the checkpoint")
    else:
        weights = main_then_others(state, partial(read_weights, config))
    teacher = None
    if config.teacher is not None and config.epochs != 0:  # a checkpoint does not hold it
        known, classes = saved["teacher"] if saved else None, dataset.splits["train"].classes
        teacher = main_then_others(state, partial(read_teacher, config, classes, known))
        mine = teacher.digest
        if on_main_process(state, lambda: mine) != mine:
            raise UserError(
                f"teacher: {teacher.source} is not the same for all processes: give a finished run, alike on all nodes",
                on_one_process=True,
            )
    if config.prepare:
        lines = [f"weights: {weights.source}", *weights.notes, "prepared"]
        on_main_process(state, lambda: print(*dataset.report(), *lines, sep="\n"))
        return None
    if config.batchnorm == "sync" and state.device.type != "cuda":
        advice = "this run goes on on those only" if saved else "give train or frozen"
        raise UserError(f"batchnorm: sync needs NVIDIA GPUs, as PyTorch's SyncBatchNorm does: {advice}")
    kept = saved["engine"] if saved and saved["device"] == state.device.type else None
    engine, reason = agree_on_engine(config.loader, state, kept)
    if config.memory_gb and engine_module(engine).USES_MEMORY:
        limit = int(config.memory_gb * 1e9)
        check_node_memory(state, min(limit, dataset.decoded_bytes()))
        dataset = dataset.remembered(limit, partial(node_memory, state))
    trackers = None if config.tracker == "none" else config.tracker
    likely_epochs = LONG if config.epochs == "auto" else config.epochs
    steps_per_epoch = -(-len(dataset.splits["train"]) // config.batch_size)
    return Checked(
        config=config,
        crop_mode_line=crop_mode_line,
        run=run,
        previous_config=run.settings_before() if beginning == "resumed" else None,
        saved=saved,
        dataset=dataset,
        weights=weights,
        first_weights=saved.get("first_weights") if saved else weights.digest(),
        teacher=teacher,
        engine=engine,
        engine_reason=reason,
        state=state,
        accelerator=start_accelerator(config, state, trackers, steps=likely_epochs * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )


def _say_whose_recipe(recipe: Path | None, run: RunFolder, *, is_new: bool) -> None:
    """A line where a run has the config.yaml of another one, which may have been meant."""
    if recipe is None or not is_run_config(recipe) or not RunFolder(recipe.parent).status():
        return
    other = recipe.resolve().parent
    if other != run.folder.resolve():
        go_on = f"--runs {shlex.quote(str(other.parent))} --run {shlex.quote(other.name)}"
        what = "a new run" if is_new else run.folder
        print(printable(f"{what} with the settings of {other}: {go_on} goes on with that one"), flush=True)
