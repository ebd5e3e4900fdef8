"""What a model answers to each photo, as a file: what is written is read again, and what is foreign is refused."""

import os
import shutil
from pathlib import Path

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.errors import UserError
from pipelines.files import atomic_write
from pipelines.run.folder import RunFolder
from pipelines.run.predictions import (
    Source,
    note_source,
    predictions_of,
    read_predictions,
    source_of,
    source_of_split,
    write_predictions,
)
from pipelines.text import spelled
from pipelines.training.evaluation import RECORD

import numpy as np
import pytest
import torch

HEADER = "path,split,label,answer,probability,loss,answer_2,probability_2\n"
ROW = "val/ant/0.jpg,val,ant,ant,0.75,0.287682,bee,0.25\n"


@pytest.fixture
def split(photo_folder, tmp_path) -> Split:
    return load_dataset(scan_dataset(photo_folder({"val": {"ant": 2, "bee": 1}}), tmp_path, 0.2)).splits["val"]


def records_of(count: int, answers: list[int], probabilities: list[float]) -> np.ndarray:
    records = np.zeros(count, RECORD)
    records["index"] = range(count)
    records["label"][2:] = 1
    records["loss"] = 0.287682
    records["answers"][:, : len(answers)] = answers
    records["probabilities"][:, : len(answers)] = probabilities
    return records


def test_what_is_written_is_read(split, tmp_path):
    file = tmp_path / "predictions.csv"
    write_predictions(records_of(3, [1, 0], [0.75, 0.25])[[0, 2]], split, ("ant", "bee"), file)
    assert file.read_text() == (
        HEADER
        + "val/ant/00.jpg,val,ant,bee,0.75,0.287682,ant,0.25\nval/bee/00.jpg,val,bee,bee,0.75,0.287682,ant,0.25\n"
    )
    found = read_predictions(file)
    assert found.split == "val"
    assert found.paths == ["val/ant/00.jpg", "val/bee/00.jpg"]
    assert found.right.tolist() == [False, True]
    assert [[found.classes[at] for at in row] for row in found.answers] == [["bee", "ant"]] * 2
    assert found.probabilities.tolist() == [[0.75, 0.25]] * 2
    np.testing.assert_allclose(found.losses, 0.287682)


def test_of_many_classes_five_answers_are_kept_and_of_none_a_header(split, tmp_path):
    names = tuple("abcdefg")
    write_predictions(records_of(1, [6, 5, 4, 3, 2], [0.5, 0.2, 0.1, 0.1, 0.05]), split, names, tmp_path / "many.csv")
    found = read_predictions(tmp_path / "many.csv")
    assert [found.classes[at] for at in found.answers[0]] == list("gfedc")
    write_predictions(records_of(0, [], []), split, names, tmp_path / "none.csv")
    assert len(read_predictions(tmp_path / "none.csv")) == 0


def test_each_name_is_printable_and_has_a_spelling_of_its_own(split, tmp_path):
    names = ["a\nb", "a?b", r"a\nb", 'say "a", b', "Käfer", os.fsdecode(b"K\xe4fer"), r"K\xe4fer", "\x1b[2J", "\ufeffx"]
    names += ["\x80", os.fsdecode(b"\x80"), r"\x80"]
    assert spelled("\u0645\u06cc\u200c\u062e\u0648") == "\u0645\u06cc\u200c\u062e\u0648"
    assert len(set(map(spelled, names))) == len(names)
    assert all(spelled(name).isprintable() for name in names)
    assert spelled("Käfer, 蚂蚁.jpg") == "Käfer, 蚂蚁.jpg"
    assert spelled(b"K\xe4fer\n") == r"K\xe4fer\n"
    write_predictions(records_of(1, [3, 0], [0.75, 0.25]), split, names, tmp_path / "odd.csv")
    found = read_predictions(tmp_path / "odd.csv")
    assert [found.classes[at] for at in found.answers[0, :2]] == [spelled('say "a", b'), spelled("a\nb")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "path,label\n",
        HEADER.replace("probability_2", "probability"),
        HEADER + "val/ant/0.jpg,val,ant,ant,0.75\n",
        HEADER + ROW.replace("0.25", "1.5"),
        HEADER + ROW.replace("0.75", "nan"),
        HEADER + ROW.replace("0.287682", "inf"),
        HEADER + ROW.replace("0.287682", "-1"),
        HEADER + ROW.replace("ant,ant", "ant,"),
        HEADER + ROW.replace("val/ant/0.jpg", '"a\nb"'),
        HEADER + ROW.replace("val/ant/0.jpg", "\x1b[2J"),
        HEADER + ROW.replace("val/ant/0.jpg", '"open'),
        HEADER + ROW.replace("val/ant/0.jpg", "a" * 200_000),
        HEADER + ROW + ROW.replace(",val,", ",test,"),
        HEADER + ROW.replace("ant,0.75", "\udcff,0.75"),
    ],
)
def test_what_is_no_such_file_is_refused_by_its_line(text, tmp_path):
    (tmp_path / "predictions.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=r"predictions\.csv, line \d+: not as predictions\.csv is") as caught:
        read_predictions(tmp_path / "predictions.csv")
    assert str(caught.value).isprintable()


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_predictions(tmp_path / "predictions.csv")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        read_predictions(tmp_path / "pipe")


def test_a_run_has_the_predictions_of_its_weights_or_none(tmp_path, monkeypatch):
    """A disk that is full leaves those before, and a kill between two renames none."""
    run, network = RunFolder(tmp_path), torch.nn.Linear(1, 1)
    run.save_best(network, {"epoch": 1}, lambda path: path.write_text("first"))
    weights = run.best.read_bytes()
    with pytest.raises(Exception, match="what was saved before is whole"):
        run.save_best(torch.nn.Linear(2, 1), {"epoch": 2}, no_space)
    assert (run.predictions.read_text(), run.best.read_bytes()) == ("first", weights)

    replace = os.replace

    def killed_behind_the_weights(source: Path, target: Path) -> None:
        if Path(target) == run.predictions:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_behind_the_weights)
        with pytest.raises(KeyboardInterrupt):
            run.save_best(torch.nn.Linear(2, 1), {"epoch": 2}, lambda path: path.write_text("second"))
    assert run.best.read_bytes() != weights
    assert not run.predictions.exists()


def no_space(_: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_split_of_any_name_has_a_file_of_its_own(tmp_path):
    names = ["val", "Käfer 1.2", "hold/out", "hold%2Fout", "hold\\out", "hold-out", "a\0", "a\n", 'a<>:"|?*', "\udce4"]
    names += ["x" * 160, "x" * 161, "x" * 5000, "x" * 4999 + "y", "ü" * 200, "/" * 80]
    found = [predictions_of(tmp_path, name) for name in names]
    assert len({os.path.normcase(file) for file in found}) == len(names)
    assert [file.name for file in found[:3]] == [
        "predictions_val.csv",
        "predictions_Käfer 1.2.csv",
        "predictions_hold%2Fout.csv",
    ]
    (tmp_path / "figures").mkdir()
    for file in found:
        assert file.parent == tmp_path / "figures"
        assert not set(file.name) & set('/\\<>:"|?*\0\n')
        with atomic_write(file) as partial:
            partial.write_text("")


def test_answers_say_which_photos_they_are_to(photo_folder, tmp_path):
    counts = {"test": {"ant": 2, "bee": 1}, "train": {"ant": 1, "bee": 1}}
    data, others = photo_folder(counts), tmp_path / "others"
    shutil.copytree(data, others)
    whole, file = load_dataset(scan_dataset(data, tmp_path, 0.2)), tmp_path / "predictions_test.csv"
    split = whole.splits["test"]
    write_predictions(records_of(3, [1, 0], [0.75, 0.25]), split, ("ant", "bee"), file)
    assert source_of(file) is None, "as of an earlier version"
    note_source(file, source := source_of_split(whole, split))
    assert (source.data, source.dataset, source_of(file)) == (str(data), whole.fingerprint, source)
    (others / "train" / "cat").mkdir()
    shutil.copy(others / "train/bee/00.jpg", others / "train/cat/00.jpg")

    def again() -> Source:
        dataset = load_dataset(scan_dataset(others, tmp_path, 0.2))
        return source_of_split(dataset, dataset.splits["test"])

    assert again().dataset != source.dataset
    assert not again().is_other_than(source), "other training photos, another class and place"
    shutil.copy(others / "test/ant/00.jpg", others / "test/ant/01.jpg")
    assert again().is_other_than(source), "another photo of this name"
    assert source.is_other_than(Source("", "abc"))
    assert not source.is_other_than(Source("", "", ""))
    file.write_text(HEADER + ROW)
    assert source_of(file) is None, "another file has been put there"
    file.with_suffix(".json").write_text('{"split": "test", "count": 3}')
    assert source_of(file) is None, "somebody's scores"
