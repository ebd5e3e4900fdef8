"""Fine-tunes a ResNet on a folder of photos.

    accelerate launch train.py --config configs/quickstart.yaml      # generated photos, two CPU cores, about a minute
    accelerate launch train.py                                       # ants and bees, configs/finetune.yaml
    accelerate launch train.py --data photos/ --epochs 20 --lr 0.02  # ROOT/<split>/<class>/*, or a CSV
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py --data photos/
    python train.py --help                                           # every setting

Devices and precision belong to the launcher; what is learned, to the recipe. The best weights, the figures and every
number are left in runs/<name>/.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded, which takes seconds; later `run_script` answers it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pipelines import figures
from pipelines.config import Config, dump_yaml, parse_config
from pipelines.dataset import check_dataset, map_labels, printable
from pipelines.errors import MachineError, UserError
from pipelines.evaluation import FeatureCache, loss_and_top1, predict, share_bad_photos, wilson_interval
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD, Batch, Loader, Step, choose_engine, eval_loader, train_loader
from pipelines.model import TransferModel, average_batchnorm_statistics, build_model, parameter_counts, read_weights
from pipelines.optimizer import lr_factor, make_optimizer, set_learning_rates
from pipelines.processes import (
    ending_of,
    main_first,
    main_then_others,
    open_dataset,
    run_script,
    start_accelerator,
    start_processes,
)
from pipelines.progress import DivergenceWatch, EpochTable, Interval
from pipelines.runs import RunFolder, describe_model, new_run_name
from pipelines.tracking import Tracking, tracker_names

import torch
from accelerate import Accelerator
from torch.nn import functional


def main(arguments: list[str]) -> None:
    """One run, from the photos to best.pt. Raises UserError or MachineError."""
    started = time.perf_counter()

    # Config, data, weights, launcher: checked in this order, before a model or a run folder is made.
    config, recipe = parse_config(arguments)
    state = start_processes()
    dataset = open_dataset(state, config.data, config.val_fraction)
    main_first(state, partial(check_dataset, dataset, skip_bad_files=config.skip_bad_files))
    classes = dataset.splits["train"].classes
    weights = main_then_others(state, partial(read_weights, config))
    if config.batchnorm == "sync" and state.device.type != "cuda":
        raise UserError("batchnorm: sync needs NVIDIA GPUs, as PyTorch's SyncBatchNorm does: give train or frozen")
    engine, reason = choose_engine(config.loader, state.device)
    accelerator = start_accelerator(config, state, tracker_names(config))

    name = config.run or main_first(state, lambda: new_run_name(recipe))
    run = RunFolder(Path(config.runs) / name, writes=state.is_main_process)
    if main_first(state, partial(run.is_finished, config)):
        accelerator.print(f"{run.folder} is finished: nothing to do (--overwrite starts it anew)")
        return

    # Model, optimizer, loaders. The loaders are not prepared by Accelerate: the plan shards.
    network = build_model(config, weights, classes).to(accelerator.device)
    model, optimizer = accelerator.prepare(network, make_optimizer(network, config))
    model = torch.compile(model) if config.compile else model
    photos, labels = dataset.splits, {split: map_labels(dataset.splits[split], classes) for split in ("train", "val")}
    training = train_loader(config, photos["train"], labels["train"], state, engine)
    validation = eval_loader(config, photos["val"], labels["val"], state, engine)
    features = FeatureCache() if network.backbone_is_fixed else None
    steps_per_epoch = training.steps_per_epoch
    last_step = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize)

    best: dict[str, Any] = {"epoch": 0, "val/top1": -1.0}
    table = EpochTable(visible=state.is_main_process, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    watch, interval, whole_epoch = DivergenceWatch(), Interval(accelerator.device), Interval(accelerator.device)
    epoch = global_step = skipped_steps = 0
    main_first(state, partial(run.create, config))
    try:
        facts = {"world_size": accelerator.num_processes, "precision": accelerator.mixed_precision, "engine": engine}
        tracking = Tracking(accelerator, config, run.folder, {**asdict(config), **facts, "data": dataset.fingerprint})
        all_parameters, trained_parameters = parameter_counts(network)
        accelerator.print(
            dump_yaml(config).rstrip(),
            *dataset.report(),
            f"weights: {weights.source}; {all_parameters:,} parameters, {trained_parameters:,} of them trained; "
            f"BatchNorm {network.batchnorm}",
            f"processes: {facts['world_size']} on {accelerator.device.type}, precision {facts['precision']}",
            f"loader: {engine} ({reason}); {steps_per_epoch} steps an epoch, {last_step} in all",
            f"run: {run.folder}",
            sep="\n",
            flush=True,
        )
        if network.batchnorm == "train" and (accelerator.num_processes > 1 or config.max_batch_per_device):
            accelerator.print("batchnorm: train: each micro-batch of a process is normalised by itself")

        # The loop: update, log, evaluate, keep the best.
        while global_step < last_step:
            epoch += 1
            network.train()
            table.start_epoch(epoch)
            interval.start(training.wait_seconds)
            whole_epoch.start(training.wait_seconds)
            for step in training.epoch(epoch - 1):
                rates = set_learning_rates(optimizer, lr_factor(config, steps_per_epoch, global_step))
                sums, batch = update(model, network, optimizer, step, training, accelerator, config)
                if global_step == 0 and state.is_main_process:
                    _draw(partial(_save_train_batch, run, batch, classes))
                global_step += 1
                skipped_steps += accelerator.optimizer_step_was_skipped  # the fp16 scaler looks for its scale
                interval.add(sums)
                whole_epoch.add(sums)
                watch.add(sums, partial(_where, global_step, rates, batch.indices[:3].tolist(), training))
                table.step()
                epoch_ends = global_step % steps_per_epoch == 0 or global_step == last_step
                if epoch_ends or global_step % config.log_every == 0:
                    row = {"epoch": epoch, "global_step": global_step} | rates | interval.row(training.wait_seconds)
                    if accelerator.mixed_precision == "fp16":
                        row["perf/skipped_steps"] = skipped_steps
                    interval.start(training.wait_seconds)
                    table.training_row(row, epoch_ends=epoch_ends)
                    run.append_metrics(row)
                    tracking.log(row)
                if epoch_ends:
                    break
            watch.check()
            summary = rates | whole_epoch.row(training.wait_seconds)

            share_bad_photos(training)
            average_batchnorm_statistics(network, accelerator.num_processes)
            records = predict(network, validation, accelerator, features)
            loss, top1, correct = loss_and_top1(records)
            row = {"epoch": epoch, "global_step": global_step, "val/loss": loss, "val/top1": top1}
            run.append_metrics(row)
            tracking.log(row)
            if top1 > best["val/top1"] and math.isfinite(loss):  # a tie keeps the earlier
                best = row | {"correct": correct, "count": len(records)}
                run.save_best(network.network, describe_model(config, dataset, best))
            run.write_status("running", epoch=epoch, global_step=global_step)
            table.end_epoch(epoch, summary | row, best=best["val/top1"])
        if not best["epoch"]:
            raise UserError("no evaluation gave a finite loss, so there are no best weights: lower --lr")

        # What is left: curves, the best weights, and what to type next.
        if state.is_main_process:
            _draw(partial(figures.save_curves, run.figures / "curves.png", run.read_metrics(), title=name))
            tracking.finish({"best/val_top1": best["val/top1"], "best/epoch": best["epoch"]})
            run.write_status("finished", "", 0, epoch, global_step)
            low, high = wilson_interval(best["correct"], best["count"])
            known = sum(int((loader.split.faults > 0).sum()) for loader in (training, validation))
            met = len(training.bad) + len(validation.bad)
            left_out = f"left out: {known + met} photos, {known} of them found by the scan and {met} met in the run"
            print(
                f"best val top1 {best['val/top1']:.4f} at epoch {best['epoch']}: {best['correct']} of {best['count']}, "
                f"95 % interval {low:.3f} to {high:.3f}; {time.perf_counter() - started:.1f} s in all",
                *([left_out] if known + met else []),
                f"best weights: {run.best}",
                f"figures:      {run.figures}",
                f"next:         accelerate launch evaluate.py {run.folder}",
                sep="\n",
            )
    except BaseException as error:
        ending = ending_of(error)
        with suppress(MachineError):  # on a full disk; what ended the run is what is to be told
            run.write_status("failed", ending.line, ending.exit_code, epoch, global_step)
        raise
    finally:
        table.close()
        training.close()
        validation.close()
        run.close()


def update(
    model: Any,
    network: TransferModel,
    optimizer: torch.optim.Optimizer,
    step: Step,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
) -> tuple[torch.Tensor, Batch]:
    """One optimizer update from one global batch.

    Returns float32 [3] over all processes: summed loss, correct answers, photos; and this process's first micro-batch.
    The loss is the sum over this process's photos divided by the global number of places. DDP takes the mean of the
    processes' gradients, hence the factor num_processes; they are exchanged once, after the last micro-batch.
    """
    optimizer.zero_grad()
    sums = torch.zeros(3, device=accelerator.device)
    for number in range(step.rounds):
        # A process without a share takes part with a batch of no photos, as the others wait for its gradients.
        batch = next(step.batches, None) or loader.empty_batch()
        if number == 0:
            first_batch = batch
        with nullcontext() if number == step.rounds - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                logits = model(network.frozen_part(batch.images)).float()
            losses = functional.cross_entropy(
                logits, batch.labels, label_smoothing=config.label_smoothing, reduction="sum"
            )
            accelerator.backward(losses * (accelerator.num_processes / step.places))
        correct = (logits.argmax(dim=1) == batch.labels).sum()
        sums += torch.stack([losses.detach(), correct, torch.full_like(correct, len(batch))])
    if config.clip_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
    optimizer.step()
    return accelerator.reduce(sums, "sum"), first_batch


def _draw(save_picture: Callable[[], None]) -> None:
    """A picture that cannot be saved is said; the training goes on."""
    try:
        save_picture()
    except MachineError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _save_train_batch(run: RunFolder, batch: Batch, classes: tuple[str, ...]) -> None:
    titles = [classes[label] for label in batch.labels[:16].tolist()]
    images = batch.images[:16].float().cpu().numpy()
    figures.save_train_batch(run.figures / "train_batch.png", images, titles, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _where(global_step: int, rates: dict[str, float], indices: list[int], loader: Loader) -> str:
    photos = [printable(loader.split.path(index)) for index in indices]
    return f"step {global_step}, lr {rates['lr/head']:.3g}, photos {', '.join(photos) or '(none here)'}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
