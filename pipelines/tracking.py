"""Tracking: Weights & Biases or TensorBoard through Accelerate, on the main process, and never in training's way."""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.errors import UserError

from accelerate import Accelerator

_WANDB_FILE = "wandb_id"


class Tracking:
    """Sends rows to the tracker that `config` names. Whatever it does, metrics.jsonl has the rows anyway."""

    def __init__(self, accelerator: Accelerator, config: Config, folder: Path, settings: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        self._alive = config.tracker != "none" and accelerator.is_main_process
        if not self._alive:
            return
        try:
            if config.tracker == "wandb":
                self._start_wandb(config, folder, settings)
            else:
                accelerator.project_configuration.logging_dir = str(folder)
                accelerator.init_trackers("tensorboard", dict(settings))
        except Exception as error:  # whatever a tracker raises, the training goes on without it
            self._give_up(error)

    def log(self, row: Mapping[str, Any]) -> None:
        """One row; its `global_step` is a value of its own, as W&B drops rows whose step is not above the last one."""
        if not self._alive:
            return
        try:
            for tracker in self._accelerator.trackers:
                tracker.log(dict(row), **({} if tracker.name == "wandb" else {"step": row["global_step"]}))
        except Exception as error:
            self._give_up(error)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes what W&B's run table shows of a whole run, and ends it."""
        if not self._alive:
            return
        try:
            for tracker in self._accelerator.trackers:
                if tracker.name == "wandb":
                    tracker.run.summary.update(dict(summary))
                tracker.finish()
        except Exception as error:
            self._give_up(error)

    def _start_wandb(self, config: Config, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # A server that is gone would otherwise hold the end of the run for ever.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "30")
        mode, why = _wandb_mode()
        options = _wandb_options(folder) | {"mode": mode}
        try:
            self._accelerator.init_trackers(config.project, dict(settings), {"wandb": options})
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()
            self._accelerator.trackers.clear()  # the one that failed would be started again
            options["mode"], why = "offline", _first_line(error)
            self._accelerator.init_trackers(config.project, dict(settings), {"wandb": options})
        run = self._accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        if options["mode"] == "offline":
            print(
                f"wandb: offline ({why}); send the run later with: wandb sync {Path(run.dir).parent}", file=sys.stderr
            )

    def _give_up(self, error: Exception) -> None:
        self._alive = False
        print(
            f"tracking has stopped ({_first_line(error)}); the training goes on, and metrics.jsonl has every row",
            file=sys.stderr,
        )


def tracker_names(config: Config) -> str | None:
    """What `Accelerator(log_with=...)` takes. UserError where the tracker is not installed."""
    if config.tracker == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError(
                "tracker: tensorboard is not installed: pip install tensorboard, or --tracker none"
            ) from None
    return None if config.tracker == "none" else config.tracker


def _wandb_options(folder: Path) -> dict[str, Any]:
    """Arguments of wandb.init but the mode. One id for the run's whole life."""
    import wandb

    id_file = folder / _WANDB_FILE
    if not id_file.exists():
        id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    return {
        "id": id_file.read_text(encoding="utf-8").strip(),
        "name": folder.name,
        "dir": os.environ.get("WANDB_DIR") or str(folder),
        "resume": "allow",
        "settings": wandb.Settings(console="off", silent=True, init_timeout=10),
    }


def _wandb_mode() -> tuple[str, str]:
    """The mode for wandb.init, and why it is not online. Without a key W&B would ask for one, so it is offline then."""
    mode = os.environ.get("WANDB_MODE") or "online"
    return ("offline", "no key") if mode == "online" and not _has_key() else (mode, f"WANDB_MODE={mode}")


def _has_key() -> bool:
    import netrc
    from urllib.parse import urlparse

    import wandb

    # What the environment says, and the files that `wandb login` writes.
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        keys = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    # W&B's own server has had another name, under which keys are kept.
    is_default = settings.base_url == wandb.Settings.model_fields["base_url"].default
    return urlparse(settings.base_url).netloc in keys or (is_default and "api.wandb.ai" in keys)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
