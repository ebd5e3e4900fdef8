"""What the tests of several rooms share."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from pipelines import processes

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Callable[[Mapping[str, Mapping[str, int]]], Path]:
    """Makes a folder of small noisy JPEGs: {split: {class: number of photos}} -> ROOT/<split>/<class>/00.jpg ..."""

    def make(counts: Mapping[str, Mapping[str, int]]) -> Path:
        root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
        for split, classes in counts.items():
            for name, count in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    height, width = rng.integers(70, 120, 2)
                    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(noise).save(folder / f"{number:02}.jpg", quality=90)
        return root

    return make


@pytest.fixture(scope="session")
def photos(photo_folder) -> Path:
    return photo_folder({"train": {"ant": 8, "bee": 6, "wasp": 5}, "val": {"ant": 4, "bee": 3, "wasp": 4}})


@pytest.fixture
def run_here(capsys) -> Callable[..., subprocess.CompletedProcess]:
    """A script's main function in this process, which saves ten seconds of imports."""

    def run(script: ModuleType, *arguments: object) -> subprocess.CompletedProcess:
        words = [str(argument) for argument in arguments]
        code = processes.run_script(script.main, words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """A state_dict to start from, so that BatchNorm may be frozen."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18().state_dict(), file)
    return file


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of a given size, which only root may."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("needs root and the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
