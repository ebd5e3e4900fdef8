"""The pictures: valid PNG files of a sane size whatever the names and numbers, and nothing left behind by a failure."""

import os
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import MachineError
from pipelines.run import figures
from pipelines.run.figures import (
    save_comparison,
    save_confusion_matrix,
    save_curves,
    save_penalties,
    save_per_class,
    save_predictions,
    save_train_batch,
)
from tests.helpers.paths import ROOT

import matplotlib
import numpy as np
import pytest
from matplotlib.backend_bases import RendererBase
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["$5_note^2$", "_", "", "\\alpha {", "蚂蚁", "Ζουζούνι", "\udcff\n\t", "n01440764_" + "very_long_name" * 18]
VERMILION = (213, 93, 0)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(path: Path) -> np.ndarray:
    """The picture, int [H, W, 3], once it is known to be a sound PNG, alone in its folder."""
    assert os.listdir(path.parent) == [path.name]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        array = np.asarray(picture.convert("RGB")).astype(int)
    assert 100 <= min(array.shape[:2]) <= max(array.shape[:2]) <= 1800
    return array


def share_of(color: tuple[int, int, int], picture: np.ndarray) -> float:
    return float((np.abs(picture - color).max(axis=2) < 12).mean())


def training_row(step: int, **values: float | None) -> dict[str, float | None]:
    row = {"epoch": step / 4, "global_step": step, "train/loss": 1 / step, "train/top1": 1 - 1 / (step + 1)}
    return row | {"lr/head": 0.01, "lr/body": 0.001} | values


def evaluation_row(step: int, top1: float) -> dict[str, float | None]:
    return {"epoch": step / 4, "global_step": step, "val/loss": 1 - top1, "val/top1": top1}


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Fills with every text that is drawn, and its width in pixels."""
    drawn: list[tuple[str, float]] = []
    draw = matplotlib.text.Text.draw

    def record(self: matplotlib.text.Text, renderer: RendererBase) -> None:
        if self.get_visible():
            drawn.append((self.get_text(), self.get_window_extent(renderer).width))
        draw(self, renderer)

    monkeypatch.setattr(matplotlib.text.Text, "draw", record)
    return drawn


def test_train_batch_undoes_the_normalisation(tmp_path: Path) -> None:
    color = np.array([0.2, 0.6, 0.8])
    images = np.ones((2, 3, 32, 32)) * ((color - MEAN) / STD)[:, None, None]
    images[1] = 1e9  # clipped to white
    save_train_batch(tmp_path / "batch.png", images.astype(np.float32), ["ants", "bees"], mean=MEAN, std=STD)
    assert 0.3 < share_of((51, 153, 204), pixels(tmp_path / "batch.png")) < 0.5


@pytest.mark.parametrize("count", [0, 1, 5, 17])
def test_train_batch_of_any_length(tmp_path: Path, count: int) -> None:
    images = np.random.default_rng(0).normal(size=(count, 3, 24, 40)).astype(np.float32)
    images[:1] = np.nan
    save_train_batch(tmp_path / "batch.png", images, (NAMES * 3)[:count], mean=MEAN, std=STD)
    pixels(tmp_path / "batch.png")


def test_grid_of_real_photos_is_a_small_file(tmp_path: Path) -> None:
    folder = os.environ.get("DALITUNE_DATA")
    if not folder:
        pytest.skip("DALITUNE_DATA is not set: it names the folder that holds the ants-and-bees photos")
    files = sorted(Path(folder).glob("train/*/*.jpg"))[:160:10]
    photos = np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files])
    save_predictions(tmp_path / "p.png", photos, ["ants"] * 16, ["bees"] * 16, [0.9] * 16)
    pixels(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size < 640_000


def test_wrong_predictions_stand_out_in_colour_and_in_words(tmp_path: Path, texts: list[tuple[str, float]]) -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    save_predictions(tmp_path / "p.png", images, ["ants", "bees"], ["bees", "bees"], [0.97, 0.5])
    captions = [text for text, _ in texts if text]
    assert captions == [
        "pred: ants | true: bees\n✗ wrong, confidence 0.97",
        "pred: bees | true: bees\n✓ right, confidence 0.50",
    ]
    picture = pixels(tmp_path / "p.png")
    left, right = np.array_split(picture, 2, axis=1)
    assert share_of(VERMILION, left) > 0.03
    assert share_of(VERMILION, right) == 0


def test_hostile_names(tmp_path: Path, texts: list[tuple[str, float]]) -> None:
    save_predictions(tmp_path / "p.png", np.zeros((8, 9, 9, 3), np.uint8), NAMES, NAMES[::-1], [0.5] * 8)
    pixels(tmp_path / "p.png")
    assert any(text.startswith("pred: $5_note^2$\ntrue: n01440764_") for text, _ in texts)
    assert max(width for _, width in texts) <= figures.TILE * 100 / 72


def test_names_are_cut_in_the_middle() -> None:
    short = figures._shortened("class_of_insects_number_0001", 100)
    assert short.startswith("class_")
    assert short.endswith("0001")
    assert "…" in short
    assert 80 < figures._width(short) <= 100
    assert figures._shortened("ants", 100) == "ants"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [training_row(1)],
        [evaluation_row(4, 0.5)],
        [{}],
        [training_row(step, **{"train/loss": float("nan"), "lr/body": None}) for step in (1, 2)],
        [training_row(1, **{"train/loss": float("inf")}), evaluation_row(4, float("nan"))],
        [training_row(step) for step in range(1, 3000)],
    ],
    ids=["none", "one", "one evaluation", "empty row", "NaN and None", "inf", "many"],
)
def test_curves_of_any_rows(tmp_path: Path, rows: list[dict[str, float | None]]) -> None:
    save_curves(tmp_path / "curves.png", rows, title="$a_run$")
    pixels(tmp_path / "curves.png")


@pytest.mark.parametrize(("whole_epochs", "where"), [(False, "epoch 2"), (True, "step 8")])
def test_curves_mark_the_earlier_best(
    tmp_path: Path, texts: list[tuple[str, float]], whole_epochs: bool, where: str
) -> None:
    rows = [training_row(step) for step in range(1, 13)]
    rows += [evaluation_row(4, 0.5), evaluation_row(8, 0.75), evaluation_row(12, 0.75)]
    if whole_epochs:  # then several training rows share one epoch, and only the steps tell them apart
        rows = [row | {"epoch": (row["global_step"] or 0) // 4} for row in rows]
    save_curves(tmp_path / "curves.png", rows, title="run")
    pixels(tmp_path / "curves.png")
    shown = {text for text, _ in texts}
    assert {f"top-1 accuracy: best 0.750 at {where}", where.split()[0]} <= shown
    for row in rows[12:]:
        row["val/balanced_top1"] = 1 - (row["val/top1"] or 0)
    save_curves(tmp_path / "curves.png", rows, title="run", best_by="val/balanced_top1")
    first = "epoch 1" if where == "epoch 2" else "step 4"
    assert {f"balanced accuracy: best 0.500 at {first}", "balanced"} <= {text for text, _ in texts}


def pairs_of(matrix: dict[tuple[int, int], int]) -> np.ndarray:
    return np.array([(*pair, photos) for pair, photos in sorted(matrix.items())], np.int64).reshape(-1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 25, 26, 1000, 8000])
def test_confusion_matrix_of_any_size(tmp_path: Path, texts: list[tuple[str, float]], count: int) -> None:
    empty = count // 2  # a class without photos
    matrix = {(index, index): 4321 for index in range(count) if index != empty}
    if empty:
        matrix[0, count - 1] = 87
    classes = [f"class {index}" for index in range(count)]
    tracemalloc.start()
    save_confusion_matrix(tmp_path / "matrix.png", pairs_of(matrix), classes)
    assert tracemalloc.get_traced_memory()[1] < 100e6  # 8,000 x 8,000 floats are 512 MB
    tracemalloc.stop()
    grey = share_of((0xD8, 0xD8, 0xD8), pixels(tmp_path / "matrix.png"))
    assert grey > 0.0005 or count > 250  # beyond, its neighbours in the block have some
    shown = [text for text, _ in texts]
    names = sum(text in classes for text in shown)
    assert names == 2 * count if count <= 26 else 50 <= names <= 100
    assert ("4321" in shown) == (1 < count <= 25)
    assert any("grey: no photos" in text for text in shown) == (count <= 250)
    assert any(f"87   class 0 → class {count - 1}" in text for text in shown) == (count > 25)


def test_confusion_matrix_takes_any_names(tmp_path: Path) -> None:
    save_confusion_matrix(tmp_path / "matrix.png", pairs_of({}), NAMES)
    pixels(tmp_path / "matrix.png")


def test_one_confusion_among_a_thousand_classes_is_seen(tmp_path: Path) -> None:
    matrix = {(index, index): 1 for index in range(1000)}
    save_confusion_matrix(tmp_path / "matrix.png", pairs_of(matrix), ["ant"] * 1000)
    before = pixels(tmp_path / "matrix.png")
    del matrix[200, 200]
    matrix[200, 801] = 1
    save_confusion_matrix(tmp_path / "matrix.png", pairs_of(matrix), ["ant"] * 1000)
    matrix_area = np.s_[:, : before.shape[1] // 2]
    assert (np.abs(pixels(tmp_path / "matrix.png") - before).max(axis=2)[matrix_area] > 100).sum() >= 4


def test_a_failure_while_drawing_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    images = np.zeros((1, 9, 9, 3), np.uint8)
    save_predictions(path, images, ["ants"], ["ants"], [1.0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        save_predictions(path, images, ["ants"], ["ants"], [])
    assert os.listdir(tmp_path) == ["p.png"]
    assert path.read_bytes() == before


def test_a_failure_while_writing_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(MachineError, match=r"curves\.png: cannot write") as failure:
        save_curves(tmp_path / "curves.png", [], title="run")
    assert "\n" not in str(failure.value)
    assert os.listdir(tmp_path) == ["curves.png"]
    with pytest.raises(MachineError, match="cannot write"):
        save_curves(tmp_path / "missing" / "curves.png", [], title="run")


def test_the_settings_of_the_machine_neither_change_nor_matter(tmp_path: Path) -> None:
    save_curves(tmp_path / "curves.png", [training_row(1)], title="run")
    before = pixels(tmp_path / "curves.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": True, "figure.dpi": 10}):
        settings = dict(matplotlib.rcParams)
        save_curves(tmp_path / "curves.png", [training_row(1)], title="run")
        assert dict(matplotlib.rcParams) == settings
    np.testing.assert_array_equal(pixels(tmp_path / "curves.png"), before)


def test_pyplot_is_never_imported() -> None:
    code = "import sys, pipelines.run.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("count", [1, 2, 41])
def test_the_class_that_is_found_worst_stands_above(tmp_path: Path, texts: list[tuple[str, float]], count: int) -> None:
    per_class = [{"recall": index / count, "precision": 0.5, "count": index} for index in range(count, 0, -1)]
    save_per_class(tmp_path / "bars.png", per_class, [f"class {row['count']}" for row in per_class])
    pixels(tmp_path / "bars.png")
    names = [text for text, _ in texts if text.startswith("class ")]
    assert names == [f"class {index}  ({index})" for index in range(1, min(count, 40) + 1)]
    assert any("the worst 40" in text for text, _ in texts) == (count > 40)


def test_a_class_without_photos_is_no_bar_and_comes_last(tmp_path: Path, texts: list[tuple[str, float]]) -> None:
    nothing = {"recall": None, "precision": None, "count": 0}
    per_class = [nothing, {"recall": 0.0, "precision": 0.0, "count": 3}, {"recall": 1.0, "precision": 0.5, "count": 2}]
    save_per_class(tmp_path / "bars.png", per_class, ["wasp", "ant", "bee"])
    pixels(tmp_path / "bars.png")
    assert [text for text, _ in texts if text.endswith(")")] == [
        "ant  (3)",
        "bee  (2)",
        "wasp  (0)",
        "per class (photos)",
    ]
    assert [text for text, _ in texts].count("n/a") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "curves.png: not drawn (MemoryError)"),
        (ValueError("two\nlines \udce4"), r"curves.png: not drawn (two?lines \xe4)"),
        (MachineError("x.png: cannot write this picture"), "x.png: cannot write this picture"),
    ],
)
def test_a_picture_that_fails_is_a_line(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert not figures.attempt("curves.png", fail)
    assert capsys.readouterr().err == f"warning: {told}\n"
    assert figures.attempt("curves.png", lambda: None)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_runs_are_compared_in_one_picture(tmp_path: Path, texts: list[tuple[str, float]], count: int) -> None:
    rows = [
        {"epoch": epoch, "val/loss": 1 / epoch, "val/top1": None if epoch == 2 else epoch / 5} for epoch in (1, 2, 3)
    ]
    save_comparison(tmp_path / "runs.png", {f"run-{index}": rows for index in range(count)} | {"empty": []})
    pixels(tmp_path / "runs.png")
    names = [text for text, _ in texts if text.startswith("run-")]
    assert names == [f"run-{index}" for index in range(min(count, 10))]


@pytest.mark.parametrize("count", [1, 11])
def test_a_fitted_heads_penalties_and_the_chosen_one(tmp_path, count):
    penalties = [10 ** (-index / 2) for index in range(count)]
    scores = np.random.default_rng(0).random((2, count, 5))
    save_penalties(tmp_path / "p.png", penalties, *scores, chosen=count // 2)
    assert share_of(VERMILION, pixels(tmp_path / "p.png")) > 0
