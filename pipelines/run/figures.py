"""The pictures of a run, without what draws them: `drawing`, which takes half a second to load, comes with the first.

Its functions are here by their names (PEP 562).
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import MachineError
from pipelines.text import printable

from PIL import Image

MAX_PHOTOS = 16  # a grid of 4 x 4
CALIBRATION_BINS = 15
SOFTWARE = "dalitune"  # in a picture's text, by which it is known (W3C PNG, 11.3.3)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("pipelines.run.drawing"), name)


def attempt(name: str, save_picture: Callable[[], None]) -> bool:
    """Whether the picture could be saved. Where not, whatever the reason, that is said: none is worth a run."""
    try:
        save_picture()
    except Exception as error:
        why = (
            str(error)
            if isinstance(error, MachineError)
            else f"{name}: not drawn ({str(error) or type(error).__name__})"
        )
        print(f"warning: {printable(why)}", file=sys.stderr, flush=True)
        return False
    return True


def is_own_picture(path: Path) -> bool:
    """Whether a file is a picture that was saved here."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False
