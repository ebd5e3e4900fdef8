"""What the tests of several packages share."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipelines.distributed.exits import run_script
from pipelines.run_files import read_description
from pipelines.training.evaluation import predict
from tests.helpers.paths import FIXTURES, ROOT

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torchvision.models import resnet18

# A busy machine is no fault of the code; pytest-timeout ends what hangs.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory) -> Iterator[None]:
    """What other runs have found on this machine decides no test, and no test leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALITUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
        code = run_script(script.main, words)
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


@pytest.fixture
def dirty(tmp_path, photo_folder, monkeypatch) -> Path:
    """A folder whose three bad photos the scan has seen sound: they broke later, with size and time as before."""
    root = tmp_path / "photos"
    shutil.copytree(photo_folder({"train": {"a": 9, "b": 8}, "val": {"a": 4, "b": 3}}), root)
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    return root


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    with tarfile.open(FIXTURES / "run-of-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("runs/old")


@dataclass(frozen=True)
class TrainedRun:
    """A run of train.py, and what evaluate.py says of its validation photos: class and confidence by path."""

    folder: Path
    evaluated: Mapping[str, tuple[str, float]]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, random_weights, answers_of_evaluate) -> TrainedRun:
    """A short run on ants and bees where DALITUNE_DATA and DALITUNE_WEIGHTS name them, else on plain colours."""
    import train

    runs = tmp_path_factory.mktemp("runs")
    # An epoch, so that the head is not sharp: a grey level of difference between engines moves its answers little.
    flags = ["--config=configs/feature_extract.yaml", "--epochs=1", "--head-init=zeros", "--crop-scale-min=0.8"]
    flags += ["--views-per-photo=10", "--weight-decay=0.2", "--tracker=none", f"--runs={runs}"]
    if {"DALITUNE_DATA", "DALITUNE_WEIGHTS"} <= set(os.environ):
        flags += ["--lr=0.004", "--batch-size=8"]
    else:
        data = tmp_path_factory.mktemp("colours")
        _draw_colours(data)
        flags += [f"--data={data}", f"--weights={random_weights}", "--image-size=64", "--resize=72"]
        flags += ["--lr=0.1", "--batch-size=6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run = runs / "ants-and-bees"
        assert run_script(train.main, [*flags, f"--run={run.name}"]) == 0
    return TrainedRun(run, answers_of_evaluate(run))


@pytest.fixture(scope="session")
def answers_of_evaluate() -> Callable[..., Mapping[str, tuple[str, float]]]:
    """Class and confidence by path, of a run's validation photos."""
    import evaluate

    def answers(run: Path, *flags: str) -> dict[str, tuple[str, float]]:
        records = []

        def listen(model, loader, accelerator):
            records.append((loader, predict(model, loader, accelerator)))
            return records[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(evaluate, "predict", listen)
            assert run_script(evaluate.main, [str(run), *flags]) == 0
        (loader, rows), classes = records[0], read_description(run, "run")["classes"]
        named = [classes[label] for label in rows["predicted"]]
        paths = [loader.split.path(int(index)) for index in rows["index"]]
        return dict(zip(paths, zip(named, rows["confidence"].tolist(), strict=True), strict=True))

    return answers


def _draw_colours(root: Path) -> None:
    """Three classes of photos that any network can tell apart, of odd sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for channel, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (*rng.integers(60, 200, 2), 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 140
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.jpg", quality=90)


@pytest.fixture(scope="session")
def exported_run(trained_run) -> TrainedRun:
    """The same with its export/."""
    from deploy import export

    assert run_script(export.main, [str(trained_run.folder)]) == 0
    return trained_run
