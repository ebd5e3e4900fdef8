"""Loads torchvision without torch._dynamo, a third of all that a script loads: only optimizers and --compile need it.

To be imported before torchvision, by whoever needs that.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

_DYNAMO = ("torch._dynamo", "torch._dynamo.utils")


class _Later(ModuleType):
    """Stands for torch._dynamo while torchvision is loaded, which wants one function of it for `roi_align`."""

    __path__: list[str] = []  # noqa: RUF012 (a package's)

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _forget()
        return getattr(importlib.import_module(self.__name__), name)


def _forget() -> None:
    for name in _DYNAMO:
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


def _load() -> None:
    if not any(name in sys.modules for name in _DYNAMO):
        sys.modules.update({name: _Later(name) for name in _DYNAMO})
    try:
        importlib.import_module("torchvision")
    finally:
        _forget()


_load()
