"""The pictures of a run: what the network sees, how it learned, what it confuses, where it errs.

Pure functions: arrays in, one PNG out. Drawn without pyplot, hence without a display or state that outlives the call,
and in one style, whatever matplotlibrc the machine has.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import MachineError
from pipelines.files import atomic_write
from pipelines.run.figures import CALIBRATION_BINS, MAX_PHOTOS, SOFTWARE
from pipelines.text import printable

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font_names
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_COUNTED_CLASSES = 25  # up to here a cell of the confusion matrix has room for its count
MAX_BARS = 40
MAX_NAMED_RUNS = 10
MAX_CELLS = 250  # along a side of that matrix; more would be too small to see
TILE, CAPTION, NAME = 122, 118, 110  # points: width of a photo in a grid, of its caption, of a class name elsewhere

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"  # Okabe & Ito: stay apart for colour-blind readers
INK, GREY = "#222222", "#8a8a8a"

# DejaVu, which comes with matplotlib, has no Chinese or Japanese: one of these helps out where it is installed.
ASIAN_FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Hiragino Sans GB"}
FONT = FontProperties(family=["DejaVu Sans", *sorted(ASIAN_FONTS.intersection(get_font_names()))[:1]], size=9)
STYLE: dict[str, Any] = {
    "font.family": FONT.get_family(),
    "font.size": FONT.get_size(),
    "text.parse_math": False,  # a class may be called "$5_note"
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "grid.color": "#e6e6e6",
    "legend.handlelength": 1.4,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def save_train_batch(
    path: Path,
    images: np.ndarray,
    titles: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    most: int = MAX_PHOTOS,
) -> None:
    """What the network really sees, augmentation included: the first photos of a batch, `most` at most.

    images: float [N, 3, H, W], normalised; `mean` and `std` (3 values each, on the 0..1 scale) undo that, and what lies
    outside 0..1 is clipped. titles: N, of one line each or more.
    """
    photos = images[:most].transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    photos = (np.nan_to_num(photos).clip(0, 1) * 255).round().astype(np.uint8)
    lines = max([1, *(title.count("\n") + 1 for title in titles[:most])])
    with _photo_grid(path, photos, caption_lines=lines) as tiles:
        for tile, title in zip(tiles, titles[:most], strict=True):
            tile.set_title("\n".join(_shortened(line, CAPTION) for line in title.split("\n")))


def save_predictions(
    path: Path, images: np.ndarray, predicted: Sequence[str], true: Sequence[str], confidence: Sequence[float]
) -> None:
    """The first 16 photos, in the caller's order, each with both names; a wrong one has a cross and a thick frame.

    images: uint8 [N, H, W, 3]; predicted, true: N class names; confidence: N probabilities of the predicted class.
    """
    remarks = [f"confidence {sureness:.2f}" for sureness in confidence]
    _save_judged(path, images[:MAX_PHOTOS], predicted[:MAX_PHOTOS], true[:MAX_PHOTOS], remarks[:MAX_PHOTOS])


def save_explanations(
    path: Path,
    images: np.ndarray,
    heated: np.ndarray,
    predicted: Sequence[str],
    true: Sequence[str],
    remarks: Sequence[str],
) -> None:
    """Photos, each beside itself with a heat map, as `save_predictions` has them.

    images, heated: uint8 [N, H, W, 3]; predicted, true: N class names; remarks: N, a few words each.
    """
    between = np.full_like(images[:, :, : max(1, images.shape[2] // 32)], 255)
    pairs = np.concatenate([images, between, heated], axis=2)
    _save_judged(path, pairs, predicted, true, remarks, tile_width=2 * TILE)


def save_explanation(path: Path, photo: np.ndarray, heated: np.ndarray, name: str, answer: str) -> None:
    """One photo beside itself with a heat map, under its file's name and its answer. photo, heated: uint8 [H, W, 3]."""
    tile_width = max(TILE, min(3 * TILE, 4 * TILE * photo.shape[1] / photo.shape[0]))
    with _photo_grid(path, np.stack([photo, heated]), caption_lines=1, tile_width=tile_width) as tiles:
        for tile, text in zip(tiles, (name, answer), strict=True):
            tile.set_title(_shortened(text, tile_width - 4))


def save_answers(
    path: Path, images: np.ndarray, names: Sequence[str], predicted: Sequence[str], confidence: Sequence[float]
) -> None:
    """The first 16 photos, each with its file's name and its predicted class, where the truth is not known.

    images: uint8 [N, H, W, 3]; names: N; predicted: N class names; confidence: N probabilities of that class.
    """
    with _photo_grid(path, images[:MAX_PHOTOS], caption_lines=3) as tiles:
        for tile, *texts, sureness in zip(tiles, names, predicted, confidence, strict=False):
            name, guess = (_shortened(text, CAPTION) for text in texts)
            tile.set_title(f"{name}\n{guess}\nconfidence {sureness:.2f}")


def save_captioned(path: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Photos in a grid, each under its caption. images: uint8 [H, W, 3], all of one shape; captions: of some lines."""
    lines = max(caption.count("\n") + 1 for caption in captions)
    with _photo_grid(path, np.stack(images), caption_lines=lines) as tiles:
        for tile, caption in zip(tiles, captions, strict=True):
            tile.set_title("\n".join(_shortened(line, CAPTION) for line in caption.split("\n")))


def save_contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], *, title: str) -> None:
    """Photos of each class in a row. rows: class name and uint8 [n, H, W, 3], n at least 1."""
    columns, side = max(len(photos) for _, photos in rows), TILE * 0.6
    with _picture(path, (NAME + columns * (side + 4)) / 72, (20 + len(rows) * (side + 4)) / 72) as figure:
        figure.suptitle(_clean(title), x=0.01, ha="left", fontsize="medium")
        for tiles, (name, photos) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            tiles[0].set_ylabel(_shortened(name, NAME), rotation=0, ha="right", va="center")
            for index, tile in enumerate(tiles):
                tile.set(xticks=[], yticks=[])
                tile.spines[:].set_visible(False)
                if index < len(photos):
                    tile.imshow(photos[index])


def save_curves(
    path: Path,
    rows: Sequence[Mapping[str, float | None]],
    *,
    title: str,
    best_by: str = "val/top1",
    of_training: str = "train",
) -> None:
    """Loss, top-1 accuracy and learning rate over epochs, or over `global_step` where epochs do not tell rows apart.

    rows: those of `metrics.jsonl`, in order. Training rows have `train/loss`, `train/top1`, `lr/head`, `lr/body`,
    evaluation rows `val/loss`, `val/top1`, `val/balanced_top1`; any value may be missing, None or NaN. best_by: the
    one of the last two whose best is marked, the earlier one of a tie. of_training: what `train/*` is called.
    """
    unit, x = _x_axis(rows)
    with _picture(path, 10, 3.2) as figure:
        figure.suptitle(_shortened(title, 600), x=0.01, ha="left")
        loss, top1, rate = figure.subplots(1, 3)
        for panel, name in ((loss, "loss"), (top1, "top1")):
            _line(panel, x, _column(rows, f"train/{name}"), color=BLUE, label=of_training)
            _line(panel, x, _column(rows, f"val/{name}"), color=ORANGE, label="val")
        averaged = _column(rows, best_by.replace("val/", "ema/"))
        _line(top1, x, averaged, color=GREY, label="averaged")
        scores = np.where(np.isfinite(x), np.fmax(_column(rows, best_by), averaged), np.nan)
        accuracy = "top-1 accuracy"
        if best_by != "val/top1":
            accuracy = "balanced accuracy"
            _line(top1, x, _column(rows, best_by), color=ORANGE, label="balanced", linestyle="--")
        if np.isfinite(scores).any():
            best = int(np.nanargmax(scores))
            top1.plot(x[best], scores[best], "*", color=VERMILION, markersize=11)  # the title names it
            accuracy = f"{accuracy}: best {scores[best]:.3f} at {unit} {x[best]:g}"
        head, body = _column(rows, "lr/head"), _column(rows, "lr/body")
        _line(rate, x, head, color=BLUE, label="head")
        _line(rate, x, body, color=ORANGE, label="body", linestyle="--")
        peaks = sorted(np.nanmax(rates) for rates in (head, body) if np.isfinite(rates).any())
        # On a linear scale, a body that learns much more slowly than the head would lie flat on the axis.
        if len(peaks) == 2 and 0 < peaks[0] < peaks[1] / 4:
            rate.set_yscale("log")
            rate.set_ylim(peaks[0] / 100, peaks[1] * 2)  # the last decades of a cosine to zero say nothing
            rate.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            rate.yaxis.set_minor_locator(NullLocator())
        for panel, name in ((loss, "loss"), (top1, accuracy), (rate, "learning rate")):
            _finish_panel(panel, name, unit)


def save_penalties(
    path: Path, penalties: Sequence[float], accuracies: np.ndarray, losses: np.ndarray, chosen: int
) -> None:
    """How a fitted head's penalty was chosen: accuracy and loss on held-out photos, of each fold and in the mean.

    penalties: P; accuracies, losses: float [P, folds]; chosen: the position that the head was fitted with.
    """
    with _picture(path, 7.5, 3.2) as figure:
        names = ("top-1 accuracy, held out", "loss, held out")
        for panel, name, values in zip(figure.subplots(1, 2), names, (accuracies, losses), strict=True):
            panel.plot(penalties, values, color="#d0d0d0", lw=0.9, label=["a fold", *["_"] * (values.shape[1] - 1)])
            mean = values.mean(axis=1)
            panel.plot(penalties, mean, color=BLUE, marker="o", ms=4, lw=1.6, label="mean of the folds")
            label = f"chosen: {penalties[chosen]:.2g}"
            panel.plot(penalties[chosen], mean[chosen], "*", color=VERMILION, markersize=11, label=label)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_title(name, pad=20)
            panel.set_xlabel("penalty on the weights")
            panel.grid(True)
        figure.axes[0].legend(loc="lower left", bbox_to_anchor=(-0.03, 0.97), ncols=3).set_in_layout(False)


def save_lr_search(path: Path, rates: np.ndarray, losses: np.ndarray, suggestion: float) -> None:
    """Loss over a rate that has risen from step to step. rates, losses: float [steps]."""
    with _picture(path, 6, 3.4) as figure:
        panel = figure.subplots()
        panel.plot(rates, losses, color=BLUE, lw=1.6, label="training loss, running mean")
        panel.axvline(suggestion, color=VERMILION, lw=1.2, label=f"suggested: {suggestion:.2g}")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel("--lr")
        panel.set_title("loss", pad=20)
        panel.grid(True)
        panel.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.97), ncols=2).set_in_layout(False)


def save_calibration(path: Path, panels: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy over confidence, a bar for each bin that has photos, with their number (reliability diagrams, Guo et al.
    2017). panels: by title `loss`, `ece` and `bins`, each of these photos, mean confidence and accuracy.
    """
    with _picture(path, 4 * len(panels) + 0.2, 3.9) as figure:
        for panel, (title, found) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            count, confidence, accuracy = np.array(found["bins"], dtype=float).reshape(-1, 3).T
            middle = (np.clip(np.ceil(confidence * CALIBRATION_BINS), 1, None) - 0.5) / CALIBRATION_BINS
            panel.bar(middle, accuracy, 0.92 / CALIBRATION_BINS, color=BLUE, label="accuracy")
            panel.plot(confidence, confidence, "_", color=VERMILION, ms=9, mew=2, label="confidence")
            panel.plot((0, 1), (0, 1), color=GREY, lw=0.8)
            for x, y, photos in zip(middle, np.maximum(accuracy, confidence), count, strict=True):
                panel.text(x, y + 0.015, f"{photos:,.0f}", ha="center", va="bottom", size=6.5, color=GREY)
            panel.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="confidence")
            panel.set_title(f"{title}\ncalibration error {found['ece']:.4f}, loss {found['loss']:.4f}", pad=20)
            panel.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.97), ncols=2).set_in_layout(False)


def save_comparison(path: Path, runs: Mapping[str, Sequence[Mapping[str, float | None]]]) -> None:
    """Loss and top-1 accuracy on the validation photos over epochs, a line for each run; the first 10 have a name.

    runs: rows of `metrics.jsonl` by the run's name, the best run first.
    """
    with _picture(path, 10, 4) as figure:
        panels = figure.subplots(1, 2)
        for index, (name, rows) in reversed(list(enumerate(runs.items()))):  # the best one on top
            named = index < MAX_NAMED_RUNS
            for panel, key in zip(panels, ("val/loss", "val/top1"), strict=True):
                color, label = (f"C{index}", _shortened(name, 200)) if named else ("#d0d0d0", f"_{name}")
                _line(panel, _column(rows, "epoch"), _column(rows, key), color=color, label=label)
        for panel, name in zip(panels, ("validation loss", "validation top-1 accuracy"), strict=True):
            panel.set_title(name)
            panel.set_xlabel("epoch")
            panel.grid(True)
            panel.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=min(3, max(1, len(labels))))


def save_confusion_matrix(path: Path, pairs: np.ndarray, classes: Sequence[str]) -> None:
    """The confusion matrix: colours are shares of the true class, printed numbers are photos.

    pairs: int [P, 3], true class, predicted class, photos, each pair once; classes: C names. The row of a class without
    photos is grey. Above 25 classes a cell has no room for its number: then the commonest confusions are listed beside,
    names are thinned to those that fit, and a square-root scale lifts faint shares. Above 250 a cell shows the largest
    share of several neighbours.
    """
    counted = len(classes) <= MAX_COUNTED_CLASSES
    side = min(max(0.4 * len(classes), 2.2), 7.5)  # of the matrix, inches
    cell = side * 72 / len(classes)  # points
    shown = range(0, len(classes), math.ceil(12 / cell))
    names = [_shortened(classes[index], NAME) for index in shown]
    longest = max(_width(name) for name in names)
    margin = (longest + 34) / 72
    width, height = margin + side + (0.95 if counted else 5.1), margin + side + 0.3
    truth, guess, photos = pairs.T
    total, right = int(photos.sum()), int(photos[truth == guess].sum())
    shares, block = _pooled_shares(pairs, len(classes))
    end = len(shares) * block - 0.5
    with _picture(path, width, height) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        scale, cmap = PowerNorm(1 if counted else 0.5, 0, 1), matplotlib.colormaps["Blues"].with_extremes(bad="#d8d8d8")
        colors = axes.imshow(shares, cmap=cmap, norm=scale, extent=(-0.5, end, end, -0.5), interpolation="nearest")
        axes.spines[:].set_visible(True)
        axes.set_xticks(shown, names, rotation=0 if longest < cell - 4 else 90)
        axes.set_yticks(shown, names)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"top-1 {right / max(total, 1):.3f}: {right:,} of {total:,} photos")
        label = "share of the true class" + (f", largest of {block} x {block}" if block > 1 else "")
        label += "; grey: no photos" if np.isnan(shares).any() else ""
        bar = axes.inset_axes((1 + 0.1 / side, 0, 0.15 / side, 1))
        figure.colorbar(colors, cax=bar, label=label).outline.set_visible(False)
        if counted:
            _print_counts(axes, pairs, shares, cell)
        else:
            listing = _commonest_confusions(pairs, classes)
            axes.text(1 + 1 / side, 1, listing, va="top", linespacing=1.5, transform=axes.transAxes)


def save_per_class(path: Path, per_class: Sequence[Mapping[str, float | None]], classes: Sequence[str]) -> None:
    """Recall and precision of each class, the worst recall above; of more than 40 classes only the worst 40.

    per_class: C times `recall`, `precision` (fractions, None where there is no photo) and `count`; classes: C names. A
    class without photos comes last.
    """
    recalls = [row["recall"] for row in per_class]
    order = sorted(range(len(classes)), key=lambda index: math.inf if (r := recalls[index]) is None else r)[:MAX_BARS]
    names = [f"{_shortened(classes[index], NAME)}  ({per_class[index]['count']:,})" for index in order]
    with _picture(path, 7, 0.9 + 0.32 * len(order)) as figure:
        axes = figure.subplots()
        for name, color, shift in (("recall", BLUE, -0.2), ("precision", ORANGE, 0.2)):
            values = [per_class[index][name] or 0.0 for index in order]
            axes.barh(np.arange(len(order)) + shift, values, height=0.38, color=color, label=name)
        for row, index in enumerate(order):
            if recalls[index] is None:
                axes.text(0.01, row, "n/a", va="center_baseline", color=GREY)
        axes.set_yticks(range(len(order)), names)
        axes.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
        axes.set_title("per class (photos)" + (f": the worst {MAX_BARS}" if len(order) < len(classes) else ""))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) that becomes the PNG `path` at the end: all of it, or nothing where drawing fails."""
    with matplotlib.style.context(["default", STYLE]), _boxes_for_missing_glyphs():
        canvas = FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained"))
        yield canvas.figure
        canvas.draw()
        # 6 of 8 bits a channel: no eye misses them in a photo, and the file is a quarter smaller.
        pixels = np.round(np.round(np.asarray(canvas.buffer_rgba())[..., :3] / 255 * 63) / 63 * 255).astype(np.uint8)
    information = PngInfo()
    information.add_text("Software", SOFTWARE)
    try:
        with atomic_write(path, shared=True) as partial:
            Image.fromarray(pixels).save(partial, format="png", pnginfo=information)
    except OSError as error:
        reason = error.strerror or error
        raise MachineError(f"{path}: cannot write this picture ({reason}); make room or mend the folder") from error


def _save_judged(
    path: Path,
    photos: np.ndarray,
    predicted: Sequence[str],
    true: Sequence[str],
    remarks: Sequence[str],
    tile_width: float = TILE,
) -> None:
    """Each photo, uint8 [N, H, W, 3], with both names and a remark; a wrong one has a cross and a thick frame."""
    pairs, room = list(zip(predicted, true, strict=True)), tile_width - (TILE - CAPTION)
    lines = [f"pred: {_clean(guess)} | true: {_clean(truth)}" for guess, truth in pairs]
    two_lines = any(_width(line) > room for line in lines)
    if two_lines:
        room -= _width("pred: ")
        lines = [f"pred: {_shortened(guess, room)}\ntrue: {_shortened(truth, room)}" for guess, truth in pairs]
    with _photo_grid(path, photos, caption_lines=3 if two_lines else 2, tile_width=tile_width) as tiles:
        for tile, (guess, truth), line, remark in zip(tiles, pairs, lines, remarks, strict=True):
            mark, color, width = ("✓ right", GREY, 0.8) if guess == truth else ("✗ wrong", VERMILION, 3)
            tile.set_title(f"{line}\n{mark}, {remark}", color=INK if guess == truth else color)
            tile.spines[:].set(color=color, linewidth=width)


@contextmanager
def _photo_grid(path: Path, photos: np.ndarray, caption_lines: int, tile_width: float = TILE) -> Iterator[list[Axes]]:
    """The axes of a near-square grid, one for each photo (uint8 [N, H, W, 3]), with room for captions above."""
    columns = max(math.ceil(math.sqrt(len(photos))), 1)
    rows = max(math.ceil(len(photos) / columns), 1)
    height = tile_width * photos.shape[1] / photos.shape[2] + 11 * caption_lines + 12
    with _picture(path, columns * (tile_width + 8) / 72, rows * height / 72) as figure:
        tiles = list(figure.subplots(rows, columns, squeeze=False).flat)
        for tile in tiles[len(photos) :]:
            tile.set_axis_off()
        for tile, photo in zip(tiles, photos, strict=False):
            tile.imshow(photo)
            tile.set(xticks=[], yticks=[])
            tile.spines[:].set(visible=True, linewidth=0.8)
        yield tiles[: len(photos)]


def _x_axis(rows: Sequence[Mapping[str, float | None]]) -> tuple[str, np.ndarray]:
    epochs = _column(rows, "epoch")
    training = epochs[np.isfinite(_column(rows, "train/loss"))]
    if np.isfinite(epochs).all() and len(np.unique(training)) == len(training):
        return "epoch", epochs
    return "step", _column(rows, "global_step")


def _column(rows: Sequence[Mapping[str, float | None]], key: str) -> np.ndarray:
    values = np.array([row.get(key) for row in rows], dtype=float)  # a missing value and None become NaN
    return np.where(np.isfinite(values), values, np.nan)


def _line(panel: Axes, x: np.ndarray, y: np.ndarray, *, color: str, label: str, linestyle: str = "-") -> None:
    given = np.isfinite(x) & np.isfinite(y)
    if given.any():
        marker, width = ("o", 1.6) if given.sum() <= 30 else ("", 1.6 if given.sum() <= 200 else 0.9)
        panel.plot(x[given], y[given], linestyle, color=color, label=label, marker=marker, ms=4, lw=width)


def _finish_panel(panel: Axes, name: str, unit: str) -> None:
    # Room for the legend, of three in a row.
    panel.set_title(name, pad=20 if len(panel.get_legend_handles_labels()[1]) <= 3 else 36)
    panel.set_xlabel(unit)
    panel.grid(True)
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.lines:
        # Above the panel it hides no curve; outside the layout it does not push the neighbours away.
        panel.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.97), ncols=3).set_in_layout(False)
    else:
        panel.set(xticks=[], yticks=[])
        panel.text(0.5, 0.5, "no values", ha="center", color=GREY, transform=panel.transAxes)


def _pooled_shares(pairs: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
    """At most 250 cells a side, each the largest share of a block, NaN in rows without photos; the side of a block."""
    truth, guess, photos = pairs.T
    block = math.ceil(classes / MAX_CELLS)
    of_class = np.bincount(truth, photos, minlength=classes)
    shares = np.zeros((math.ceil(classes / block),) * 2)
    np.maximum.at(shares, (truth // block, guess // block), photos / of_class[truth])
    of_row = np.bincount(np.arange(classes) // block, of_class)
    shares[of_row == 0] = np.nan
    return shares, block


def _print_counts(axes: Axes, pairs: np.ndarray, shares: np.ndarray, cell: float) -> None:
    counts = {(row, column): number for row, column, number in pairs.tolist()}
    size = min(10, cell * 0.85 / (0.65 * len(str(max(counts.values(), default=0)))))
    for (row, column), share in np.ndenumerate(shares):
        number = counts.get((row, column), 0)
        color = "white" if share > 0.5 else INK if number else GREY
        axes.text(column, row, str(number), ha="center", va="center_baseline", size=size, color=color)


def _commonest_confusions(pairs: np.ndarray, classes: Sequence[str]) -> str:
    errors = pairs[pairs[:, 0] != pairs[:, 1]]
    lines = ["commonest confusions: photos, true → predicted", ""]
    for truth, guess, number in errors[np.argsort(-errors[:, 2], kind="stable")[:25]]:
        lines.append(f"{number:,}   {_shortened(classes[truth], NAME)} → {_shortened(classes[guess], NAME)}")
    return "\n".join(lines)


def _clean(name: str) -> str:
    """One line of drawable characters, without blanks at its ends."""
    return " ".join(printable(name).split())


@contextmanager
def _boxes_for_missing_glyphs() -> Iterator[None]:
    """A character that no font here has becomes a box; a warning for each would bury the run's own lines."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _width(text: str) -> float:
    with _boxes_for_missing_glyphs():
        return text_to_path.get_text_width_height_descent(text, FONT, ismath=False)[0]  # points


def _shortened(name: str, room: float) -> str:
    """`name`, cut in its middle to fit `room` points: kindred classes often differ at the end only."""
    name = text = _clean(name)
    kept = len(name)
    while (width := _width(text)) > room and kept > 2:
        kept = min(kept - 1, int(kept * room / width) + 2)
        text = f"{name[: kept - kept // 3]}…{name[len(name) - kept // 3 :]}"
    return text
