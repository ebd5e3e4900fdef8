"""A run's head, fitted before its training to what the whole body makes of the training photos."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import STAGED, Config, Freeze
from pipelines.data.dataset import Split
from pipelines.data.loader import eval_loader
from pipelines.distributed.sync import on_main_process
from pipelines.errors import StopAgreed, UserError
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.model.logistic_regression import PENALTIES, Fit, choose_and_fit, class_weights_of, why_too_large
from pipelines.model.network import STAGES, TransferModel
from pipelines.model.optimizer import joining_epochs
from pipelines.run import figures
from pipelines.run.folder import RunFolder
from pipelines.text import counted

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast

_VIEWS = 4  # of a photo that frozen stages see: held-out losses were no better with six (docs/recipes.md)
# For `epochs: auto`. Held-out losses of ants and bees with layer4 alone were no better after 16 (docs/recipes.md).
LONG, SHORT, LEAST_STEPS = 16, 8, 128
_RIGHT_ON_NEARLY_ALL = 0.95  # of what is held out
# Of the rates, where a head that is right on nearly all is refined, as in Kumar et al. 2022: the least held-out loss of
# what was tried on ants and bees (docs/recipes.md).
_OF_LR, _OF_LR_BODY = 0.1, 0.3


@dataclass(frozen=True)
class Start:
    """What a training starts with: up to which stage the body is frozen, as the setting `freeze` has it; whether the
    head restarts at zeros, a fitted one having been evaluated; whether it stays instead, and is refined at low rates;
    and a line on what `auto` has come to, or "".
    """

    freeze: Freeze
    head_restarts: bool = False
    refines_head: bool = False
    reason: str = ""


def why_not_fitted(config: Config, network: TransferModel, photos: int, *, has_own_head: bool) -> str:
    """Why no head is fitted to so many photos; "" where one is. has_own_head: that the weights' is for the classes."""
    if not config.may_fit_head:
        return f"head_init is {config.head_init}"
    if config.head_init == "auto" and config.weights == "none":
        return "the weights are random"
    if config.head_init == "auto" and has_own_head:
        return "the weights have one for these classes"
    return why_too_large(photos, _views(config), network.head.in_features, network.head.out_features)


def fit_head(
    network: TransferModel,
    split: Split,
    labels: np.ndarray,
    engine: str,
    accelerator: Accelerator,
    config: Config,
    store: FeatureStore | None,
    run: RunFolder,
    stop: Callable[[], bool],
) -> tuple[dict[str, Any], set[int]]:
    """Fits `network.head`, the same on all processes. The body is frozen from then on, until `freeze` says otherwise.

    split: the training's photos, seen as validation sees them, each with its mirror image where the training has
    those. labels: int [N], of all of them. The main process fits, draws head_penalty.png and says what has come out.
    stop: asked again and again. Where it says yes on any process, StopAgreed is raised on all.
    Returns a row of metrics, with the penalty and the folds' accuracies, and the photos that could not be decoded. The
    memory that decoding has taken is free again.
    """
    started = time.perf_counter()
    mirrored = _views(config) > 1
    frozen: Any = {"frozen_stages": len(STAGES), "batchnorm": "frozen", "test_flips": mirrored}
    whole = TransferModel(network.network, **frozen).eval()
    with closing(eval_loader(config, split, labels, PartialState(), engine)) as photos:
        features = FrozenFeatures(
            *(whole, photos, accelerator),
            views_per_photo=1,
            epochs=1,
            micro_batch=config.eval_batch_per_device,
            mirrored=mirrored,
            store=store,
        )
        features.prepare(0, stop)
    head = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in network.head.parameters()]

    def fit() -> dict[str, Any] | None:
        can_be_read = split.faults == 0
        can_be_read[list(photos.bad)] = False
        known = features.rows.unflatten(0, (_views(config), -1)).cpu()
        if not known.isfinite().all():
            raise UserError("head_init: the body's features of the photos are not finite: give other --weights")
        weights = class_weights_of(config.class_weights, labels, network.head.out_features)
        found = choose_and_fit(known[:, torch.from_numpy(can_be_read)], labels[can_be_read], weights, stop)
        if found is None:
            return None
        for parameter, value in zip(head, (found.head.weight, found.head.bias), strict=True):
            parameter.copy_(value)
        if found.accuracies.size:
            path, chosen = run.figures / "head_penalty.png", PENALTIES.index(found.penalty)
            tried = PENALTIES[: len(found.losses)]
            figures.attempt(
                path.name, lambda: figures.save_penalties(path, tried, found.accuracies, found.losses, chosen)
            )
        print(_report(found, int(can_be_read.sum()), _views(config), time.perf_counter() - started), flush=True)
        return _row(found)

    with torch.no_grad():
        row = on_main_process(PartialState(), fit)
        if row is None:
            raise StopAgreed
        for parameter, value in zip(network.head.parameters(), head, strict=True):
            parameter.copy_(broadcast(value))
    return row, photos.bad


def chosen_start(config: Config, row: Mapping[str, Any], why_not_fitted: str) -> Start:
    """What the settings come to. row: what `fit_head` has returned; empty where none was, as `why_not_fitted` says."""
    freeze, reason = _chosen_freeze(config, row, why_not_fitted)
    if not (config.head_init == "auto" and row and config.mode == "finetune"):
        return Start(freeze, reason=reason)
    if config.freeze == "auto" and freeze == "layer3" and "head/top1" in row:  # by its folds, not for want of them
        of_head = "lr and min_lr" if config.min_lr else "lr"
        rates = f"{_OF_LR:g} times {of_head} and {_OF_LR_BODY:g} times lr_body"
        stays = f"the head stays as it is fitted, and rates are {rates}"
        return Start(freeze, refines_head=True, reason=f"{reason}; {stays}")
    again = "the head, once it is evaluated, starts again at zeros"
    return Start(freeze, head_restarts=True, reason="; ".join(filter(None, [reason, again])))


def resolved(
    config: Config, start: Start, network: TransferModel, photos: int, saved: Mapping[str, Any] | None = None
) -> Config:
    """The settings with what `auto` has come to. network: frozen as `start` has it. photos: to train on.

    saved: the progress that a run goes on from; its numbers stay, also where another version would choose others.
    """
    for key in ("views_per_photo", "epochs"):
        if saved and key in saved and getattr(config, key) == "auto":
            config = replace(config, **{key: saved[key]})
    views = config.views_per_photo
    if views == "auto":
        # Balanced, a photo that comes several times in an epoch would come as the same view.
        has_views = config.sampler != "balanced" and config.may_repeat_views
        views = _VIEWS if network.frozen_part_is_fixed and has_views else None
    epochs = config.epochs
    if epochs == "auto":
        epochs = SHORT if network.frozen_part_is_fixed else LONG
        epochs = max(epochs, -(-LEAST_STEPS // -(-photos // config.batch_size)), math.ceil(config.warmup_epochs))
        epochs = max(epochs, (config.grow_epochs or 0) + 1)
        joining = joining_epochs(replace(config, freeze=start.freeze)).values()
        epochs = max([epochs, *(first + 1 for first in joining)])
    config = replace(config, freeze=start.freeze, views_per_photo=views, epochs=epochs)
    if not start.refines_head:
        return config
    lr_body = config.lr if config.lr_body is None else config.lr_body
    return replace(config, lr=_OF_LR * config.lr, lr_body=_OF_LR_BODY * lr_body, min_lr=_OF_LR * config.min_lr)


def _chosen_freeze(config: Config, row: Mapping[str, Any], why_not_fitted: str) -> tuple[Freeze, str]:
    if config.freeze != "auto" or config.mode == "feature_extract":
        return config.freeze, ""
    if not config.arch.startswith(STAGED):
        return "none", f"freeze: none, as the stages of {config.arch} cannot be told: all of the body is trained"
    if why_not_fitted:
        return "none", f"freeze: none, as no head is fitted ({why_not_fitted}): all of the body is trained"
    if "head/top1" not in row:
        return "layer3", "freeze: layer3, as photos are too few for folds"
    shown = f"as the fitted head is right on {row['head/top1']:.1%} of what its folds hold out"
    if row["head/top1"] >= _RIGHT_ON_NEARLY_ALL:
        return "layer3", f"freeze: layer3, {shown}: there is little that more could win"
    return "none", f"freeze: none, {shown}: all of the body is trained"


def _views(config: Config) -> int:
    return 1 + (config.flip_probability > 0)


def _of_the_folds(found: Fit) -> np.ndarray:
    return found.accuracies[PENALTIES.index(found.penalty)]


def _row(found: Fit) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": 0, "global_step": 0, "head/penalty": found.penalty}
    if found.accuracies.size:
        of_the_folds = _of_the_folds(found)
        row |= {"head/top1": float(of_the_folds.mean()), "head/top1_std": float(of_the_folds.std(ddof=1))}
        row |= {f"head/top1_fold_{number}": value for number, value in enumerate(of_the_folds.tolist(), start=1)}
    return row


def _report(found: Fit, photos: int, views: int, seconds: float) -> str:
    mirrored = " and the mirror images" if views > 1 else ""
    fitted = f"head: fitted to {counted(photos, 'photo')}{mirrored} in {seconds:.1f} s"
    if not found.accuracies.size:
        return f"{fitted}: too few for folds, penalty {found.penalty:.2g}"
    of_the_folds = _of_the_folds(found)
    each = ", ".join(f"{value:.3f}" for value in of_the_folds)
    return (
        f"{fitted}: penalty {found.penalty:.2g}, of {len(of_the_folds)} folds that are held out in turn top1 "
        f"{of_the_folds.mean():.4f} ± {of_the_folds.std(ddof=1):.4f} ({each})"
    )
