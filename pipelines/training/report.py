"""What a training says of itself on the terminal, at its start and at its end, and the pictures that it leaves."""

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from pipelines.config import DROPS_PATHS, SCHEMA, Config, dump_yaml
from pipelines.data.engines.factory import engine_module
from pipelines.data.loader import Batch, Loader, decoding_threads
from pipelines.data.plan import grown_size
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.shrink_pass import shrink_report
from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.launch import launcher_hints
from pipelines.distributed.node_memory import memory_bytes
from pipelines.distributed.sync import local_world_size
from pipelines.errors import UserError
from pipelines.model.features import store_report
from pipelines.model.network import STAGES, parameter_counts
from pipelines.model.optimizer import Schedule, joining_epochs, learning_rates, rate_jump
from pipelines.model.weights import Weights
from pipelines.run import figures
from pipelines.run.checkpoint import Progress
from pipelines.run.folder import RunFolder, versions
from pipelines.run.predictions import predictions_of, read_predictions
from pipelines.run.resume import changed_settings
from pipelines.run_files import Description, read_description
from pipelines.text import counted, listed, printable, spelled
from pipelines.training.build import Components, InitialModel
from pipelines.training.calibration import calibration_line, calibration_panels, unsure_for, unsure_line
from pipelines.training.check import Checked
from pipelines.training.evaluation import BEST_BY, class_scores, confusion_pairs, wilson_interval

import numpy as np
import torch

_LIKELY_MEMORY_GB = 8  # of decoded photos, that a node has room for
_WANTED = 0.99  # accuracy that the end's line is for
_WAITED_SHARE, _WAITED_SECONDS = 0.05, 2.0  # of an epoch, from which on waiting for photos is worth a line


def without_effect(config: Config) -> list[str]:
    """A line on what somebody has set and what plays no part; at most one."""
    idle = {key: why for key, why in config.without_effect().items() if getattr(config, key) != SCHEMA[key]["default"]}
    return ["without effect: " + ", ".join(f"{key} ({why})" for key, why in idle.items())] if idle else []


def without_effect_by_auto(config: Config, resolved: Config) -> list[str]:
    """The same line where what `auto` has come to adds to it, as where freeze is layer3 now."""
    line = without_effect(resolved)
    return line if line != without_effect(config) else []


def beginning_report(checked: Checked, built: InitialModel) -> list[str]:
    """Before anything is computed: settings, photos, head, folder."""
    no_head = head_report(checked.config, built.why_not_fitted, checked.weights, built.has_own_head)
    splits = [checked.dataset.splits[name] for name in ("train", "val")]
    return [
        dump_yaml(checked.config).rstrip(),
        *checked.dataset.report(),
        *([checked.crop_mode_line] if checked.crop_mode_line else []),
        *(shrink_report(splits, checked.config) if checked.config.shrink or not checked.saved else []),
        *without_effect(checked.config),
        *([] if checked.saved else no_head),
        f"run: {checked.run.folder}",
    ]


def training_report(checked: Checked, components: Components) -> list[str]:
    """Before the first update: what is trained, on what, from where on. The optimizer's rates are those of the last
    update in a checkpoint."""
    schedule, saved = components.schedule, checked.saved
    jump = []
    if saved and saved["global_step"] < schedule.total_steps:
        rates = learning_rates(components.optimizer)
        jump = rate_jump(components.resolved_config, schedule.steps_per_epoch, saved["global_step"], rates)
    return [
        *([components.start.reason] if components.start.reason and schedule.epochs else []),
        *(without_effect_by_auto(checked.config, components.resolved_config) if schedule.epochs else []),
        *unfreezing_report(schedule),
        *_schedule_report(components.resolved_config),
        *_setup_report(checked, components),
        *components.features.report(),
        *store_report(components.features, components.validation_features),
        *teacher_report(checked, components),
        f"loader: {checked.engine} ({checked.engine_reason}); {counted(schedule.steps_per_epoch, 'step')} an epoch, "
        f"{schedule.total_steps} in all, {counted(components.micro_batch, 'photo')} at a time on a process",
        *memory_report(checked, components),
        *resume_report(checked, components),
        *jump,
    ]


def teacher_report(checked: Checked, components: Components) -> list[str]:
    """Whose answers are learned, and whether they are kept; none without a teacher."""
    teacher, answers, config = checked.teacher, components.teacher, components.resolved_config
    if not teacher or not answers or not components.schedule.epochs:
        return []
    weight, parameters = config.teacher_weight, parameter_counts(teacher)[0]
    lines = [
        f"teacher: {teacher.source}, a {teacher.arch} of {parameters:,} parameters, has {weight:g} of the loss, at "
        f"temperature {config.teacher_temperature:g}; train/loss is of both"
    ]
    if teacher.dataset_fingerprint != checked.dataset.fingerprint:
        known = "it was trained on other photos, or another split of them"
        if not teacher.dataset_fingerprint:
            known = "it is not known which photos it was trained on"
        lines.append(f"teacher: {known}: where it has seen some that validate here, their accuracy promises too much")
    return [*lines, *answers.report(), *store_report(answers)]


def _schedule_report(config: Config) -> list[str]:
    """Where a schedule of steps has its first one behind the end, as with fewer `--epochs` than its recipe has."""
    assert config.epochs != "auto"
    if config.schedule != "step" or not 0 < config.epochs <= config.step_epochs:
        return []
    epochs = counted(config.epochs, "epoch")
    return [f"schedule: step lowers no rate within {epochs}, as its first step comes after {config.step_epochs}"]


def unfreezing_report(schedule: Schedule) -> list[str]:
    """From which epoch on what of the body is trained, where it is not from the first; at most one line."""
    by_epoch: dict[int, list[str]] = {}
    for stage, first in joining_epochs(schedule.config).items():
        by_epoch.setdefault(first, []).append(stage)
    alone = min([schedule.epochs, *by_epoch])
    if not alone or not by_epoch:
        return []
    told = [f"epoch{f's 1 to {alone} train' if alone > 1 else ' 1 trains'} the head alone"]
    for first, stages in by_epoch.items():
        what = "all of the body" if len(stages) == len(STAGES) else listed(stages)
        joins = "joins" if len(stages) in (1, len(STAGES)) else "join"
        told.append(f"{what} {joins} {f'in {first + 1}' if first < schedule.epochs else 'after the end'}")
    return [f"freeze_epochs: {', '.join(told)}"]


def memory_report(checked: Checked, components: Components) -> list[str]:
    """How many decoded photos stay in memory, where some are to; at most one line."""
    if not checked.config.memory_gb:
        return []
    splits = [checked.dataset.splits[name] for name in ("train", "val")]
    memories = [split.memory for split in splits if split.memory]
    if not memories:
        return [f"memory_gb: plays no part, as {checked.engine} keeps no photos"]
    if components.features.are_kept and components.validation_features.are_kept:
        return ["memory_gb: plays nearly no part, as what frozen stages make of each view is kept"]
    fit, total = sum(int(each.fits.sum()) for each in memories), counted(sum(map(len, splits)), "photo")
    return [f"memory: {fit} of {total} stay decoded, {sum(each.bytes for each in memories) / 1e9:.2g} GB on a node"]


def _setup_report(checked: Checked, components: Components) -> list[str]:
    config, network, accelerator = components.resolved_config, components.network, checked.accelerator
    facts, processes = components.facts, accelerator.num_processes
    lines = [
        f"weights: {checked.weights.source}; {facts['parameters']:,} parameters, "
        f"{facts['trained_parameters']:,} of them trained; BatchNorm {network.batchnorm}",
        *checked.weights.notes,
        f"processes: {processes} on {accelerator.device.type}, precision {facts['precision']}",
        *launcher_hints(accelerator, config, facts["train_photos"]),
    ]
    if network.dropout_is_left_out:
        planned = "--dropout, before the head, is planned"
        if config.arch.startswith(DROPS_PATHS):
            planned = "--dropout, before the head, and --drop_path, of its blocks, are planned"
        lines.append(f"dropout: what {config.arch} has of it is left out; {planned}")
    if config.first_image_size is not None and config.grow_epochs is not None:
        lines.append(growth_line(config.first_image_size, config.image_size, config.grow_epochs))
    if config.mixes_photos and config.epochs:
        lines.append("train top1: photos are mixed, and an answer counts by the share that its class has in one")
    if network.batchnorm == "train" and (processes > 1 or config.max_batch_per_device):
        lines.append("batchnorm: train: each micro-batch of a process is normalised by itself")
    if network.batchnorm == "sync" and config.max_batch_per_device:
        lines.append("batchnorm: sync: micro-batches are normalised together with the other processes' only")
    return lines


def growth_line(first: int, last: int, epochs: int) -> str:
    """On the size of a training's square and the epochs, counted from 1, from which on it has it, as `grown_size`."""
    first_epochs = {grown_size(first, last, epochs, epoch): epoch + 1 for epoch in reversed(range(epochs + 1))}
    return f"image_size: {', '.join(f'{size} from epoch {epoch}' for size, epoch in sorted(first_epochs.items()))} on"


def input_report(checked: Checked, components: Components, row: Mapping[str, float]) -> list[str]:
    """On an epoch that has waited for photos: how much, and what may help; at most one line. row: the epoch's means."""
    config, loader = checked.config, components.training
    waited, rate = row.get("perf/data_wait", 0.0), row.get("perf/images_per_s", 0.0)
    if waited < _WAITED_SHARE or waited * loader.plan.length < _WAITED_SECONDS * rate:
        return []
    sound = loader.split.sizes[loader.split.faults == 0]
    photos_gb = math.ceil(checked.dataset.decoded_bytes() / 1e7) / 100
    cores, features = cpu_cores() // local_world_size(), components.features
    has_room = photos_gb < min(_LIKELY_MEMORY_GB, memory_bytes() / 2e9)
    keeps_photos = engine_module(checked.engine).USES_MEMORY and not features.are_kept and has_room
    few_views = components.resolved_config.views_per_photo is None and components.network.frozen_part_is_fixed
    few_views &= config.may_repeat_views
    helpful = {
        f"--loader_threads {cores}": decoding_threads(config) < cores,
        "--loader auto": config.loader != "auto",
        f"--memory_gb {photos_gb:g}": keeps_photos and not config.memory_gb,
        f"--shrink {2 * config.resize}": not config.shrink and np.median(sound.min(axis=1)) > 2 * config.resize,
        "--views_per_photo 4": few_views,
    }
    advice = ", ".join(flag for flag, helps in helpful.items() if helps)
    return [
        f"input: {waited:.0%} of the epoch was spent waiting for photos: {rate:.0f} a second, "
        f"{rate / max(0.01, 1 - waited):.0f} without it{f'; what may help: {advice}' if advice else ''}; what more "
        "could be won, benchmarks/headroom.py measures"
    ]


def head_report(config: Config, unfitted: str, weights: Weights, has_own_head: bool) -> list[str]:
    """unfitted: why no head is fitted. has_own_head: whether the weights' own head is for these classes."""
    if not config.may_fit_head:
        own = f"head: the one of {weights.source}, for the same classes: head_init {config.head_init} plays no part"
        return [own] if has_own_head else []
    if unfitted:
        return [f"head: not fitted, as {unfitted}: it is {'the one of the weights' if has_own_head else 'zeros'}"]
    return [f"head: fitted anew, in place of the one of {weights.source}"] if has_own_head else []


def end_report(checked: Checked, components: Components, progress: Progress, seconds: float) -> list[str]:
    """seconds: of the whole attempt."""
    best, run, schedule = progress.best, checked.run, components.schedule
    loaders = (components.training, components.validation)
    low, high = wilson_interval(best["correct"], best["count"])
    known = sum(int((loader.split.faults > 0).sum()) for loader in loaders)
    met = sum(len(loader.bad) for loader in loaders)
    accuracies = {key.removeprefix("val/"): f"{best[key]:.4f}" for key in BEST_BY.values() if key in best}
    chosen = BEST_BY[checked.config.best_by].removeprefix("val/")
    others = "".join(f" ({name} {value})" for name, value in accuracies.items() if name != chosen)
    averaged = ", of the averaged weights" if best.get("averaged") else ""
    lines = [
        f"best val {chosen} {accuracies[chosen]}{others} at epoch {best['epoch']}{averaged}: {best['correct']} of "
        f"{best['count']}, 95 % interval {low:.3f} to {high:.3f}; {seconds:.1f} s in all"
    ]
    if progress.epoch < schedule.epochs:
        ended = f"ended after epoch {progress.epoch} of {schedule.epochs}"
        lines.append(f"patience {schedule.config.patience}: {ended}, as none was better since epoch {best['epoch']}")
    if known + met:
        lines.append(
            f"left out: {counted(known + met, 'photo')}, {known} of them found by the scan and {met} met in the run"
        )
    if (description := _description(run)) and (found := description["calibration"]):
        lines.append(calibration_line(found, description["temperature"]))
        if (wanted := unsure_for(description, _WANTED)) and wanted["below"]:
            lines.append(f"{unsure_line(wanted)}: predict.py --unsure-for {_WANTED:g}")
    return [
        *lines,
        f"best weights: {run.best}",
        f"figures:      {run.figures}",
        f"page:         {run.folder / 'report.html'}",
        f"next:         accelerate launch evaluate.py {run.folder}",
    ]


def _description(run: RunFolder) -> Description | None:
    """Of the best weights; None where somebody has removed or damaged it: no picture or line ends a training."""
    with suppress(UserError):
        return read_description(run.folder, "run")
    return None


def resume_report(checked: Checked, components: Components) -> list[str]:
    """For a run that is there already: from where, and what may make a difference."""
    config, before, saved, accelerator = checked.config, checked.previous_config, checked.saved, checked.accelerator
    batchnorm, epochs = components.network.batchnorm, components.resolved_config.epochs
    if before is None:
        return []
    settings = changed_settings(before, config)
    changes = [f"settings changed: {settings}"] if settings else []
    if saved is None:
        return ["resumed: there is no checkpoint yet, so it begins at step 0", *changes]
    lines = [f"resumed at step {saved['global_step']}, from {saved['checkpoint']}", *changes]
    by_itself = f"BatchNorm ({batchnorm}) normalises each by itself, so that results differ by more than rounding"
    if saved["world_size"] != accelerator.num_processes:
        is_split = batchnorm == "train" or (batchnorm == "sync" and config.max_batch_per_device)
        what = f"in other shares, and {by_itself}" if is_split else "sums in another order"
        lines.append(f"the checkpoint is of {counted(saved['world_size'], 'process')}: the same photos, {what}")
    elif batchnorm in ("train", "sync") and (
        saved["micro_batch"] != components.micro_batch
        if "micro_batch" in saved
        else config.max_batch_per_device != before.max_batch_per_device  # of an older version
    ):
        lines.append(f"max_batch_per_device: other micro-batches, and {by_itself}")
    if (precision := saved.get("precision")) not in (None, accelerator.mixed_precision):
        lines.append(f"the checkpoint is of precision {precision}: the same photos, rounded otherwise")
    total_steps = components.schedule.total_steps
    if saved["global_step"] >= total_steps:
        limit = f"epochs {epochs}" if config.max_steps != total_steps else f"max_steps {total_steps}"
        lines.append(f"nothing is left to train: with {limit} the run ends at step {total_steps}")
    now = versions()
    if changed := [name for name, then in saved["versions"].items() if now.get(name) != then]:
        lines.append(f"the checkpoint is of other versions of {', '.join(changed)}: the last bits may differ")
    return lines


def where(global_step: int, rates: Mapping[str, float], indices: torch.Tensor, loader: Loader) -> str:
    """Words on a step, for a message. indices: of some of its photos on this process."""
    photos = [printable(loader.split.path(index)) for index in indices.tolist()]
    return f"step {global_step}, lr {rates['lr/head']:.3g}, photos {', '.join(photos) or '(none here)'}"


def save_train_batch(run: RunFolder, batch: Batch, training: Loader, classes: tuple[str, ...]) -> None:
    if not len(batch.images):  # its features are kept; what they are of is worth a look
        batch = next(next(training.epoch(0)).batches)
    images, path = batch.images[: figures.MAX_PHOTOS].float().cpu().numpy(), run.figures / "train_batch.png"
    titles = batch.names(classes)[: figures.MAX_PHOTOS]
    figures.save_train_batch(path, images, titles, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def save_last_figures(run: RunFolder, classes: tuple[str, ...], best_by: str, *, mixes_photos: bool) -> None:
    """The curves, how far the best weights' confidences can be relied on, and what they answer to each class."""
    paths = {name: run.figures / f"{name}.png" for name in ("curves", "calibration", "confusion_matrix", "per_class")}
    title = run.folder.name
    draw = figures.attempt
    of_training = "train, mixed" if mixes_photos else "train"
    draw(
        "curves.png",
        lambda: figures.save_curves(
            paths["curves"], run.read_metrics(), title=title, best_by=best_by, of_training=of_training
        ),
    )
    if (description := _description(run)) and (found := description["calibration"]):
        panels = calibration_panels(found["before"], found["after"], description["temperature"])
        draw("calibration.png", lambda: figures.save_calibration(paths["calibration"], panels))
    # From the file, which is there in whatever attempt at the run the weights were the best.
    with suppress(UserError):
        best = read_predictions(predictions_of(run.folder))
        positions = {spelled(name): position for position, name in enumerate(classes)}
        known = np.array([positions.get(name, -1) for name in best.classes], np.int64)
        predicted, labels = known[best.answers[:, 0]], known[best.labels]
        if (np.minimum(predicted, labels) < 0).any():
            return  # somebody has put another file there
        pairs = confusion_pairs(predicted, labels, len(classes))
        per_class = class_scores(predicted, labels, len(classes))
        draw("confusion_matrix.png", partial(figures.save_confusion_matrix, paths["confusion_matrix"], pairs, classes))
        draw("per_class.png", partial(figures.save_per_class, paths["per_class"], per_class, classes))
