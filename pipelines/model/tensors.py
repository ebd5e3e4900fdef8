"""Files of torch.save, read within bounds: they may come from strangers."""

import io
import os
import pickletools
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Bytes of a file that are names and shapes; EfficientNet-V2-L with AdamW and an average has a quarter of it.
MOST_NAMES = 1 << 21


def load_tensors(path: Path, most_names: int = MOST_NAMES) -> Any:
    """What a file holds, on the CPU; no code in it is run.

    most_names: bytes of its pickles, which PyTorch reads in Python, a microsecond for each. ValueError where they are
    more, or the file would take more memory than it has bytes; else whatever torch.load raises.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            entries = packed.infolist()
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its content is packed, as PyTorch does not do")
        names = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    else:
        names = _pickled(path, most_names)
    if names > most_names:
        raise ValueError("it holds more names than any network has")
    return torch.load(path, map_location="cpu", weights_only=True)


def _pickled(path: Path, most: int) -> int:
    """Bytes of the pickles at the start of a file of PyTorch before 1.6, which has five; more than `most` if cut there.

    Where they break off PyTorch's reader ends too.
    """
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(most + 1))
    with suppress(Exception):  # of broken data, of many kinds
        for _ in range(5):
            for _ in pickletools.genops(start):
                pass
    return start.tell()
