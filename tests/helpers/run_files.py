"""What the files of a sound run hold: model.json, status.json and a checkpoint's progress.json."""

from typing import Any

DESCRIPTION: dict[str, Any] = {
    "format": 1,
    "arch": "resnet18",
    "classes": ["ant", "bee"],
    "image_size": 64,
    "resize": 72,
    "crop_mode": "center",
    "shrink": None,
    "transparency": "white",
    "test_flips": False,
    "temperature": 1.5,
    "calibration": {
        "photos": 4,
        "folds": 4,
        "reason": "",
        "before": {"loss": 0.5, "ece": 0.25, "bins": [[4, 0.5, 0.75]]},
        "after": {"loss": 0.25, "ece": 0.0, "bins": [[4, 0.75, 0.75]]},
    },
    "unsure": [{"wanted": 0.99, "below": 0.75, "photos": 4, "kept": 3, "right": 3}],
    "average_of": [],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "scores": {"epoch": 3, "global_step": 9, "val/loss": 0.5, "val/top1": 0.75, "correct": 3, "count": 4},
    "data": "/photos",
    "dataset_fingerprint": "abc",
    "versions": {"torch": "2.15.0"},
}
STATUS = {"state": "stopped", "reason": "", "exit_code": 75, "epoch": 1, "global_step": 5}
SUMS = {"sums": [0.0, 1.0, 2.0, None, 4.0], "seconds": 0.5, "waited": 0.1}
PROGRESS: dict[str, Any] = {
    "format": 1,
    "epoch": 1,
    "global_step": 5,
    "skipped_steps": 0,
    "best": {"epoch": 1, "val/top1": 0.5},
    "interval": SUMS,
    "whole_epoch": SUMS,
    "bad": {"train": [], "val": [3]},
    "not_finite_in_a_row": 0,
    "world_size": 1,
    "precision": "no",
    "engine": "dali",
    "device": "cuda",
    "first_weights": "0a",
    "teacher": None,
    "settings": {"lr": 0.1, "epochs": 5, "run": None, "compile": False},
    "dataset_fingerprint": "abc",
    "metrics_bytes": 10,
    "versions": {},
    "files": {"state.pt": "0a"},
}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}
