"""What a folder or a CSV file is taken for: splits, classes, photos; what is passed over; what is refused."""

import os
import re
from collections import Counter
from pathlib import Path

from pipelines.data.layout import Findings, folder_of_csv, list_csv, list_folder, photos_below, split_of
from pipelines.errors import UserError

import pytest


def make(root: Path, *files: str) -> Path:
    """Files of one byte; `train/{a,b}/1.jpg` stands for two."""
    for name in files:
        before, brace, rest = name.partition("{")
        inner, _, after = rest.partition("}")
        for each in inner.split(",") if brace else [""]:
            path = root / f"{before}{each}{after}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    return root


def read(root: Path, class_names: str = "top") -> tuple[dict[tuple[str, str], int], Findings]:
    """How many photos each (split, class) has."""
    findings = Findings()
    return dict(Counter((split, label) for split, label, _ in list_folder(root, class_names, findings))), findings


def refused(root: Path) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "Train-Data", "train images")],
        *[(name, "val") for name in ("val", "Valid", "validation", "Validation_Set", "dev", "valset", "VAL ")],
        *[(name, "test") for name in ("test", "Testing", "test_set", "testdata")],
        *[(name, None) for name in ("trains", "contest", "valley", "device", "seg_train", "set", "")],
    ],
)
def test_spellings_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("Train Val", {"train", "val"}),
        ("training_set test_set", {"train", "test"}),
        ("train valid test", {"train", "val", "test"}),
        ("TRAIN dev extra", {"train", "val", "extra"}),
        ("hold", {"train"}),
    ],
)
def test_split_folders_are_found_in_any_spelling(tmp_path: Path, folders: str, splits: set[str]) -> None:
    prefix = [f"{name}/" for name in folders.split() if name != "hold"] or [""]
    found, _ = read(make(tmp_path, *(f"{name}{{ants,bees}}/1.jpg" for name in prefix)))
    assert found == {(split, label): 1 for split in splits for label in ("ants", "bees")}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("train/{a,b}/1.jpg val/{a,b}/1.jpg valid/{a,b}/1.jpg", "'val' and 'valid' both mean the split 'val'"),
        ("Train/{a,b}/1.jpg train/{a,b}/1.jpg", "'Train' and 'train' both mean"),
        ("train/{a,b}/1.jpg val2017/{a,b}/1.jpg", "'val2017' reminds of it: call it val"),
        ("train/{a,b}/1.jpg evaluation/{a,b}/1.jpg", "'evaluation' reminds of it"),
        ("train/{a,b}/1.jpg validate/{a,b}/1.jpg", "'validate' reminds of it"),
        ("seg_train/{a,b}/1.jpg seg_test/{a,b}/1.jpg", "seg_test, seg_train remind of splits: call them train"),
        ("{bus,car,train}/1.jpg", "train by name a split, beside folders of photos, bus, car"),
        ("train/{a,b}/1.jpg {cats,dogs}/1.jpg", "train by name a split, beside folders of photos, cats, dogs"),
        ("test/a/1.jpg {cats,dogs}/1.jpg", "test by name a split, beside folders of photos"),
        ("train/{a,b}/1.jpg bus/x/1.jpg", "train by name a split, beside folders of photos, bus"),
        (
            "train1/{a,b}/1.jpg train2/{a,b}/1.jpg",
            "train1, train2 hold the same folders, a, b, as splits do: call them",
        ),
        ("{train,test}/1.jpg", "train: no class folders with photos in it"),
        ("train/{a,b}/1.jpg val/1.jpg", "val: no class folders with photos in it; add val/CLASS/*, or remove"),
        ("photos/train/{a,b}/1.jpg photos/val/{a,b}/1.jpg", "--data ROOT/photos"),
        ("x/photos/Train/{a,b}/1.jpg", "--data ROOT/x/photos"),
        ("x/train/{a,b}/1.jpg x/test/a/1.jpg y/a/1.jpg", "--data ROOT/x"),
        ("{a,b}/train/1.jpg {a,b}/test/1.jpg", "a class with the splits in it, test, train: turn them round (train/a)"),
        ("photos/{ants,bees}/1.jpg", "one class only, photos, with 2 folders of photos in it: --data ROOT/photos"),
        ("x/y/{ants,bees}/1.jpg", "one class only, x, with 2 folders of photos in it: --data ROOT/x/y if"),
        ("a/1.jpg b/1.txt b/2.JXL", "b: a class without photos"),
        ("1.jpg", "no class folders in it"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_type(tmp_path: Path, files: str, told: str) -> None:
    root = make(tmp_path / "data", *files.split())
    assert told.replace("ROOT", str(root)) in refused(root)


@pytest.mark.parametrize("name", ["val", "train/c", "train/St. Bernard", "train/v1.5", "train/a/part 2"])
def test_a_folder_that_is_a_link_to_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, "train/{a,b}/1.jpg")
    (root / name).symlink_to(tmp_path / "gone")
    assert f"{name}: a link that leads nowhere" in refused(root)


def test_a_class_of_things_that_are_recycled_is_a_class(tmp_path: Path) -> None:
    found, _ = read(make(tmp_path, "train/{recycled,Recycler,trash}/1.jpg"))
    assert {name for _, name in found} == {"recycled", "Recycler", "trash"}


def test_below_a_split_the_folder_above_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "data", "train/{a,b}/1.jpg", "val/{a,b}/1.jpg")
    assert f"--data {root} takes the whole" in refused(root / "train" / "a")
    found, findings = read(root / "train")
    assert found == {("train", "a"): 1, ("train", "b"): 1}
    assert findings.notes == [f"train alone was given; beside it are val: --data {root} takes them all"]


def test_a_split_of_its_own_name_may_spell_its_classes_otherwise(tmp_path: Path) -> None:
    found, _ = read(make(tmp_path, "train/{ants,bees}/1.jpg", "holdout/Ants/1.jpg"))
    assert ("holdout", "Ants") in found


def test_folders_beside_whole_splits_are_said_and_not_used(tmp_path: Path) -> None:
    root = make(tmp_path, "train/{a,b}/1.jpg", "val/{a,b}/1.jpg", "test/1.jpg", "to predict/1.jpg", "docs/x/1.txt")
    found, findings = read(make(root, "train/loose.jpg"))
    assert {split for split, _ in found} == {"train", "val"}
    assert findings.notes == [
        f"{root}: not used, as it has photos but no class folders: to predict, test",
        f"{root / 'train'}: 1 photo in no class folder is not used",
    ]


def test_a_class_may_be_called_like_a_split_where_most_are_not(tmp_path: Path) -> None:
    found, _ = read(make(tmp_path, "{bullet train,test tube,cat,dog,elk}/1.jpg", "vehicles/{bus,train}/1.jpg"))
    assert len(found) == 6


HIDDEN = (".DS_Store", "._1.jpg", ".x.jpg", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/1.jpg", "@eaDir/1.jpg")
HIDDEN += ("__MACOSX/1.jpg", "$RECYCLE.BIN/1.jpg", "System Volume Information/1.jpg", "lost+found/1.jpg")
HIDDEN += ("@Recently-Snapshot/1.jpg",)
TOOLS = ("wandb/run-1/files/media/1.png", "__pycache__/1.png", "lightning_logs/1.png", "mlruns/1.png")
TOOLS += ("runs/r/status.json", "logs/events.out.tfevents.1", "yolo/args.yaml", "figures/confusion_matrix_val.png")


@pytest.mark.parametrize("split", ["", "train/"])
@pytest.mark.parametrize("level", ["", "train/", "a/", "a/deep/"])
def test_hidden_and_system_and_tools_folders_never_count(tmp_path: Path, split: str, level: str) -> None:
    root = make(tmp_path, f"{split}{{a,b}}/1.jpg", "val/{a,b}/1.jpg" if split else "a/2.jpg", f"{split}a/deep/1.jpg")
    plain, _ = read(root)
    where = level if level in ("", "train/") or not split else f"{split}{level}"
    if level == "train/" and not split:
        pytest.skip("that would be a split")
    in_class = level.endswith(("a/", "deep/"))
    make(root, *(where + name for name in HIDDEN if in_class or "/" in name), *(where + name for name in TOOLS))
    make(root, f"{where}runs/r/config.yaml", f"{where}runs/r/figures/curves.png", f"{where}logs/x.png")
    make(root, f"{where}yolo/val.jpg")
    found, findings = read(root)
    assert found == plain
    assert findings.hidden >= len(HIDDEN if in_class else [name for name in HIDDEN if "/" in name])
    assert len(findings.tools) >= len(TOOLS)


def test_what_is_passed_over_is_counted_in_the_report(tmp_path: Path) -> None:
    names = [".DS_Store", "._1.jpg", "notes.txt", "README", "x.JXL", "y.jxl", "z.gif"]
    _, findings = read(make(tmp_path, "{a,b}/1.jpg", *(f"a/{name}" for name in names), "wandb/x/1.png"))
    first, second = findings.lines()
    assert first == (
        "passed over: 2 hidden or system files and folders, 1 folder of a run or tool (wandb), 2 other files "
        "(.txt 1, no ending 1)"
    )
    assert second.startswith("3 pictures are not used, of formats that are not read here: .jxl 2, .gif 1; ")


def test_a_class_that_is_passed_over_is_named(tmp_path: Path) -> None:
    names = ["{a,b}/1.jpg", "wandb/1.jpg", "scans/1.jpg", "scans/args.yaml", "figures/predictions_cats.png"]
    found, findings = read(make(tmp_path, *names))
    assert found == {("train", "a"): 1, ("train", "b"): 1}
    assert findings.lines() == ["passed over: 3 folders of runs or tools (figures, scans, wandb)"]


def test_endings_of_photos(tmp_path: Path) -> None:
    names = ["1.jpg", "2.JFIF", "3.jpe", "4.jif", "5.Png", "6.dib", "7.tiff", "8.mpo"]
    make(tmp_path, *names, "jpg", "x.jpg.txt", "y.jxl")
    assert [os.path.basename(path) for path in photos_below(str(tmp_path), Findings())] == names
    assert len(photos_below(str(tmp_path), Findings(), unread=True)) == len(names) + 1


def test_nested_class_folders_are_said_with_both_readings(tmp_path: Path) -> None:
    root = make(tmp_path, "train/animals/{cat,dog}/1.jpg", "train/plants/1.jpg", "val/animals/{cat,dog}/1.jpg")
    top, findings = read(root)
    assert top == {("train", "animals"): 2, ("train", "plants"): 1, ("val", "animals"): 2}
    assert findings.notes == [
        "class folders are nested: train has 2 classes by their first folder (class_names: top); with --class_names "
        "path it would be 3 by their path, as 'animals/cat'"
    ]
    path, findings = read(root, "path")
    assert {label for split, label in path if split == "train"} == {"animals/cat", "animals/dog", "plants"}
    assert "(class_names: path)" in findings.notes[0]
    _, findings = read(make(tmp_path / "folds", "fold1/{cat,dog}/1.jpg", "fold2/{cat,dog}/1.jpg"))
    assert findings.notes[1] == (
        "fold1, fold2 hold the same folders, cat, dog, as splits do: call them train, val and test if they are"
    )
    assert "changes nothing" in read(make(tmp_path / "flat", "{a,b}/1.jpg"), "path")[1].notes[0]


# CSV files


def read_csv(tmp_path: Path, text: str, encoding: str = "utf-8") -> tuple[list[tuple[str, str, str]], Findings]:
    make(tmp_path, "photos/{0,1,2}.jpg")
    file = tmp_path / "list.csv"
    file.write_bytes(text.encode(encoding))
    findings = Findings()
    return [(split, label, os.fsdecode(path)) for split, label, path in list_csv(file, findings)], findings


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("path,label\nphotos/0.jpg,a\nphotos/1.jpg,b\n", "utf-8-sig"),
        ("path;label\nphotos/0.jpg;a\nphotos/1.jpg;b\n", "utf-8"),
        ("sep=;\r\npath;label\r\nphotos/0.jpg;a\r\nphotos/1.jpg;b\r\n", "utf-8"),
        ("path\tlabel\r\nphotos/0.jpg\ta\r\nphotos/1.jpg\tb\r\n", "utf-16"),
        ("LABEL, Path \na,photos\\0.jpg\nb,photos/1.jpg \n", "utf-8"),
        ("Path,Label,Split\nphotos/0.jpg,a,Training\nphotos/1.jpg,b,Training\n", "utf-8"),
    ],
)
def test_csv_files_of_all_programs(tmp_path: Path, text: str, encoding: str) -> None:
    rows, findings = read_csv(tmp_path, text, encoding)
    assert rows == [("train", "a", "photos/0.jpg"), ("train", "b", "photos/1.jpg")]
    mended = ["2 paths were put right, with / for \\ or without blanks around them"]
    assert findings.notes == (mended if "\\" in text else [])


def test_blanks_behind_a_quote_are_nothing(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    rows, _ = read_csv(tmp_path, 'path,label\n"a.jpg" , "x" \n"b.jpg" ,y\n')
    assert [(label, path) for _, label, path in rows] == [("x", "a.jpg"), ("y", "b.jpg")]


def test_a_name_with_a_backslash_or_a_blank_is_taken_as_it_is(tmp_path: Path) -> None:
    make(tmp_path, "a\\0.jpg", "a/0.jpg", "b.jpg ", "b.jpg")
    rows, findings = read_csv(tmp_path, "path,label\na\\0.jpg,x\nb.jpg ,y\nphotos\\gone.jpg,y\n")
    assert [path for *_, path in rows] == ["a\\0.jpg", "b.jpg ", "photos\\gone.jpg"]
    assert not findings.notes


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        ("path,label,Label\na.jpg,a,b\n", "utf-8", "line 1: the column label stands there 2 times"),
        ("path;file\na;b\n", "utf-8", "line 1: no column label; it has path, file"),
        ("photos/0.jpg,a\n", "utf-8", "line 1: no column label, path; it has photos/0.jpg, a"),
        ("path,label\na.jpg,K\xe4fer\n", "latin-1", "not a CSV file in UTF-8"),
        ('path,label\na.jpg,a\nb.jpg,"b\nc.jpg,c\n', "utf-8", "line 2 or below: a quote is opened and never closed"),
        ("path,label\nC:\\x\\a.jpg,a\n", "utf-8", "line 2: C:\\x\\a.jpg is no path here"),
        ("sep=,\npath,label\nfile:///x/a.jpg,a\n", "utf-8", "line 3: file:///x/a.jpg is no path here"),
        ("path,label\na.jpg,a\n", "utf-16-le", "UTF-16 without its mark"),
        ("path,label,split\na.jpg,a,val\nb.jpg,a,valid\n", "utf-8", "line 3: 'val' and 'valid' both mean"),
        ("path,label,split\na.jpg,a,train\nb.jpg,a,val2\n", "utf-8", "no split 'val', but 'val2' reminds of it"),
        ("path;label\na.jpg;a;b\n", "utf-8", "line 2: more values than columns; put a value with a semicolon"),
    ],
)
def test_an_unclear_csv_file_is_refused_with_its_cause(tmp_path: Path, text: str, encoding: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        read_csv(tmp_path, text, encoding)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# Reviews

REVIEW = "path,label,split,finding,score,other,action,new_label,folder\n"


def read_review(tmp_path: Path, *rows: str, folder: str = "../photos") -> tuple[list[tuple[str, str, str]], Findings]:
    make(tmp_path, "photos/{0,1,2}.jpg")
    (tmp_path / "runs").mkdir(exist_ok=True)
    file = tmp_path / "runs" / "photos.csv"
    file.write_text(REVIEW + "".join(f"{row},{folder}\n" for row in rows), "utf-8-sig")
    findings = Findings()
    assert folder_of_csv(file) == tmp_path / "photos"
    return [(split, label, os.fsdecode(path)) for split, label, path in list_csv(file, findings)], findings


def test_a_review_is_done_and_said(tmp_path: Path) -> None:
    rows, findings = read_review(
        tmp_path,
        "0.jpg,a,train,wrong_label,0.9,, Relabel ,b",
        "1.jpg,b,val,,,,,a",  # a suggestion that nobody has taken
        "2.jpg,a,train,copy,0.99,0.jpg,DROP,",
    )
    assert rows == [("train", "b", "0.jpg"), ("val", "b", "1.jpg")]
    assert findings.notes == ["review: 1 photo is left out, 1 of another label than before"]


def test_a_name_may_be_spelled_as_a_mac_spells_it(tmp_path: Path) -> None:
    rows, _ = read_review(tmp_path, "0.jpg,caf\u00e9,train,,,,,", "1.jpg,b,train,wrong_label,0.9,,relabel,cafe\u0301")
    assert [path for _, label, path in rows if label.startswith("caf")] == ["0.jpg", "1.jpg"]


def test_a_review_that_nobody_has_edited_is_the_data(tmp_path: Path) -> None:
    rows, findings = read_review(tmp_path, "0.jpg,a,train,,,,keep,", folder=str(tmp_path / "photos"))
    assert (rows, findings.notes) == ([("train", "a", "0.jpg")], [])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("0.jpg,a,train,copy,1,,remove,", "line 2: the action 'remove' is none: write keep, drop, relabel, or nothing"),
        ("0.jpg,a,train,copy,1,,relabel,", "line 2: relabel, and no new_label: fill it in, or keep or drop the photo"),
        ("0.jpg,a,train,copy,1,,relabel,bess", "line 2: new_label bess is the label of no photo; correct it"),
        ("../0.jpg,a,train,copy,1,,keep,", "line 2: ../0.jpg is not in"),
        ("0.jpg,a,val,copy,1,,drop,", "photos.csv: all photos of split 'val' are dropped: keep some"),
    ],
)
def test_a_review_that_cannot_be_done_is_refused(tmp_path: Path, row: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        read_review(tmp_path, row)


def test_photos_of_a_review_that_have_moved_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "photos.csv").write_text(f"{REVIEW}0.jpg,a,train,,,,keep,,/not/there\n")
    with pytest.raises(UserError, match=r"no folder /not/there, where its photos were: write the one"):
        folder_of_csv(tmp_path / "photos.csv")
    (tmp_path / "photos.csv").write_text(
        f"{REVIEW}0.jpg,a,train,,,,keep,,{tmp_path}\n1.jpg,a,train,,,,keep,,/not/there\n"
    )
    with pytest.raises(UserError, match="line 3: another folder than in the rows before"):
        list(list_csv(tmp_path / "photos.csv", Findings()))


def test_an_action_of_somebody_elses_is_a_column_like_others(tmp_path: Path) -> None:
    rows, _ = read_csv(tmp_path, "path,label,action,folder\nphotos/0.jpg,a,jumping,x\n")
    assert rows == [("train", "a", "photos/0.jpg")]


def test_real_paths_are_below_a_folder_that_is_reached_by_a_link(tmp_path: Path) -> None:
    """As where /home is a link to another disk, and paths were written with `Path.resolve`."""
    photo = make(tmp_path / "disk", "me/p/0.jpg") / "me" / "p" / "0.jpg"
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    file = tmp_path / "home" / "me" / "l.csv"
    file.write_text(f"path,label\n{photo.resolve()},a\n")
    assert list(list_csv(file, Findings())) == [("train", "a", b"p/0.jpg")]
