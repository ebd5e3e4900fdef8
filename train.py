"""Fine-tunes a ResNet on a folder of photos.

    accelerate launch train.py --config configs/quickstart.yaml      # generated photos, two CPU cores, about a minute
    accelerate launch train.py                                       # ants and bees, configs/finetune.yaml
    accelerate launch train.py --data photos/ --epochs 20 --lr 0.02  # ROOT/<split>/<class>/*, or a CSV
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py --config configs/imagenet.yaml
    python train.py --help                                           # every setting

Devices and precision belong to the launcher; what is learned, to the recipe. The best weights, the figures and every
number are left in runs/<name>/.
"""

import sys
import time
from functools import partial
from itertools import islice
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.distributed.exits import run_script
from pipelines.errors import UserError
from pipelines.model.average import average_of, follow
from pipelines.model.network import TransferModel, average_batchnorm_statistics
from pipelines.report import write_page
from pipelines.run import figures
from pipelines.run.checkpoint import Checkpoints, Stateful, UnreadablePhotos
from pipelines.run.folder import describe_model
from pipelines.run.predictions import write_predictions
from pipelines.training.build import Components, build, build_network, trained_together
from pipelines.training.calibration import at_temperature, calibrate, unsure_thresholds
from pipelines.training.check import Checked, check
from pipelines.training.evaluation import BEST_BY, best_scores, loss_and_top1, predict, validation_row
from pipelines.training.recorder import Recorder
from pipelines.training.report import beginning_report, end_report, training_report, where
from pipelines.training.session import Session
from pipelines.training.step import update

import numpy as np


def main(arguments: list[str]) -> None:
    """One run, from the photos to best.pt. Raises UserError, MachineError, or Stopped where a stop is asked for."""
    started = time.perf_counter()
    checked = check(arguments)
    if checked is None:
        return
    config, run, accelerator, saved = checked.config, checked.run, checked.accelerator, checked.saved
    built = build_network(checked)

    with Session(checked) as session:
        progress = session.progress
        checked.say(partial(beginning_report, checked, built))
        components, model = build(checked, built, session)
        network, schedule, optimizer = components.network, components.schedule, components.optimizer
        training, features = components.training, components.features
        average = average_of(network) if config.ema_decay else None
        recorder = Recorder(checked, components, session)

        # All that a checkpoint holds and a resume needs; another part is another entry.
        parts: dict[str, Stateful] = {
            "model": network,
            "optimizer": optimizer,
            "progress": progress,
            "sums": recorder,
            "losses": session.watch,
            "unreadable": UnreadablePhotos(run, (training, components.validation)),
            **({"scaler": accelerator.scaler} if accelerator.scaler else {}),  # of fp16
            **({"average": average} if average else {}),
        }
        checkpoints = Checkpoints(
            run, checked.dataset, accelerator, parts, components.decisions, config.keep_checkpoints
        )
        if saved:
            checkpoints.load(saved)
        if progress.global_step < schedule.total_steps:  # max_steps may have ended an epoch early
            progress.epoch = min(progress.epoch, progress.global_step // schedule.steps_per_epoch)
        recorder.start()
        session.listen()  # again: a tracker may have taken the signals over
        checked.say(partial(training_report, checked, components))
        session.save_by(checkpoints.save)
        if built.head_is_fitted and not progress.global_step and not progress.has_best:
            evaluate_and_keep_best(checked, components, session, recorder, 0)  # the fitted head
            session.save()
        elif saved and schedule.is_over(progress.epoch, progress.best["epoch"]):  # no other save is to come
            session.save()
        if components.start.head_restarts and not progress.global_step:  # a checkpoint before has the fitted one
            network.reset_head()

        while not schedule.is_over(progress.epoch, progress.best["epoch"]):
            network.train()
            if network.rest(schedule.stages_at_rest(progress.epoch)):
                model = trained_together(network, accelerator, config)
            start_step = progress.global_step - progress.epoch * schedule.steps_per_epoch
            recorder.start_epoch(start_step)
            components.prepare(progress.epoch, session.stop_is_asked)
            steps = training.epoch(progress.epoch, start_step, images=not features.are_kept)
            for step in islice(steps, max(0, schedule.total_steps - progress.global_step)):
                rates = schedule.set_rates(optimizer, progress.global_step)
                votes, targets = session.votes(), (built.class_weights, components.teacher)
                sums, batch = update(model, features, optimizer, step, votes, training, accelerator, config, *targets)
                progress.global_step += 1
                if average and config.ema_decay:
                    follow(average, network, config.ema_decay, progress.global_step)
                progress.skipped_steps += accelerator.optimizer_step_was_skipped  # the fp16 scaler looks for its scale
                session.watch_step(sums, partial(where, progress.global_step, rates, batch.indices[:3], training))
                recorder.step(sums, batch)
                session.stop_if_agreed()
                if session.save_is_agreed and not schedule.ends_epoch(progress.global_step):
                    session.save()
            session.watch_remaining_steps()
            session.stop_if_agreed()
            evaluate_and_keep_best(checked, components, session, recorder, progress.epoch + 1, average)
            session.save()
        if not progress.has_best:
            raise UserError("no evaluation gave a finite loss, so there are no best weights: lower --lr, in a new run")
        recorder.finish()
        if checked.state.is_main_process:
            figures.attempt("report.html", partial(write_page, run.folder))
        session.write_status("finished", exit_code=0)
        checked.say(partial(end_report, checked, components, progress, time.perf_counter() - started))


def evaluate_and_keep_best(
    checked: Checked,
    components: Components,
    session: Session,
    recorder: Recorder,
    epoch: int,
    average: TransferModel | None = None,
) -> None:
    """After `epoch` epochs: evaluates, saves the weights where they are the best so far, counts the epoch as done.

    average: of the weights; it is evaluated beside them.
    """
    config, run, progress = checked.config, checked.run, session.progress
    best_by = BEST_BY[config.best_by]
    means = recorder.epoch_means() if epoch else {}  # before an evaluation takes time
    row: dict[str, Any] = {"epoch": epoch, "global_step": progress.global_step}
    records, scores = _evaluated(components.network, checked, components, session)
    row |= scores
    network, better = components.network, records
    if average:
        of_average, averaged = _evaluated(average, checked, components, session)
        row |= {key.replace("val/", "ema/"): value for key, value in averaged.items()}
        if averaged[best_by] > scores[best_by]:
            network, better, scores = average, of_average, averaged
        scores = {**scores, "averaged": int(network is average)}
    _, _, correct = loss_and_top1(better)
    is_best = progress.keep_best({**row, **scores}, best_by, correct, len(better))
    row |= best_scores(progress.best)  # a sweep stops by it
    recorder.evaluation(row, records)
    if is_best and checked.state.is_main_process:
        calibration = calibrate(better)
        calibrated = at_temperature(better, calibration.temperature)
        answers = partial(write_predictions, calibrated, components.validation.split, checked.classes)
        description = describe_model(config, checked.dataset, progress.best)
        description |= {"temperature": calibration.temperature, "calibration": calibration.described()}
        run.save_best(network.network, description | {"unsure": unsure_thresholds(calibrated)}, answers)
        recorder.best_weights()
    progress.epoch = epoch
    session.write_status("running")
    recorder.end_epoch({**means, **row})


def _evaluated(
    network: TransferModel, checked: Checked, components: Components, session: Session
) -> tuple[np.ndarray, dict[str, float]]:
    """A network's records of the validation photos, and their row."""
    average_batchnorm_statistics(network, checked.accelerator.num_processes)
    # Of the average only where frozen stages are the same in both, BatchNorm's statistics included.
    is_shared = network is components.network or network.frozen_part_is_fixed
    features = components.validation_features if is_shared else None
    records = predict(network, components.validation, checked.accelerator, features, session.stop_is_asked)
    return records, validation_row(records, len(checked.classes))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
