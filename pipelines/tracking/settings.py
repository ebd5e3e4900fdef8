"""What settings and environment say about the tracker: made whole, or refused, before anything is started.

A name that a tracker does not take would otherwise cost the whole run its tracking.
"""

import errno
import json
import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from pipelines.config import Config
from pipelines.errors import UserError

# By Accelerate's names: the module that is imported, what pip installs.
_PACKAGES = {
    "wandb": ("wandb", "wandb"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "aim": ("aim", "aim"),
    "clearml": ("clearml", "clearml"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dvclive": ("dvclive", "dvclive"),
    "mlflow": ("mlflow", "mlflow"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
}
_WANDB_FOLDERS = {  # by variable: what is made below it
    "WANDB_DIR": "wandb",
    "WANDB_DATA_DIR": "",
    "WANDB_CACHE_DIR": "",
    "WANDB_CONFIG_DIR": "",
    "WANDB_ARTIFACT_DIR": "",
}
_LONGEST = 128  # characters of a name that W&B takes


@dataclass(frozen=True)
class TrackerNames:
    """Where a run is filed. entity: W&B's user or team; None: the account's own."""

    project: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


def check_tracker(config: Config) -> None:
    """UserError where the tracker cannot be had, or does not take the names that settings and environment give."""
    if config.alerts and config.tracker != "wandb":
        raise UserError(f"alerts: they are W&B's: --tracker wandb sends them, {config.tracker} does not")
    if config.tracker in _PACKAGES:
        _check_installed(config.tracker)
    names = tracker_names(config)
    if config.tracker == "mlflow":
        _check_mlflow(names.project)


def tracker_names(config: Config) -> TrackerNames:
    """The names, from settings and environment. UserError where W&B does not take them.

    W&B's variables are left in the environment as W&B takes them: without blank ones, and `WANDB_PROJECT` without its
    `ENTITY/`.
    """
    return (
        wandb_names(config) if config.tracker == "wandb" else TrackerNames((config.project or "").strip() or "dalitune")
    )


def is_agents_run() -> bool:
    """Whether an agent, of a W&B sweep or of W&B Launch, has chosen the run's id and its project."""
    return bool(os.environ.get("WANDB_SWEEP_ID") or os.environ.get("WANDB_LAUNCH"))


def _check_installed(tracker: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    module, package = _PACKAGES[tracker]
    otherwise = "or --tracker none (metrics.jsonl has every row anyway)"
    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"tracker: this Accelerate does not know {tracker}: pip install -U accelerate, {otherwise}")
    if find_spec(module) is None or tracker not in map(str, get_available_trackers()):
        raise UserError(f"tracker: {tracker} is not installed: pip install {package}, {otherwise}")
    try:
        import_module(module)
    except Exception as error:  # of any kind, as of libraries that do not fit together
        told = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"tracker: {tracker} cannot be imported ({told}): pip install -U {package}, {otherwise}"
        ) from None


def _check_variables() -> None:
    """Each of W&B's variables by W&B's own rules; the value is not shown, as it may be a key."""
    import wandb
    from pydantic import ValidationError

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        value = os.environ[name].strip()
        os.environ[name] = value
        if not value:
            del os.environ[name]
        elif name in ("WANDB_RESUME_FROM", "WANDB_FORK_FROM"):
            raise UserError(f"{name}: a run goes on in its folder here, and from no other run's step: unset it")
        elif name == "WANDB_SERVICE":  # of another process's W&B, which ends with that, or has ended; ours has its own
            del os.environ[name]
        elif name not in ("WANDB_PROJECT", "WANDB_TAGS"):  # those are understood here
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except (ValidationError, wandb.errors.UsageError) as error:
                fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise UserError(f"{name}: {fault.removeprefix('Value error, ')}") from None
    if os.environ.get("WANDB_MODE") == "shared":
        raise UserError("WANDB_MODE: shared is for several writers of one run; here is one: give online or offline")
    for name, below in _WANDB_FOLDERS.items():
        if (folder := os.environ.get(name)) and not _takes_files(Path(folder) / below):
            raise UserError(f"{name}: {Path(folder) / below} is no folder that can be written to")
    if (token := os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) and not os.access(token, os.R_OK):
        raise UserError(f"WANDB_IDENTITY_TOKEN_FILE: {token} cannot be read")


def _takes_files(folder: Path) -> bool:
    """Whether it is a folder to write to, or can be made; that a disk is full is no fault of who named it."""
    absolute = folder.absolute()
    nearest = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    try:
        with TemporaryFile(dir=nearest):  # root may write where the system says so, and cannot
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _check_mlflow(project: str) -> None:
    """By the call that Accelerate begins with. A server that does not answer now is the network's affair."""
    # MLflow's own defaults would hold the training up for minutes, at its start and at each row.
    for name, value in {"MAX_RETRIES": "1", "TIMEOUT": "5"}.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    import mlflow
    import requests

    tags = os.environ.get("MLFLOW_TAGS", "{}")
    try:
        is_mapping = isinstance(json.loads(tags), dict)
    except ValueError:
        is_mapping = False
    if not is_mapping:
        raise UserError(f"MLFLOW_TAGS: it must be a mapping in JSON, and not {tags[:40]!r}")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
    try:
        mlflow.search_experiments(filter_string=f"name = '{experiment}'")
        known = mlflow.get_experiment_by_name(experiment)
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            mlflow.get_run(run_id)
    except Exception as error:
        if isinstance(error.__context__, requests.ConnectionError | requests.Timeout):
            return
        told = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"tracker: mlflow cannot file the run in {experiment!r} of {mlflow.get_tracking_uri()} ({told}): set "
            "MLFLOW_TRACKING_URI to a server or a store that this MLflow can use, or give --tracker none"
        ) from None
    if known and known.lifecycle_stage == "deleted":
        raise UserError(
            f"tracker: MLflow's experiment {experiment!r} is deleted: restore it, or give another --project"
        )


def wandb_names(config: Config) -> TrackerNames:
    """What `tracker_names` says for W&B, whatever tracker the settings name."""
    _check_variables()

    def given(key: str, variable: str) -> tuple[str, str]:
        """The value, and what to call it where it is wrong: a setting wins over a variable."""
        setting = getattr(config, key)
        return (os.environ.get(variable, ""), variable) if setting is None else (setting.strip(), key)

    written, origin = given("project", "WANDB_PROJECT")
    entity, slash, project = written.strip("/").rpartition("/")
    entity, project = entity.strip(), project.strip()
    of_environment = os.environ.get("WANDB_ENTITY")
    if slash and origin == "WANDB_PROJECT" and of_environment not in (None, entity):
        raise UserError(f"WANDB_PROJECT: {written} and WANDB_ENTITY {of_environment} contradict each other")
    _check_name(origin, project, "project")
    _check_name(origin if slash else "WANDB_ENTITY", entity or of_environment or "", "entity")
    group, group_origin = given("group", "WANDB_RUN_GROUP")
    _check_length(group_origin, group)
    _check_length("WANDB_NAME", os.environ.get("WANDB_NAME", ""))
    tags = _tags(*given("tags", "WANDB_TAGS"))

    # W&B reads its variables, too, and would stop at what is understood here.
    found = {
        "WANDB_PROJECT": (project, config.project),
        "WANDB_ENTITY": (entity or of_environment or "", config.project if entity else None),
        "WANDB_TAGS": (",".join(tags), config.tags),
    }
    for name, (value, setting) in found.items():
        if value and setting is None:
            os.environ[name] = value
        elif name == "WANDB_TAGS" or not is_agents_run():
            os.environ.pop(name, None)
    return TrackerNames(project or "dalitune", entity or of_environment, group or None, tags)


def _tags(written: str, origin: str) -> tuple[str, ...]:
    tags = tuple(dict.fromkeys(tag.strip() for tag in written.split(",") if tag.strip()))
    for tag in tags:
        if len(tag) > 64:
            raise UserError(f"{origin}: the tag {tag[:20]}... has {len(tag)} characters, and W&B takes 64")
    return tags


def _check_name(origin: str, name: str, what: str) -> None:
    """W&B puts it into an address."""
    _check_length(origin, name)
    if wrong := sorted(set(name) & set('/\\#?%:"<>' + (" " if what == "entity" else ""))):
        possible = "it is a name, or ENTITY/PROJECT" if what == "project" else "it is the name of a user or a team"
        raise UserError(f"{origin}: {what} {name!r} cannot have {' '.join(map(repr, wrong))}: {possible}")


def _check_length(origin: str, name: str) -> None:
    if len(name) > _LONGEST or not name.isprintable():
        raise UserError(f"{origin}: W&B takes one line of at most {_LONGEST} characters, and not {name[:40]!r}")
