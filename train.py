"""Fine-tunes a ResNet on a folder of photos.

    accelerate launch train.py --config configs/quickstart.yaml      # generated photos, two CPU cores, about a minute
    accelerate launch train.py                                       # ants and bees, configs/finetune.yaml
    accelerate launch train.py --data photos/ --epochs 20 --lr 0.02  # ROOT/<split>/<class>/*, or a CSV
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py --config configs/imagenet.yaml
    python train.py --help                                           # every setting

Devices and precision belong to the launcher; what is learned, to the recipe. The best weights, the figures and every
number are left in runs/<name>/.
"""

import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded, which takes seconds; later `run_script` answers it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pipelines.cache import cache_folder
from pipelines.config import Config, dump_yaml, not_named, parse_config, recipe_given
from pipelines.data.dataset import check_dataset, map_labels
from pipelines.data.engines.factory import agree_on_engine
from pipelines.data.loader import Loader, eval_loader, share_bad_photos, train_loader
from pipelines.data.open import open_dataset
from pipelines.data.preprocess import choose_crop_mode
from pipelines.distributed.exits import exit_status_of, run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.stopping import StopRequest
from pipelines.distributed.sync import main_first, main_then_others
from pipelines.errors import MachineError, PassStopped, Stopped, UserError
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import MEMORY_LIMIT, FrozenFeatures, store_report
from pipelines.model.logistic_regression import class_weights_of
from pipelines.model.network import (
    average_batchnorm_statistics,
    build_model,
    frozen_stages,
    has_head_for,
)
from pipelines.model.optimizer import learning_rates, lr_factor, make_optimizer, rate_jump, set_learning_rates
from pipelines.model.weights import Weights, read_weights
from pipelines.run import figures
from pipelines.run.checkpoint import CheckpointClock, Checkpoints, Progress, newest_checkpoint
from pipelines.run.folder import RunFolder, describe_model, new_run_name
from pipelines.text import counted, printable
from pipelines.tracking.session import Tracking, describe_run
from pipelines.tracking.settings import check_tracker
from pipelines.training.evaluation import (
    BEST_BY,
    best_scores,
    loss_and_top1,
    predict,
    validation_row,
)
from pipelines.training.fitted_head import LONG, Start, chosen_start, fit_head, resolved, why_not_fitted
from pipelines.training.micro_batch import micro_batch_of
from pipelines.training.progress import EpochTable, Interval, StepWatch
from pipelines.training.report import (
    end_report,
    head_report,
    how_it_goes_on,
    save_last_figures,
    save_train_batch,
    say_whose_recipe,
    setup_report,
    without_effect,
)
from pipelines.training.step import update

import torch


def main(arguments: list[str]) -> None:
    """One run, from the photos to best.pt. Raises UserError or MachineError."""
    started = time.perf_counter()

    # Config, data, weights, launcher: checked in this order, before a model or a run folder is made.
    config, recipe = parse_config(arguments)
    state = start_processes()
    main_first(state, partial(check_tracker, config))
    name = config.run or main_first(state, lambda: new_run_name(recipe, config.runs))
    config = replace(config, run=name)  # with which its config.yaml goes on with it
    run = RunFolder(Path(config.runs) / name, writes=state.is_main_process, not_named=not_named(arguments))
    beginning = "new" if config.prepare else main_first(state, partial(run.beginning, config))
    if not config.prepare:
        main_first(state, partial(say_whose_recipe, recipe_given(arguments), run, is_new=beginning == "new"))
    nothing_to_do = f"{run.folder} is finished: nothing to do (--overwrite starts it anew)"
    if beginning == "finished" and main_first(state, partial(run.has_the_same_data, config)):
        main_first(state, partial(print, nothing_to_do))
        return
    if beginning != "new":
        config = replace(config, **main_first(state, partial(run.meant_before, config)))
    dataset = open_dataset(state, config, run.arrange) if beginning != "new" else open_dataset(state, config)
    if beginning == "resumed":  # what is found bad now may be mended or removed before the next start
        main_first(state, partial(run.note_faulty, dataset))
    main_first(state, partial(check_dataset, dataset, skip_bad_files=config.skip_bad_files))
    classes = dataset.splits["train"].classes
    cropping = ""
    if config.crop_mode == "auto":
        train_split = dataset.splits["train"]
        crop_mode, cropping = choose_crop_mode(train_split.sizes[train_split.faults == 0])
        config = replace(config, crop_mode=crop_mode)
    saved = None if beginning == "new" else main_first(state, partial(newest_checkpoint, run, dataset))
    if beginning == "finished":
        main_first(state, partial(print, nothing_to_do))
        return
    if saved:  # it holds all weights, and the first ones may be gone
        main_first(state, partial(run.check_first_weights, config, saved.get("first_weights")))
        weights = Weights(None if config.weights == "none" else {}, "of the checkpoint")
    else:
        weights = main_then_others(state, partial(read_weights, config))
    if config.prepare:
        main_first(
            state, lambda: print(*dataset.report(), f"weights: {weights.source}", *weights.notes, "prepared", sep="\n")
        )
        return
    if config.batchnorm == "sync" and state.device.type != "cuda":
        advice = "this run goes on on those only" if saved else "give train or frozen"
        raise UserError(f"batchnorm: sync needs NVIDIA GPUs, as PyTorch's SyncBatchNorm does: {advice}")
    engine, reason = agree_on_engine(config.loader, state)
    steps_per_epoch = -(-len(dataset.splits["train"]) // config.batch_size)
    likely_epochs = LONG if config.epochs == "auto" else config.epochs
    trackers = None if config.tracker == "none" else config.tracker
    accelerator = start_accelerator(config, state, trackers, steps=likely_epochs * steps_per_epoch)
    checkpoints = Checkpoints(run, dataset, accelerator)
    first_weights = saved.get("first_weights") if saved else weights.digest()

    network = build_model(config, weights, classes).to(accelerator.device)
    has_own_head = has_head_for(classes, weights)
    unfitted = why_not_fitted(config, network, len(dataset.splits["train"]), has_own_head=has_own_head)
    if saved:
        was_fitted = saved.get("head_is_fitted", config.head_init == "fitted" and not unfitted)
        unfitted = "" if was_fitted else unfitted or "the run has begun without one"
    if unfitted and config.epochs == 0:
        raise UserError(f"epochs: 0: no head is fitted, as {unfitted}: give --epochs, as in --epochs 10 --lr 0.001")
    to_fit = not unfitted and saved is None
    photos, labels = dataset.splits, {split: map_labels(dataset.splits[split], classes) for split in ("train", "val")}
    class_weights: torch.Tensor | None = None
    if config.class_weights != "none":
        class_weights = torch.from_numpy(class_weights_of(config.class_weights, labels["train"], len(classes)))
        class_weights = class_weights.float().to(accelerator.device)

    # Where the training stands. `at.epoch` counts what is trained and evaluated, `at.global_step` the updates.
    at = Progress(saved["epoch"], saved["global_step"], saved["skipped_steps"], saved["best"]) if saved else Progress()
    watch, interval, whole_epoch = StepWatch(), Interval(accelerator.device), Interval(accelerator.device)
    stop = StopRequest(run.stop_file if state.is_main_process else None)
    clock = CheckpointClock(config.checkpoint_minutes)
    best_by = BEST_BY[config.best_by]
    tracking: Tracking | None = None
    records: Any = None  # of the last evaluation in this attempt at the run
    before = run.settings_before() if beginning == "resumed" else None
    main_first(state, partial(run.create, config, resumed=beginning == "resumed"))

    def stopped() -> Stopped:
        stop.tell()
        return Stopped(f"stopped at step {at.global_step} by {stop.why()}: --run {name} with the same settings goes on")

    to_close = ExitStack()
    to_close.callback(run.close)
    try:
        main_first(state, partial(run.keep_photos, dataset, anew=saved is None))
        main_first(state, partial(run.cut_metrics, saved["metrics_bytes"] if saved else 0))
        run.write_status("running", epoch=at.epoch, global_step=at.global_step)
        if state.is_main_process:  # accelerator.print would speak once on every node
            print(
                dump_yaml(config).rstrip(),
                *dataset.report(),
                *([cropping] if cropping else []),
                *without_effect(config),
                *([] if saved else head_report(config, unfitted, weights, has_own_head)),
                f"run: {run.folder}",
                sep="\n",
                flush=True,
            )
        stop.listen()

        # The head, where it is fitted, and then what of the body is trained, which may depend on it.
        store = _feature_store(config) if state.is_main_process else None
        fitted: dict[str, Any] = {}  # a row of metrics
        met: set[int] = set()  # photos that it could not decode
        if to_fit:
            try:
                fitted, met = fit_head(
                    *(network, photos["train"], labels["train"], engine, accelerator, config, store, run),
                    stop.is_made_anywhere,
                )
            except PassStopped:
                raise stopped() from None
        if saved:
            start = Start(saved.get("freeze", config.freeze), saved.get("head_restarts", False))
        else:
            start = chosen_start(config, fitted, unfitted)
        network.freeze(frozen_stages(config, start.freeze))
        chosen = resolved(config, start, network, len(photos["train"]), saved)
        assert chosen.views_per_photo != "auto"
        assert chosen.epochs != "auto"
        last_step = min(chosen.epochs * steps_per_epoch, config.max_steps or sys.maxsize)
        epochs = -(-last_step // steps_per_epoch)
        if at.global_step < last_step:  # max_steps may have ended an epoch early
            at.epoch = min(at.epoch, at.global_step // steps_per_epoch)
        table = EpochTable(visible=state.is_main_process, epochs=chosen.epochs, steps_per_epoch=steps_per_epoch)
        to_close.callback(table.close)

        # Optimizer and loaders. The loaders are not prepared by Accelerate: the plan shards.
        model, optimizer = accelerator.prepare(network, make_optimizer(network, config))
        model = torch.compile(model) if config.compile else model
        sizes = {name: split.sizes for name, split in photos.items()}
        micro_batch = micro_batch_of(chosen, model, network, accelerator, engine, sizes)
        training = train_loader(chosen, photos["train"], labels["train"], state, engine, micro_batch)
        to_close.callback(training.close)
        training.bad |= met
        validation = eval_loader(config, photos["val"], labels["val"], state, engine)
        to_close.callback(validation.close)
        kept: dict[str, Any] = {"micro_batch": config.eval_batch_per_device, "store": store}
        validation_features = FrozenFeatures(
            network, validation, accelerator, views_per_photo=1, epochs=1, mirrored=config.test_flips, **kept
        )
        kept["limit"] = MEMORY_LIMIT - validation_features.bytes * validation_features.are_kept
        features = FrozenFeatures(
            network, training, accelerator, views_per_photo=chosen.views_per_photo, epochs=epochs, **kept
        )
        last_rates: dict[str, float] = {}
        if saved:
            checkpoints.load(saved, network, optimizer)
            last_rates = learning_rates(optimizer)
            interval.restore(saved["interval"])
            whole_epoch.restore(saved["whole_epoch"])
            watch.not_finite_in_a_row = saved["not_finite_in_a_row"]
            for loader in (training, validation):
                loader.bad = run.still_bad(loader.split, saved["bad"][loader.split.name])
        facts = describe_run(accelerator, dataset, network, engine)
        facts["epochs"] = chosen.epochs
        facts["frozen_up_to"] = "layer4" if config.mode == "feature_extract" else start.freeze
        tracking = Tracking(accelerator, config, run, dataset, facts)
        stop.listen()  # again: a tracker may have taken the signals over
        if state.is_main_process:
            print(
                *([start.reason] if start.reason and epochs else []),
                *setup_report(chosen, weights, network, accelerator, facts),
                *features.report(),
                *store_report(features, validation_features),
                f"loader: {engine} ({reason}); {counted(steps_per_epoch, 'step')} an epoch, {last_step} in all, "
                f"{counted(micro_batch, 'photo')} at a time on a process",
                *how_it_goes_on(config, before, saved, accelerator, network, last_step, chosen.epochs),
                *(rate_jump(chosen, steps_per_epoch, at.global_step, last_rates) if at.global_step < last_step else []),
                sep="\n",
                flush=True,
            )

        def save() -> None:
            share_bad_photos(training)
            sums = {"interval": interval, "whole_epoch": whole_epoch}
            content = asdict(at) | {name: each.state(training.wait_seconds) for name, each in sums.items()}
            content |= {"bad": {"train": sorted(training.bad), "val": sorted(validation.bad)}}
            content |= {"first_weights": first_weights, "settings": asdict(config), "freeze": start.freeze}
            content |= {"views_per_photo": chosen.views_per_photo, "epochs": chosen.epochs}
            content |= {"head_is_fitted": not unfitted, "head_restarts": start.head_restarts}
            for loader in (training, validation):
                run.note_bad(loader.split, loader.bad)
            checkpoints.save(network, optimizer, content | {"not_finite_in_a_row": watch.not_finite_in_a_row})
            clock.start()
            watch.save = False

        def stop_if_asked() -> None:
            if watch.stop:
                stop.tell()
                save()
                raise stopped()

        def validate(epoch: int, summary: dict[str, Any]) -> None:
            nonlocal records
            share_bad_photos(training)
            average_batchnorm_statistics(network, accelerator.num_processes)
            try:
                records = predict(network, validation, accelerator, validation_features, stop.is_made_anywhere)
            except PassStopped:
                watch.stop = True
                stop_if_asked()
            row = {"epoch": epoch, "global_step": at.global_step, **validation_row(records, len(classes))}
            is_best = row[best_by] > at.best.get(best_by, -1.0) and math.isfinite(row["val/loss"])  # a tie: the earlier
            if is_best:
                *_, correct = loss_and_top1(records)
                at.best = row | {"correct": correct, "count": len(records)}
            row |= best_scores(at.best)  # a sweep stops by it
            run.append_metrics(row)
            tracking.log(row, records, hold=at.global_step == last_step)
            if is_best:
                run.save_best(network.network, describe_model(config, dataset, at.best))
                tracking.log_best(at.global_step)
            at.epoch = epoch
            run.write_status("running", epoch=epoch, global_step=at.global_step)
            table.end_epoch(epoch, summary | row, best=at.best.get(best_by, math.nan))
            save()

        # The loop: update, log, save, evaluate, keep the best.
        rates = set_learning_rates(optimizer, lr_factor(chosen, steps_per_epoch, max(0, at.global_step - 1)))
        if to_fit:
            run.append_metrics(fitted)
            tracking.show(run.figures / "head_penalty.png")
            tracking.log(fitted, hold=True)
        if not unfitted and not at.global_step and best_by not in at.best:
            validate(0, {})
        elif saved and at.epoch >= epochs:  # what comes after is longer than these settings
            save()
        if start.head_restarts and not at.global_step:  # after any stop, too: a checkpoint before has the fitted one
            network.reset_head()
        while at.epoch < epochs:
            epoch, start_step = at.epoch + 1, at.global_step - at.epoch * steps_per_epoch
            network.train()
            table.start_epoch(epoch, start_step)
            if start_step == 0:
                interval.start(training.wait_seconds)
                whole_epoch.start(training.wait_seconds)
            try:
                features.prepare(epoch - 1, stop.is_made_anywhere)
            except PassStopped:
                watch.stop = True
                stop_if_asked()
            steps = training.epoch(epoch - 1, start_step, images=not features.are_kept)
            for step in islice(steps, max(0, last_step - at.global_step)):
                rates = set_learning_rates(optimizer, lr_factor(chosen, steps_per_epoch, at.global_step))
                votes = (stop.is_made(), clock.has_run_out() and state.is_main_process)
                sums, batch = update(
                    *(model, features, optimizer, step, votes, training, accelerator, config, class_weights)
                )
                if at.global_step == 0 and state.is_main_process:
                    figures.attempt("train_batch.png", partial(save_train_batch, run, batch, training, classes))
                    tracking.show(run.figures / "train_batch.png")
                at.global_step += 1
                at.skipped_steps += accelerator.optimizer_step_was_skipped  # the fp16 scaler looks for its scale
                interval.add(sums)
                whole_epoch.add(sums)
                watch.add(sums, partial(_where, at.global_step, rates, batch.indices[:3].tolist(), training))
                table.step()
                epoch_ends = at.global_step % steps_per_epoch == 0 or at.global_step == last_step
                if epoch_ends or at.global_step % config.log_every == 0:
                    row = {"epoch": epoch, "global_step": at.global_step} | rates
                    row |= interval.row(training.wait_seconds)
                    if accelerator.mixed_precision == "fp16":
                        row["perf/skipped_steps"] = at.skipped_steps
                    interval.start(training.wait_seconds)
                    table.training_row(row, epoch_ends=epoch_ends)
                    run.append_metrics(row)
                    tracking.log(row, hold=epoch_ends)
                stop_if_asked()
                if watch.save and not epoch_ends:
                    save()
            watch.check()
            stop_if_asked()
            validate(epoch, rates | whole_epoch.row(training.wait_seconds))
        if best_by not in at.best:
            raise UserError("no evaluation gave a finite loss, so there are no best weights: lower --lr, in a new run")

        # What is left: curves, the best weights, and what to type next.
        if state.is_main_process:
            save_last_figures(run, records, classes, best_by)
            if not epochs:
                views = training.central(config.resize)
                save_views = partial(save_train_batch, run, views.empty_batch(), views, classes)
                figures.attempt("train_batch.png", save_views)
                tracking.show(run.figures / "train_batch.png")
            for picture in ("curves", "confusion_matrix", "per_class"):
                tracking.show(run.figures / f"{picture}.png")
            fitted = next((row for row in run.read_metrics() if "head/penalty" in row), {})
            of_the_head = {key: value for key, value in fitted.items() if key.startswith("head/")}
            tracking.finish(best_scores(at.best) | {"best/epoch": at.best["epoch"]} | of_the_head)
            run.write_status("finished", "", 0, at.epoch, at.global_step)
            seconds = time.perf_counter() - started
            print(*end_report(at.best, best_by, run, (training, validation), seconds), sep="\n")
    except BaseException as error:
        ending = exit_status_of(error)
        is_stop = ending.exit_code == Stopped.exit_code
        with suppress(MachineError):  # on a full disk; what ended the run is what is to be told
            if ending.bad_photo:
                split, position = ending.bad_photo
                run.note_bad(photos[split], [position])
            run.write_status(
                "stopped" if is_stop else "failed", ending.line, ending.exit_code, at.epoch, at.global_step
            )
        if tracking:
            tracking.stopped(ending.line) if is_stop else tracking.abandon(ending.exit_code, ending.line)
        raise
    finally:
        to_close.close()


def _feature_store(config: Config) -> FeatureStore | None:
    return FeatureStore(cache_folder() / "features", int(config.cache_gb * 1e9)) if config.cache_gb else None


def _where(global_step: int, rates: dict[str, float], indices: list[int], loader: Loader) -> str:
    photos = [printable(loader.split.path(index)) for index in indices]
    return f"step {global_step}, lr {rates['lr/head']:.3g}, photos {', '.join(photos) or '(none here)'}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
