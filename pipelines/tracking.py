"""Tracking: Weights & Biases or TensorBoard through Accelerate, on the main process, and never in training's way."""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipelines.config import Config
from pipelines.errors import UserError

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
                accelerator.init_trackers(config.project, dict(settings))
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
            self._accelerator.end_training()
        except Exception as error:
            self._give_up(error)

    def _start_wandb(self, config: Config, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # A server that is gone would otherwise hold the end of the run for ever.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "30")
        options, why = _wandb_options(folder), "no key"
        try:
            self._accelerator.init_trackers(config.project, dict(settings), {"wandb": options})
        except Exception:
            if options["mode"] != "online":
                raise
            wandb.teardown()
            options, why = {**options, "mode": "offline"}, "the server cannot be reached"
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"tracking has stopped ({reason}); the training goes on, and metrics.jsonl has every row", file=sys.stderr
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
    """Arguments of wandb.init. One id for the run's whole life; offline without a key: nothing prompts."""
    import wandb

    id_file = folder / _WANDB_FILE
    if not id_file.exists():
        id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    return {
        "id": id_file.read_text(encoding="utf-8").strip(),
        "name": folder.name,
        "dir": os.environ.get("WANDB_DIR") or str(folder),
        "mode": mode,
        "resume": "allow",
        "settings": wandb.Settings(console="off", silent=True, init_timeout=10),
    }


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
