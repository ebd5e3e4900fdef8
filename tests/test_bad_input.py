"""Bad input ends in one clear line before anything is made; what is allowed runs, and is said.

Each case goes through the real main function in this process; what is met in a run is tested with the loader.
"""

import ctypes
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import train
from pipelines.config import dump_yaml, parse_config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import choose_engine, engine_module, make_engine
from pipelines.data.engines.pillow import PillowEngine
from pipelines.data.headers import FAULTS, inspect_file
from pipelines.data.plan import EvalPlan
from pipelines.distributed.exits import run_script
from pipelines.errors import UserError
from tests.helpers.corpus import BROKEN_INSIDE, FAULTY, LITTER, ODD_NAMES, SOUND, ZOO, encoded, picture, write_zoo
from tests.helpers.engines import HERE
from tests.helpers.paths import ROOT

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.models import resnet34

SECONDS = 5  # within which a mistake is told
BASE = {
    "--image-size": "64",
    "--resize": "72",
    "--weights": "none",
    "--freeze": "none",
    "--head-init": "zeros",
    "--batchnorm": "train",
    "--tracker": "none",
    "--loader": "pillow",
    "--max-steps": "1",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    for name in ("DALITUNE_DATA", "DALITUNE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "data", {"train/ant": 2, "train/bee": 2, "val/ant": 1, "val/bee": 1})


@pytest.fixture
def run(tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """A run of train.py into tmp_path/runs: its exit code, stdout and the lines of stderr. It leaves the data alone."""

    def start(*arguments: object) -> tuple[int, str, list[str]]:
        words = [str(argument) for argument in arguments]
        given_flags = {word.partition("=")[0].replace("_", "-") for word in words}
        base = BASE | {"--data": str(photos), "--runs": str(tmp_path / "runs")}
        base_words = [f"{flag}={value}" for flag, value in base.items() if flag not in given_flags]
        before = contents(photos)
        capfd.readouterr()
        code = run_script(train.main, [*base_words, *words])
        said = capfd.readouterr()
        assert contents(photos) == before, "something was written into the folder of the data"
        return code, said.out, said.err.splitlines()

    return start


def make_photos(root: Path, counts: dict[str, int]) -> Path:
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for at in range(count):
            (root / folder / f"{at}.jpg").write_bytes(encoded(photo=picture(80, 90, seed=10 * number + at)))
    return root


def contents(root: Path) -> dict[bytes, tuple[int, int]]:
    """Everything below a folder, with byte size and time."""
    found = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (state.st_size, state.st_mtime_ns)
    return found


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """For root, to whom modes mean nothing on Linux: gives up the two capabilities that make it so, for a while."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read and write everything")
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of this thread, and of those that it starts; capget(2)
    usual, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, usual) == libc.capget(header, without) == 0
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, usual) == 0


# What is refused: name -> (how to make it so from a sound folder, returning arguments; what the line says)

Make = Callable[[Path], list[object]]
Refused = dict[str, tuple[Make, tuple[str, ...]]]


def changed(change: Callable[[Path], object], *arguments: object) -> Make:
    """The data is the folder, changed."""

    def make(root: Path) -> list[object]:
        change(root)
        return list(arguments)

    return make


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def overwrite_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def as_csv(content: str | bytes) -> Make:
    def make(root: Path) -> list[object]:
        file = root / "photos.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--data", file]

    return make


SCANNED: Refused = {
    "no such folder": (lambda root: ["--data", root / "nowhere"], ("nowhere", "there is no", "give a folder")),
    "a link to nothing": (
        lambda root: [(root / "link").symlink_to("nowhere"), "--data", root / "link"][1:],
        ("link", "there is no"),
    ),
    "empty folder": (lambda root: [(root / "new").mkdir(), "--data", root / "new"][1:], ("new: no class", "give a")),
    "a photo": (lambda root: ["--data", root / "train/ant/0.jpg"], ("0.jpg: not a CSV file", "give a folder")),
    "a pipe": (lambda root: [os.mkfifo(root / "pipe"), "--data", root / "pipe"][1:], ("pipe: neither", "give a")),
    "photos without classes": (lambda root: ["--data", root / "train" / "ant"], ("ant: no class", "takes the whole")),
    "no class in train": (
        changed(lambda root: (remove(root / "train"), (root / "train").mkdir())),
        ("train: no class",),
    ),
    "a class without a file": (
        changed(lambda root: (root / "train" / "wasp").mkdir()),
        ("train/wasp: a class without photos", "add some, or remove the folder"),
    ),
    "a class of other files": (
        changed(lambda root: ((root / "val" / "wasp").mkdir(), (root / "val" / "wasp" / "1.gif").touch())),
        ("val/wasp: a class without photos (.jpg, .jpeg,", "it holds .gif 1"),
    ),
    "a class without a readable photo": (
        changed(lambda root: overwrite_all(root / "train" / "bee")),
        ("2 files cannot be used", "train/bee/0.jpg (empty file)", "--skip-bad-files"),
    ),
    "one class": (
        changed(lambda root: (remove(root / "train" / "bee"), remove(root / "val" / "bee"))),
        ("one class only, ant", "two are needed"),
    ),
    "one class that is readable": (
        changed(lambda root: [overwrite_all(root / name / "bee") for name in ("train", "val")], "--skip-bad-files"),
        ("one class only, ant", "two are needed"),
    ),
    "a class that only val has": (
        changed(lambda root: make_photos(root, {"val/wasp": 1})),
        ("'val' has classes without a photo in 'train': wasp", "add some, or remove"),
    ),
    "no readable photo in val": (
        changed(lambda root: [overwrite_all(root / "val" / name) for name in ("ant", "bee")], "--skip-bad-files"),
        ("'val' has no photo", "add some"),
    ),
    "a link to a missing photo": (
        changed(lambda root: (root / "train" / "ant" / "x.jpg").symlink_to("gone.jpg")),
        ("train/ant/x.jpg (missing)", "--skip-bad-files"),
    ),
    "links in a circle": (
        changed(
            lambda root: (
                [(root / "train" / "ant" / name).symlink_to("../bee") for name in "xy"]
                and [(root / "train" / "bee" / name).symlink_to("../ant") for name in "xy"]
            )
        ),
        ("a link to a folder that holds it", "remove the link"),
    ),
    "a name of two lines": (
        changed(lambda root: (root / "train" / "ant" / "a\nb\x1b.jpg").touch()),
        ("train/ant/a?b?.jpg (empty file)", "--skip-bad-files"),
    ),
    "unreadable folder": (changed(lambda root: root.chmod(0)), ("data: cannot be read (Permission denied)", "give a")),
    "unreadable class": (
        changed(lambda root: (root / "train" / "bee").chmod(0)),
        ("train/bee: cannot be read (Permission denied)",),
    ),
    "unreadable folder in a class": (
        changed(lambda root: (root / "train" / "bee" / "deep").mkdir(mode=0)),
        ("train/bee/deep: cannot be read (Permission denied)",),
    ),
    "unreadable photo": (
        changed(lambda root: (root / "train" / "bee" / "1.jpg").chmod(0)),
        ("train/bee/1.jpg (cannot be read)", "--skip-bad-files"),
    ),
}
CSV: Refused = {
    "empty": (as_csv(""), ("line 1: no column", "path,label[,split]")),
    "no rows": (as_csv("path,label\n"), ("no photos in it", "give a")),
    "a column is missing": (as_csv("path,class\ntrain/ant/0.jpg,ant\n"), ("line 1: no column label",)),
    "a file is missing": (
        as_csv("path,label\ntrain/ant/0.jpg,ant\ntrain/bee/9.jpg,bee\n"),
        ("train/bee/9.jpg (missing)", "--skip-bad-files"),
    ),
    "an empty label": (as_csv("path,label\ntrain/ant/0.jpg,\n"), ("line 2: the label is empty", "fill it in")),
    "out of the root": (as_csv("path,label\n../0.jpg,ant\n"), ("line 2: ../0.jpg is not in the folder", "move it")),
    "a row twice": (
        as_csv("path,label\ntrain/ant/0.jpg,ant\n./train/ant/0.jpg,ant\n"),
        ("line 3: ./train/ant/0.jpg stands in an earlier line", "keep one"),
    ),
    "a comma in a name": (
        as_csv("path,label\ntrain/ant/0,5.jpg,ant\n"),
        ("line 2: more values than columns", "between quotes"),
    ),
    "an open quote": (
        as_csv('path,label\n"train/ant/0.jpg,ant\ntrain/bee/0.jpg,bee\n'),
        ("a quote is opened and never closed",),
    ),
    "a NUL": (as_csv("path,label\ntrain/ant/\0.jpg,ant\n"), ("photos.csv, line 2: not a CSV file", "NUL")),
    "latin-1": (as_csv(b"path,label\ntrain/caf\xe9/0.jpg,ant\n"), ("not a CSV file in UTF-8", "give a")),
}


def recipe(content: str | bytes, mode: int = 0o600) -> Make:
    def make(root: Path) -> list[object]:
        file = root / "recipe.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.replace("ROOT", str(root)).encode())
        file.chmod(mode)
        return ["--config", file]

    return make


SETTINGS: Refused = {
    "unknown flag": (lambda root: ["--learning-rat=1"], ("unknown flag '--learning-rat'", "--help")),
    "unknown key": (recipe("epoch: 3\n"), ("recipe.yaml: unknown key 'epoch'", "nearest is epochs")),
    "wrong type": (recipe("epochs: many\n"), ("recipe.yaml: epochs cannot be 'many'", "an integer >= 0")),
    "no photos in a batch": (lambda root: ["--batch-size=0"], ("--batch_size", "an integer >= 1")),
    "negative rate": (lambda root: ["--lr=-0.1"], ("--lr: lr cannot be '-0.1'", "> 0")),
    "no epochs": (lambda root: ["--epochs=-1"], ("--epochs: epochs cannot be '-1'", ">= 0")),
    "not a number": (recipe("lr: .nan\n"), ("lr cannot be '.nan'", "a finite number")),
    "too small for the model": (lambda root: ["--image-size=32"], ("--image_size", "an integer >= 64")),
    "a list": (recipe("- lr: 1\n"), ("not a recipe", "key: value")),
    "a key twice": (recipe("lr: 1\nlr: 2\n"), ("recipe.yaml", "'lr' stands twice")),
    "a flag twice": (lambda root: ["--lr=1", "--lr=2"], ("--lr: given more than once", "give it once")),
    "no recipe": (lambda root: ["--config", root / "x.yaml"], ("x.yaml: cannot be read (No such file", "name a YAML")),
    "unreadable recipe": (recipe("lr: 1\n", mode=0), ("recipe.yaml: cannot be read (Permission denied)", "name a")),
    "binary recipe": (recipe(SOUND["baseline.jpg"].content), ("recipe.yaml: not a recipe",)),
    "an object": (recipe('lr: !!python/object/apply:os.mkdir ["ROOT/mark"]\n'), ("not a recipe", "constructor")),
    "a tag that does not fit": (recipe("lr: !!float abc\n"), ("not a recipe", "constructor")),
    "a map that is none": (recipe("lr: !!map abc\n"), ("not a recipe", "mapping")),
    "a character that is none": (recipe('data: "\\UFFFFFFFF"\n'), ("recipe.yaml: not a recipe",)),
    "a NUL in a path": (recipe('runs: "a\\0b"\n'), ("recipe.yaml: runs cannot be", "text")),
}


class Opens:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def weights(write: Callable[[Path], object]) -> Make:
    def make(root: Path) -> list[object]:
        write(root / "weights.pt")
        return ["--weights", root / "weights.pt"]

    return make


def light_resnet34(path: Path) -> None:
    with torch.device("meta"):
        state = resnet34().state_dict()
    # One number stands for all of a tensor: the file is small.
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in state.items()}, path)


WEIGHTS: Refused = {
    "missing": (lambda root: ["--weights", root / "weights.pt"], ("weights.pt does not exist", "give imagenet")),
    "another architecture": (weights(light_resnet34), ("is not a resnet18", "give imagenet, none, a state_dict file")),
    "truncated": (
        weights(lambda path: (light_resnet34(path), os.truncate(path, 5000))),
        ("tensors and nothing else", "give imagenet"),
    ),
    "a folder": (weights(Path.mkdir), ("is not a run folder with best.pt and model.json", "give imagenet")),
    "empty": (weights(Path.touch), ("tensors and nothing else", "give imagenet")),
    "unreadable": (weights(lambda path: path.touch(mode=0)), ("Permission denied", "give imagenet")),
    "in an unreadable folder": (
        lambda root: [(root.parent / "locked").mkdir(mode=0), "--weights", root.parent / "locked" / "w.pt"][1:],
        ("w.pt does not exist", "give imagenet"),
    ),
    "an unreadable run": (
        lambda root: [(root.parent / "run").mkdir(mode=0), "--weights", root.parent / "run"][1:],
        ("run is not a run folder", "give imagenet"),
    ),
    "of nobody": (lambda root: ["--weights=~no-such-user/w.pt"], ("does not exist", "give imagenet")),
    "code": (
        weights(lambda path: torch.save(Opens(path.with_name("mark")), path)),
        ("it asks for posix.mkdir: code, which is never run", "give imagenet"),
    ),
    "code in a plain pickle": (
        weights(lambda path: path.write_bytes(pickle.dumps(Opens(path.with_name("mark")), protocol=2))),
        ("it asks for posix.mkdir: code, which is never run", "give imagenet"),
    ),
}
REFUSED = {
    f"{group}: {name}": case
    for group, cases in {"data": SCANNED, "csv": CSV, "settings": SETTINGS, "weights": WEIGHTS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_made(case: str, tmp_path: Path, photos: Path, run) -> None:
    make, told = REFUSED[case]
    arguments = make(photos)
    started = time.monotonic()
    with obeying_permissions():
        code, out, lines = run(*arguments)
    assert time.monotonic() - started < SECONDS
    assert_refused(code, out, lines, *told)
    assert not (tmp_path / "runs").exists(), "a run that never started leaves no folder"
    assert not (photos / "mark").exists(), "what a file asked for was run"


def assert_refused(code: int, out: str, lines: list[str], *told: str) -> None:
    assert code == 2, lines
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    for words in told:
        assert words in lines[0]


@pytest.mark.parametrize("name", ["dali", "nvimgcodec"])
def test_an_engine_that_is_not_installed(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, f"nvidia.{name}", None)  # what Python keeps of an import that must fail
    assert_refused(*run(f"--loader={name}"), "is not installed here: install nvidia-", "or use --loader pillow")
    assert choose_engine("auto", torch.device("cpu"))[0] != name
    assert not (tmp_path / "runs").exists()


def test_half_precision_where_there_is_no_gpu(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    if PartialState().device.type != "cpu":
        pytest.skip("there is a GPU here")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert_refused(*run(), "fp16 needs a GPU", "--mixed_precision bf16")
    assert not (tmp_path / "runs").exists()


# What is allowed: it runs, and what is unusual is said


def succeeded(code: int, out: str, lines: list[str]) -> str:
    assert code == 0, lines
    assert "best weights: " in out
    assert lines == []
    return out


@pytest.mark.slow
def test_odd_names_are_names(tmp_path: Path, photos: Path, run) -> None:
    for split in ("train", "val"):
        for number, name in enumerate(ODD_NAMES):
            folder = os.path.join(os.fsencode(photos), split.encode(), name)
            os.mkdir(folder)
            with open(os.path.join(folder, name[:251] + b".jpg"), "wb") as file:
                file.write(encoded(photo=picture(80, 90, seed=100 + number)))
    out = succeeded(*run())
    assert f"train: {4 + len(ODD_NAMES)} photos, {2 + len(ODD_NAMES)} classes" in out
    assert "line?break?and tab 1, " in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.slow
def test_litter_a_class_without_val_and_a_read_only_folder(photos: Path, run) -> None:
    make_photos(photos, {"train/wasp": 2})
    for folder in (photos, photos / "train", photos / "train" / "ant", photos / "val" / "bee"):
        for name in LITTER:
            (folder / name).write_bytes(b"\0")
    write_zoo(photos / "__MACOSX" / "train" / "ant", ["apple double.jpg"])
    write_zoo(photos / ".trash" / "ant", ["baseline.jpg"])
    (photos / "lost+found").mkdir()
    for folder in (photos, *photos.rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    (photos / "lost+found").chmod(0)
    try:
        with obeying_permissions():
            out = succeeded(*run())
    finally:
        for folder in (photos, *(path for path in photos.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
    assert "train: 6 photos, 3 classes: ant 2, bee 2, wasp 2" in out
    assert "val: 2 photos, 2 classes: ant 1, bee 1" in out
    assert "val has no photo of wasp" in out
    assert "train has no" not in out
    assert "MACOSX" not in out
    assert "trash" not in out
    assert "cannot be used" not in out


@pytest.mark.slow
def test_a_csv_file_of_a_spreadsheet(photos: Path, run) -> None:
    rows = ["path,label,split", *(f"{s}/{c}/0.jpg,{c},{s}" for s in ("train", "val") for c in ("ant", "bee")), ""]
    (photos / "photos.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    out = succeeded(*run("--data", photos / "photos.csv"))
    assert "train: 2 photos, 2 classes: ant 1, bee 1" in out


@pytest.mark.slow
def test_a_whole_zoo_without_its_bad_files(photos: Path, run) -> None:
    write_zoo(photos / "train" / "zoo", [*SOUND, *FAULTY])
    write_zoo(photos / "val" / "zoo", [*SOUND, *FAULTY])
    code, out, lines = run()
    assert_refused(code, out, lines, f"{2 * len(FAULTY)} files cannot be used: ", "--skip-bad-files")
    out = succeeded(*run("--skip-bad-files", "--batch-size=500"))
    assert f"train: {len(SOUND) + 4} photos, 3 classes: ant 2, bee 2, zoo {len(SOUND)}" in out
    assert f"{2 * len(FAULTY)} files cannot be used:" in out
    assert f"of {len(SOUND) + 2}, 95 % interval" in out


@pytest.mark.slow
def test_a_class_of_only_bad_files_keeps_its_number(photos: Path, run) -> None:
    for split in ("train", "val"):
        write_zoo(photos / split / "broken", ["empty.jpg"])
    out = succeeded(*run("--skip-bad-files"))
    assert "train: 4 photos, 3 classes: ant 2, bee 2, broken 0" in out
    assert "train has no photo of broken" in out


@pytest.mark.slow
@pytest.mark.parametrize("home", ["missing", "read-only"])
def test_without_a_home_folder_the_cache_is_elsewhere(
    home: str, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir(mode=0o555)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("DALITUNE_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "gone") if home == "missing" else str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with obeying_permissions():
        code, _, lines = run()
    assert code == 0, lines
    assert len(lines) == 1
    assert "cannot be written to (Permission denied): the cache is" in lines[0]
    assert list((tmp_path / "temporary").glob("dalitune-*/scan/*.safetensors"))


# Three processes for one import of PyTorch: each branches off before it has made a thread.
THREE_PROCESSES = """
import os, sys
import train
from pipelines.distributed.exits import run_script

rank = next((rank for rank in (1, 2) if os.fork() == 0), 0)
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
code = run_script(train.main, sys.argv[1:])
codes = [code] if rank else [code, *(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2))]
os._exit(max(codes) if sys.stdout.flush() is None else 1)
"""


@pytest.mark.slow
def test_more_processes_than_photos(tmp_path: Path, photos: Path) -> None:
    for photo in ("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/0.jpg"):
        (photos / photo).unlink()
    (photos / "val" / "ant").rmdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "ACCELERATE_USE_CPU": "true"}
    words = [f"{flag}={value}" for flag, value in BASE.items()]
    done = subprocess.run(
        [sys.executable, "-c", THREE_PROCESSES, *words, f"--data={photos}", f"--runs={tmp_path / 'runs'}"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | address,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "processes: 3 on cpu" in done.stdout
    assert "of 1, 95 % interval" in done.stdout


# The scan's verdict of every kind of file, and the decoder's


def test_the_scan_gives_each_specimen_its_verdict_and_is_quick(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", ZOO)
    found, seconds = {}, {}
    for name in ZOO:
        started = time.monotonic()
        found[name] = inspect_file(os.fsencode(tmp_path / "zoo" / name))[:2]
        seconds[name] = time.monotonic() - started
    assert found == {name: (specimen.fault, specimen.size) for name, specimen in ZOO.items()}
    assert max(seconds.values()) < 1, max(seconds, key=seconds.__getitem__)
    assert {specimen.fault for specimen in ZOO.values()} | {"HEIC, which needs pillow-heif"} == set(FAULTS) - {
        "missing",
        "cannot be read",
        "not a regular file",
        *("too costly to decode", "a side of more than 65,535 pixels"),  # tests/test_hostile_files.py
    }


THREADED = [name for name in HERE if issubclass(engine_module(name).ENGINE, PillowEngine)]


@pytest.mark.parametrize("name", THREADED)
def test_engines_decode_what_the_scan_passes(tmp_path: Path, name: str) -> None:
    write_zoo(tmp_path / "data" / "val" / "zoo", ZOO)
    split = load_dataset(scan_dataset(tmp_path / "data", tmp_path / "cache", 0.2)).splits["val"]
    rows = np.flatnonzero(split.faults == 0)
    own = {"micro_batch": len(rows), "threads": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    engine = make_engine(name, split, device=torch.device("cpu"), **own)
    engine.submit(EvalPlan(split.sizes, image_size=64, resize=72).views(0, rows))
    pixels = engine.fetch()
    engine.close()
    assert {Path(split.path(rows[at])).name for at in pixels.failed} == set(BROKEN_INSIDE)
    assert len(pixels.images) == len(SOUND)
    assert pixels.images.isfinite().all()
    decoded = np.delete(rows, list(pixels.failed))
    of_one_colour = pixels.images.std(dim=(2, 3)).amax(dim=1) == 0
    assert sorted(Path(split.path(row)).name for row in decoded[of_one_colour.numpy()]) == ["1 x 1.jpg", "1 x 1.png"], (
        "a picture of one colour was put in the place of a photo"
    )


# Damage of every kind

FUZZ = {"derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=6,
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for how, share, data in changes:
        at = int(share * len(content))
        if how == "cut":
            content = content[: max(at, len(content) // 4)]
        else:
            after = content[at:] if how == "insert" else content[at + len(data) :]
            content = content[:at] + (b"" if how == "delete" else data) + after
    return content


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(sorted(name for name in SOUND if "5000" not in name)), CHANGES)
@settings(max_examples=250, **FUZZ)
def test_a_damaged_photo_stops_neither_scan_nor_engine(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged(SOUND[name].content, changes))
    fault, size, signature, kind = inspect_file(os.fsencode(path))
    assert (fault, size, signature, kind) == inspect_file(os.fsencode(path))
    assert fault in FAULTS
    assert (min(size) > 0) == (not fault)
    if fault or size[0] * size[1] > 10_000_000:  # it may be decoded, which takes seconds
        return
    blob, sizes = np.frombuffer(path.name.encode(), np.uint8), np.array([size], np.int32)
    zero = np.zeros(1, np.int32)
    ends, kinds = np.array([0, len(blob)]), np.array([kind])
    split = Split("val", ("a",), zero, sizes, zero, os.fsencode(path.parent), blob, ends, zero, zero, kinds)
    failed = []
    for each in THREADED:
        own = {"micro_batch": 8, "threads": 1, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        engine = make_engine(each, split, device=torch.device("cpu"), **own)
        engine.submit(EvalPlan(sizes, image_size=64, resize=72).views(0, np.array([0])))
        pixels = engine.fetch()
        engine.close()
        assert len(pixels.images) + len(pixels.failed) == 1
        assert pixels.images.isfinite().all()
        assert all(reason and len(reason.splitlines()) == 1 for reason in pixels.failed.values())
        failed.append(pixels.failed)
    assert all(each == failed[0] for each in failed)


PIECES = [
    "lr",
    "epochs",
    "data",
    "compile",
    ": ",
    ":",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "<<",
    "? ",
    "|\n",
    "#",
]
PIECES += [
    "!!float ",
    "!!int ",
    "!!set ",
    "!!map ",
    "!!seq ",
    "!!binary ",
    "!!timestamp ",
    "!!python/name:os.system ",
    "!",
]
PIECES += [
    "'",
    '"',
    "\\",
    "\\U",
    "\\x",
    "%YAML 1.1\n",
    "---\n",
    "...\n",
    "\t",
    "  ",
    "null",
    "~",
    "1e3",
    "ü",
    "\x00",
    ",",
]


@pytest.mark.slow
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=25).map(lambda words: "".join(words).encode()), CHANGES))
@settings(max_examples=400, **FUZZ)
def test_a_damaged_recipe_gives_a_config_or_one_line(tmp_path_factory: pytest.TempPathFactory, drawn) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(drawn if isinstance(drawn, bytes) else damaged(dump_yaml(parse_config([])[0]).encode(), drawn))
    try:
        told = dump_yaml(parse_config(["--config", str(path)])[0])
    except UserError as error:
        told = str(error)
    assert told.startswith("run: ") or ("damaged.yaml" in told and len(told.splitlines()) == 1)


@given(CHANGES, st.integers(0, 2**32))
@settings(max_examples=150, **FUZZ)
def test_a_damaged_csv_file_gives_an_index_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: list, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged csv"
    folder.mkdir(exist_ok=True)
    rows = ["path,label,split", *(f'"{n}.jpg",{"ab"[n % 2]},{["train", "val"][n % 3 == 0]}' for n in range(9))]
    content = damaged("\r\n".join(rows).encode(), changes)
    for _ in range(seed % 3):  # where it hurts
        at = random.Random(seed).randrange(len(content) + 1)
        content = content[:at] + random.Random(seed).choice([b'"', b",", b"\n", b"\0", b"../", b"\xff"]) + content[at:]
    (folder / "list.csv").write_bytes(content)
    told = ""
    try:
        dataset = load_dataset(scan_dataset(folder / "list.csv", folder / "cache", 0.2))
        assert all(
            fault in (FAULTS.index("missing"), FAULTS.index("cannot be read"))
            for split in dataset.splits.values()
            for fault in split.faults
        )
        assert all(line.isprintable() for line in dataset.report())
    except UserError as error:
        told = str(error)
    assert told.isprintable()
