"""A run goes on with its photos in their positions: some may have gone or been mended, none may be new or another."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import train
from pipelines.config import Config
from pipelines.data.dataset import Dataset, check_dataset, load_dataset, scan_dataset
from pipelines.data.known_photos import in_known_positions
from pipelines.errors import UserError
from pipelines.run.folder import RunFolder
from pipelines.run_files import checkpoint_folders
from tests.helpers.corpus import break_openly, break_unseen
from tests.helpers.runs import FROZEN, one_error_line, same_bits, succeeded

import numpy as np
import pytest


@pytest.fixture
def root(photo_folder, tmp_path) -> Path:
    photos = photo_folder({"train": {"ant": 6, "bee": 5}, "val": {"ant": 3, "bee": 3}, "test": {"ant": 2}})
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "r")
    run.create(Config())
    (run.folder / "checkpoints" / "epoch-0001-step-00000005").mkdir(parents=True)
    return run


def scanned(data: Path, **options: object) -> Path:
    return scan_dataset(data, data.parent / "cache", **{"val_fraction": 0.2} | options)


def begun(run: RunFolder, data: Path, **options: object) -> Dataset:
    dataset = load_dataset(scanned(data, **options))
    run.keep_photos(dataset, anew=True)
    return dataset


def resumed(run: RunFolder, data: Path, **options: object) -> Dataset:
    return load_dataset(run.arrange(scanned(data, **options)))


def same_size(photo: Path) -> bytes:
    """The bytes of another photo, as long as those of this one."""
    content = photo.read_bytes()
    return content[:-9] + bytes(byte ^ 1 for byte in content[-9:-2]) + content[-2:]


def names(dataset: Dataset, split: str = "train") -> list[str]:
    photos = dataset.splits[split]
    return [Path(photos.path(position)).relative_to(dataset.root).as_posix() for position in range(len(photos))]


def test_without_a_change_nothing_is_arranged(run, root):
    begun(run, root)
    assert run.arrange(scanned(root)) == scanned(root)
    moved = root.rename(root.parent / "moved")
    assert run.arrange(scanned(moved)) == scanned(moved)


def test_a_removed_photo_leaves_its_position_empty(run, root, capsys):
    before = begun(run, root)
    (root / "train" / "ant" / "02.jpg").unlink()
    (root / "val" / "bee" / "00.jpg").unlink()
    after = resumed(run, root)
    assert capsys.readouterr().out == (
        "2 photos gone since the run began (train/ant/02.jpg, val/bee/00.jpg): their places stay empty\n"
    )
    assert after.fingerprint == before.fingerprint
    for split, empty in (("train", 2), ("val", 3)):
        assert names(after, split) == names(before, split)
        assert after.gone[split] == [empty] == np.flatnonzero(after.splits[split].faults).tolist()
        kept = np.arange(len(before.splits[split])) != empty
        for column in ("labels", "sizes"):
            now, then = getattr(after.splits[split], column), getattr(before.splits[split], column)
            assert np.array_equal(now[kept], then[kept])
        assert after.splits[split].sizes[empty].tolist() == [0, 0]
    assert names(after, "test") == ["test/ant/00.jpg", "test/ant/01.jpg"]
    check_dataset(after, skip_bad_files=False)  # it is no bad file


def test_the_splits_stay_where_val_was_taken_from_train(run, root, capsys):
    shutil.rmtree(root / "val")
    before = begun(run, root, val_fraction=0.25)
    for gone in (names(before)[0], names(before, "val")[0]):
        (root / gone).unlink()
    after = resumed(run, root, val_fraction=0.25)
    assert [names(after, split) for split in ("train", "val")] == [names(before, split) for split in ("train", "val")]
    with pytest.raises(UserError, match=r"val_fraction 0\.5 for 0\.25"):
        resumed(run, root, val_fraction=0.5)


def test_another_order_and_other_splits_do_not_matter(run, root):
    before = begun(run, root)
    rows = [f"{name},{name.split('/')[1]},{split}" for split in ("val", "train") for name in names(before, split)]
    (root / "photos.csv").write_text("\n".join(["path,label,split", *reversed(rows)]))
    shutil.copy(root / "train" / "ant" / "00.jpg", root / "test" / "ant" / "09.jpg")
    for data in (root / "photos.csv", root):
        after = resumed(run, data)
        assert [names(after, split) for split in ("train", "val")] == [
            names(before, split) for split in ("train", "val")
        ]
        assert np.array_equal(after.splits["train"].sizes, before.splits["train"].sizes)
    (root / "photos.csv").write_text("\n".join(["path,label,split", *rows]).replace("ant/00.jpg,ant", "ant/00.jpg,bee"))
    with pytest.raises(UserError, match="2 photos of another class or split"):
        resumed(run, root / "photos.csv")


@pytest.mark.parametrize("case", ["split", "both splits", "a folder above", "a CSV above", "no split folder", "a file"])
def test_renamed_splits_are_the_same_photos(run, root, capsys, case):
    if case == "no split folder":
        shutil.rmtree(root / "val")
        shutil.rmtree(root / "test")
    before, data = begun(run, root), root
    if case in ("split", "both splits"):
        (root / "val").rename(root / "Validation_Set")
    if case == "both splits":
        (root / "train").rename(root / "training")
    if case == "a file":
        (root / "val/ant/00.jpg").rename(root / "val/ant/0 0.jpg")
    if case == "a folder above":
        (root.parent / "moved").mkdir()
        data = root.rename(root.parent / "moved" / "photos")
    if case == "a CSV above":
        paths = [(f"{root.name}/{name}", split) for split in ("train", "val") for name in names(before, split)]
        (data := root.parent / "all.csv").write_text(
            "path,label,split\n" + "\n".join(f"{path},{path.split('/')[2]},{split}" for path, split in paths)
        )
    if case == "no split folder":
        for path in [*(root / "train").iterdir()]:
            path.rename(root / path.name)
        (root / "train").rmdir()
    after = resumed(run, data)
    assert after.fingerprint == before.fingerprint
    for split in ("train", "val"):
        paths = [Path(after.splits[split].path(position)) for position in range(len(after.splits[split]))]
        assert all(path.is_file() for path in paths)
        assert [(path.parts[-2], path.name.replace(" ", "")) for path in paths] == [
            Path(name).parts[-2:] for name in names(before, split)
        ]
        assert not after.splits[split].faults.any()
    said = capsys.readouterr().out
    assert said.count("found under another path") == (case != "a folder above")
    assert ("before it was val/ant/00.jpg" in said) == (case in ("split", "a file"))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "added": (
        lambda root: shutil.copy(root / "train/ant/00.jpg", root / "train/ant/99.jpg"),
        r"1 photo more \(train/ant/99\.jpg\)",
    ),
    "changed, of the same size": (
        lambda root: (root / "val/bee/01.jpg").write_bytes(same_size(root / "val/bee/01.jpg")),
        r"1 photo of other content \(val/bee/01\.jpg\)",
    ),
    "renamed class": (
        lambda root: [(root / split / "bee").rename(root / split / "bees") for split in ("train", "val")],
        "class bee is called bees now: put them back",
    ),
    "renamed class, and a photo added": (
        lambda root: [
            *((root / split / "bee").rename(root / split / "bees") for split in ("train", "val")),
            shutil.copy(root / "train/ant/00.jpg", root / "train/ant/99.jpg"),
        ],
        r"1 photo more \(train/ant/99\.jpg\); class bee is called bees now: put them back",
    ),
    "changed": (
        lambda root: shutil.copy(root / "train/ant/00.jpg", root / "train/bee/01.jpg"),
        r"1 photo of other content \(train/bee/01\.jpg\)",
    ),
    "moved to another class": (
        lambda root: (root / "train/ant/00.jpg").rename(root / "train/bee/09.jpg"),
        r"1 photo more \(train/bee/09\.jpg\); 1 photo fewer \(train/ant/00\.jpg\)",
    ),
    "a class more": (
        lambda root: shutil.copytree(root / "train/ant", root / "train/wasp"),
        r"6 photos more \(train/wasp/00\.jpg, .* and 1 other\); classes ant, bee, wasp for ant, bee",
    ),
    "a class fewer": (
        lambda root: [shutil.rmtree(root / split / "bee") for split in ("train", "val")],
        "classes ant f",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_photos_are_refused_with_what_is_other(run, root, change):
    begun(run, root)
    make, told = CHANGES[change]
    make(root)
    with pytest.raises(UserError, match=rf"trained on other photos than {root} has now: {told}.*--overwrite"):
        resumed(run, root)
    shutil.rmtree(run.folder / "checkpoints")
    assert run.arrange(scanned(root)) == scanned(root), "nothing is lost where nothing was saved"


def test_what_was_bad_may_be_mended(run, root, capsys):
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        shutil.copy(root / "train/ant" / name, root.parent / name)
    break_openly(root / "train/ant/00.jpg")
    before = begun(run, root)
    run.note_bad(before.splits["train"], [1])  # that a decoder has met
    break_openly(root / "train/ant/02.jpg")  # that the next start finds
    after = resumed(run, root)
    with pytest.raises(UserError, match=r"train/ant/02\.jpg.*--skip-bad-files"):
        check_dataset(after, skip_bad_files=False)
    run.note_faulty(after)
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        shutil.copy(root.parent / "01.jpg", root / "train/ant" / name)
        (root / "train/ant" / name).write_bytes((root / "train/ant" / name).read_bytes() + b"\0" * 9)
    mended = resumed(run, root)
    assert "3 photos mended since the run began (train/ant/00.jpg" in capsys.readouterr().out
    assert not mended.splits["train"].faults.any()
    assert names(mended) == names(before)


def test_a_mended_photo_of_the_same_size_is_used_again(run, root, capsys):
    train = begun(run, root).splits["train"]
    kept = dict(np.load(run.folder / "photos.npz"))
    run.note_bad(train, [1])
    (root / "train/ant/01.jpg").write_bytes(same_size(root / "train/ant/01.jpg"))
    resumed(run, root)
    assert "1 photo mended since the run began (train/ant/01.jpg): it is used from here on" in capsys.readouterr().out
    (root / "train/ant/02.jpg").write_bytes(same_size(root / "train/ant/02.jpg"))
    with pytest.raises(UserError, match=r"1 photo of other content \(train/ant/02\.jpg\)"):
        resumed(run, root)
    del kept["signatures"]
    kept["about"] = np.frombuffer(kept["about"].tobytes().replace(b', "edge": 4096', b""), np.uint8)
    np.savez_compressed(run.folder / "photos.npz", **kept)
    assert run.arrange(scanned(root)) == scanned(root)


def test_a_left_out_photo_is_tried_again_once_its_file_has_changed(run, root):
    train = begun(run, root).splits["train"]
    run.note_bad(train, [1, 2])
    (root / "train/ant/02.jpg").touch()
    assert run.still_bad(train, [1, 2, 3]) == {1, 3}


@pytest.mark.parametrize("damage", ["cut", "changed", "other", "empty"])
def test_a_damaged_file_leaves_it_to_the_fingerprint(run, root, damage, capsys):
    begun(run, root)
    kept = run.folder / "photos.npz"
    content = kept.read_bytes()
    half = len(content) // 2
    damaged = {"cut": content[:half], "changed": content[:half] + b"\0" * half, "other": b"[1, 2]", "empty": b""}
    kept.write_bytes(damaged[damage])
    (root / "train" / "ant" / "02.jpg").unlink()
    assert run.arrange(scanned(root)) == scanned(root)
    assert f"{kept} is damaged" in capsys.readouterr().err


TAMPERED = {
    "fewer labels": lambda about, columns: columns.update(labels=columns["labels"][:-1]),
    "labels of no class": lambda about, columns: columns.update(labels=columns["labels"] + 9),
    "labels that are none": lambda about, columns: columns.update(labels=columns["labels"] - 9.5),
    "paths too long": lambda about, columns: columns.update(path_lengths=columns["path_lengths"] * 1_000_000),
    "a table of tables": lambda about, columns: columns.update(faults=np.zeros((len(columns["faults"]), 9), np.uint8)),
    "gigabytes of nothing": lambda about, columns: columns.update(path_blob=np.zeros(1 << 28, np.uint8)),
    "a path for a fingerprint": lambda about, columns: about.update(fingerprint="../../x"),
    "splits by name": lambda about, columns: about.update(splits={"train": 9}),
    "a split twice": lambda about, columns: about.update(splits=about["splits"] * 2),
    "splits of no number": lambda about, columns: about.update(splits=[["train", ["ant"], "9"]]),
    "a list": lambda about, columns: columns.update(about=np.frombuffer(b"[]", np.uint8)),
    "deep": lambda about, columns: columns.update(about=np.frombuffer(b"[" * 100_000, np.uint8)),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_a_tampered_file_leaves_it_to_the_fingerprint(run, root, tampered, capsys):
    begun(run, root)
    (file,) = run.folder.glob("photos.npz")
    with np.load(file) as kept:
        columns = dict(kept)
    about = json.loads(columns["about"].tobytes()) | {"fingerprint": "0" * 32}
    TAMPERED[tampered](about, columns)
    if tampered not in ("a list", "deep"):
        columns["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(file, "wb") as target:
        np.savez_compressed(target, **columns)
    index = scanned(root)
    assert in_known_positions(index, file, []) == (index, [], [])
    assert "photos.npz is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_after_a_broken_photo(root, random_weights, tmp_path, run_here):
    """Left out or removed it leaves its position empty, with the same weights bit for bit; mended, it is used again."""

    def train_on(photos: Path, runs: Path, epochs: int, *more: str) -> subprocess.CompletedProcess:
        flags = ["--data", photos, "--weights", random_weights, "--runs", runs, "--run", "r", "--epochs", epochs]
        return run_here(
            train, *flags, *FROZEN, "--batch-size", 5, "--schedule", "constant", "--loader", "pillow", *more
        )

    succeeded(train_on(root, tmp_path, 1))
    broken, sound = root / "train" / "bee" / "03.jpg", (root / "train" / "bee" / "03.jpg").read_bytes()
    break_unseen(broken)
    line = one_error_line(train_on(root, tmp_path, 2))
    assert "train/bee/03.jpg: cannot be decoded" in line
    assert "repair or remove it, or leave such photos out with --skip-bad-files" in line

    newest = {}
    for way in ("skipped", "removed", "mended"):
        (runs := tmp_path / way).mkdir()
        shutil.copytree(tmp_path / "r", runs / "r")
        photos = Path(shutil.copytree(root, runs / "photos"))
        if way == "removed":
            (photos / "train" / "bee" / "03.jpg").unlink()
        if way == "mended":
            (photos / "train" / "bee" / "03.jpg").write_bytes(sound + b"\0" * 9)
        skip = ["--skip-bad-files"] if way == "skipped" else []
        said = succeeded(train_on(photos, runs, 2, *skip))
        assert "resumed at step 3" in said
        assert ("left out: 1 photo," in said) == (way != "mended")
        newest[way] = checkpoint_folders(runs / "r" / "checkpoints")[-1] / "state.pt"
    assert same_bits(newest["skipped"], newest["removed"])
    assert not same_bits(newest["skipped"], newest["mended"])
