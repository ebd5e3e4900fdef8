"""What a training is made of: the network with its head, the optimizer, the loaders, what is kept of frozen stages."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cache import cache_folder
from pipelines.config import Config
from pipelines.data.dataset import map_labels
from pipelines.data.loader import Loader, eval_loader, train_loader
from pipelines.data.shrink_pass import make_copies
from pipelines.errors import UserError
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import MEMORY_LIMIT, FrozenFeatures
from pipelines.model.logistic_regression import class_weights_of
from pipelines.model.network import TrainedPart, TransferModel, build_model, frozen_stages, has_head_for
from pipelines.model.optimizer import Schedule, make_optimizer
from pipelines.tracking.tracking import describe_run
from pipelines.training.check import Checked
from pipelines.training.fitted_head import Start, chosen_start, fit_head, resolved, why_not_fitted
from pipelines.training.micro_batch import micro_batch_of
from pipelines.training.session import Session

import numpy as np
import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class InitialModel:
    """The network on its device, before anything is fitted or loaded, and the photos' labels.

    why_not_fitted: why no head is fitted, or "". has_own_head: whether the weights' own is for these classes. labels:
    int [N] by split. class_weights: float32 [C] of the photos in the loss, or None.
    """

    network: TransferModel
    why_not_fitted: str
    has_own_head: bool
    labels: Mapping[str, np.ndarray]
    class_weights: torch.Tensor | None

    @property
    def head_is_fitted(self) -> bool:
        """Whether a head is fitted, or was when the run began."""
        return not self.why_not_fitted


@dataclass(frozen=True)
class Components:
    """What a training is made of.

    resolved_config: the settings with what auto has come to, which `start` gives a reason for. network: without
    wrappers. head_row: the row of metrics of a head that was fitted just now, or {}. training, validation: the loaders;
    features, validation_features: what is kept of them. teacher: the answers that are learned beside the labels, or
    None. micro_batch: the most photos of a training's batch on a process. facts: for trackers. decisions: JSON, for the
    checkpoints.
    """

    resolved_config: Config
    start: Start
    facts: Mapping[str, Any]
    decisions: Mapping[str, Any]
    head_row: Mapping[str, Any]
    network: TransferModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    training: Loader
    features: FrozenFeatures
    validation: Loader
    validation_features: FrozenFeatures
    teacher: FrozenFeatures | None
    micro_batch: int

    def prepare(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Before a training's `epoch`: what is looked up in it is there. See `FrozenFeatures.prepare`."""
        self.features.prepare(epoch, stop)
        if self.teacher:
            self.teacher.prepare(epoch, stop)


def build_network(checked: Checked) -> InitialModel:
    """UserError where the settings leave nothing to train or to fit, or do not go with the photos."""
    config, weights, saved, splits = checked.config, checked.weights, checked.saved, checked.dataset.splits
    network = build_model(config, weights, checked.classes).to(checked.accelerator.device)
    has_own_head = has_head_for(checked.classes, weights)
    unfitted = why_not_fitted(config, network, len(splits["train"]), has_own_head=has_own_head)
    if saved:
        was_fitted = saved.get("head_is_fitted", config.head_init == "fitted" and not unfitted)
        unfitted = "" if was_fitted else unfitted or "the run has begun without one"
    if unfitted and config.epochs == 0:
        raise UserError(f"epochs: 0: no head is fitted, as {unfitted}: give --epochs, as in --epochs 10 --lr 0.001")
    labels = {split: map_labels(splits[split], checked.classes) for split in ("train", "val")}
    class_weights = None
    if config.class_weights != "none":
        class_weights = torch.from_numpy(class_weights_of(config.class_weights, labels["train"], len(checked.classes)))
        class_weights = class_weights.float().to(checked.accelerator.device)
    return InitialModel(network, unfitted, has_own_head, labels, class_weights)


def trained_together(network: TransferModel, accelerator: Accelerator, config: Config) -> Any:
    """The trained part of a network as the processes train it together, compiled where asked for.

    Called on all of them, and again where other parameters than before have a gradient: DDP would wait for it.
    """
    accelerator._models.clear()  # it would keep what DDP has made before, with room for all gradients
    model = accelerator.prepare_model(TrainedPart(network))
    if not config.compile:
        return model
    torch.compiler.reset()  # each time counts towards the most that it compiles; beyond that it would give up silently
    return torch.compile(model)


def build(checked: Checked, built: InitialModel, session: Session) -> tuple[Components, Any]:
    """What a training is made of, and the network's trained part as `trained_together` makes it.

    Makes shrunk copies of photos, where they are asked for; fits the head, where one is and no checkpoint has it;
    decides what of the body is trained, which may depend on it; makes the optimizer and the loaders. StopAgreed where a
    stop is asked for on the way.
    """
    config, accelerator, saved, state = checked.config, checked.accelerator, checked.saved, checked.state
    photos, labels, network = checked.dataset.splits, built.labels, built.network
    make_copies([photos[name] for name in ("train", "val")], config, state, session.stop_is_asked)
    store = None
    if config.cache_gb and state.is_main_process:
        store = FeatureStore(cache_folder() / "features", int(config.cache_gb * 1e9))
    head_row: dict[str, Any] = {}
    met: set[int] = set()  # photos that fitting could not decode
    if saved:
        restarted, refined = saved.get("head_restarts", False), saved.get("refines_head", False)
        start = Start(saved.get("freeze", config.freeze), restarted, refined)
    else:
        if built.head_is_fitted:
            head_row, met = fit_head(
                *(network, photos["train"], labels["train"], checked.engine, accelerator, config, store, checked.run),
                session.stop_is_asked,
            )
        start = chosen_start(config, head_row, built.why_not_fitted)
    network.freeze(frozen_stages(config, start.freeze))
    chosen = resolved(config, start, network, len(photos["train"]), saved)
    assert chosen.views_per_photo != "auto"
    schedule = Schedule(chosen, checked.steps_per_epoch)

    # The loaders are not prepared by Accelerate: the plan shards.
    optimizer = accelerator.prepare(make_optimizer(network, chosen))
    model = trained_together(network, accelerator, config)
    sizes = {name: split.sizes for name, split in photos.items()}
    teacher = checked.teacher and checked.teacher.to(accelerator.device)
    micro_batch = micro_batch_of(chosen, model, network, accelerator, checked.engine, sizes, teacher)
    training = train_loader(chosen, photos["train"], labels["train"], state, checked.engine, micro_batch)
    session.close_at_end(training.close)
    training.bad |= met
    validation = eval_loader(config, photos["val"], labels["val"], state, checked.engine)
    session.close_at_end(validation.close)
    kept: dict[str, Any] = {"micro_batch": config.eval_batch_per_device, "store": store}
    validation_features = FrozenFeatures(
        network, validation, accelerator, views_per_photo=1, epochs=1, mirrored=config.test_flips, **kept
    )
    kept["limit"] = MEMORY_LIMIT - validation_features.bytes * validation_features.are_kept
    kept |= {"views_per_photo": chosen.views_per_photo, "epochs": schedule.epochs}
    answers = FrozenFeatures(teacher, training, accelerator, name="teacher", **kept) if teacher else None
    if answers:  # before features: where those are kept nothing is decoded, and answers must be there too
        kept["limit"] -= answers.bytes
    features = FrozenFeatures(network, training, accelerator, **kept)
    facts = describe_run(accelerator, checked.dataset, network, checked.engine)
    facts |= {"epochs": schedule.config.epochs, "refines_head": start.refines_head}
    facts |= {"frozen_up_to": "layer4" if config.mode == "feature_extract" else start.freeze}
    decisions = {
        "first_weights": checked.first_weights,
        "teacher": teacher and teacher.digest,
        "settings": asdict(config),
        "engine": checked.engine,
        "micro_batch": micro_batch,
        "device": accelerator.device.type,
        "freeze": start.freeze,
        "views_per_photo": chosen.views_per_photo,
        "epochs": chosen.epochs,
        "head_is_fitted": built.head_is_fitted,
        "head_restarts": start.head_restarts,
        "refines_head": start.refines_head,
    }
    components = Components(
        *(chosen, start, facts, decisions, head_row, network, optimizer, schedule),
        *(training, features, validation, validation_features, answers, micro_batch),
    )
    return components, model
