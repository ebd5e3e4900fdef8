"""Whether a run may go on with the settings that it is given now: what decides the result must be as it was."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from pipelines.config import SCHEMA, Config

# What becomes of a run that goes on with another value of a setting.
REPORTED = {  # whoever changes it wants what it changes: the length of the run, its memory and speed, what is left out
    *("epochs", "max_steps", "patience", "max_batch_per_device", "eval_batch_per_device", "log_every"),
    *("skip_bad_files", "loader", "deterministic", "channels_last", "compile"),
}
# The photos themselves decide, and the first weights' digest.
CHECKED_ELSEWHERE = {"data", "val_fraction", "class_names", "weights"}
IGNORED = {
    *("run", "runs", "overwrite", "prepare", "checkpoint_minutes", "keep_checkpoints"),
    *("loader_threads", "memory_gb", "prefetch", "cache_gb"),
    *("tracker", "project", "tags", "group", "alerts", "log_model", "compare_to"),
}
# Any other decides the result: the training, or which of its weights are the best.
REFUSED = SCHEMA.keys() - REPORTED - CHECKED_ELSEWHERE - IGNORED


def other_result(before: Config, now: Config) -> list[str]:
    """The settings by which a run that goes on would get another result."""
    old, new = _that_decide(before), _that_decide(now)
    return [key for key in old if old[key] != new[key] and getattr(before, key) != getattr(now, key)]


def changed_settings(before: Config, now: Config) -> str:
    """The settings that are others than before and worth a word, with both values; "" where none is."""
    old, new = asdict(before), asdict(now)
    keys = [key for key in old if key in REPORTED | REFUSED and old[key] != new[key]]
    return ", ".join(f"{key} {spelled(new[key])} (was {spelled(old[key])})" for key in keys)


def ask_for_the_same_photos(before: Config, now: Config) -> bool:
    """Whether both name the same photos, so far as the settings tell."""
    one, other = ((_absolute(each.data), each.val_fraction, each.class_names) for each in (before, now))
    return one == other


def is_longer(before: Config, now: Config, epoch: int, global_step: int, not_named: Collection[str] = ()) -> bool:
    """Whether a run that was finished after `epoch` epochs is to go on: for more of them, or more of its steps.

    not_named: settings that nobody has given a value; a run that `patience` has ended does not go on by its absence.
    """
    if now.max_steps is not None and now.max_steps <= global_step:
        return False
    was_cut = before.max_steps is not None and before.max_steps <= global_step
    if before.patience is not None and before.epochs != epoch:  # it may have ended the run
        was_cut |= "patience" not in not_named and (now.patience is None or now.patience > before.patience)
    if now.epochs == "auto":  # as before: it is the same number for the same photos
        return was_cut
    return was_cut or now.epochs > (epoch if before.epochs == "auto" else before.epochs)


def spelled(value: Any) -> str:
    """A setting's value as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _that_decide(config: Config) -> dict[str, Any]:
    """The settings that decide the result, as they work: None for one that does nothing where it stands."""
    values = {key: value for key, value in asdict(config).items() if key in REFUSED}
    is_random = config.weights == "none"
    values["weights"] = "none" if is_random else "pretrained"
    values["eval_size"] = config.evaluation_size
    values["teacher"] = config.teacher is not None  # which one, by its digest: it may have moved
    if config.batchnorm == "auto":
        values["batchnorm"] = "train" if is_random else "frozen"
    # A run of no epochs may go on for some, and then these count.
    idle = {key for key, cause in config.without_effect().items() if cause != "epochs: 0"}
    if config.lr_body == config.lr:
        idle.add("lr_body")
    return {key: None if key in idle else value for key, value in values.items()}


def _absolute(data: str | None) -> str | None:
    return data if data in (None, "shapes") else os.path.realpath(os.path.expanduser(data))
