"""The page of a run, `report.html` in its folder: what a person would show a colleague, in one file.

    python -m pipelines.report runs/NAME      # writes runs/NAME/report.html anew, as a training does at its end

It is made of the run's folder alone, and of its photos as far as they are there, and has nothing from outside: no
script, no font, no address. The most that it can come to is MOST_BYTES.
"""

import base64
import html
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import SCHEMA, ScriptParser, parse_config
from pipelines.data.decode import pixels_of_file
from pipelines.data.known_photos import kept_counts
from pipelines.data.layout import folder_of_csv
from pipelines.distributed.exits import run_script
from pipelines.errors import MachineError, UserError
from pipelines.files import ROOT, atomic_write, begins_with, check_replaceable
from pipelines.inference import read_preprocess
from pipelines.run.folder import RunFolder
from pipelines.run.predictions import Predictions, predictions_of, read_predictions, source_of, source_of_run
from pipelines.run.resume import spelled
from pipelines.run_files import Description, read_description, read_run_config
from pipelines.text import counted, listed, printable
from pipelines.text import spelled as name_in_files
from pipelines.training.calibration import calibration_line
from pipelines.training.evaluation import BEST_BY, confusion_pairs, wilson_interval

import numpy as np
from PIL import Image

MOST_BYTES = 2 << 20
_PAGE = Path(__file__).with_name("report.html")
_SECONDS = 5.0  # for all pictures: a training ends, whatever the photos and their disk are like
_SIDE, _LARGEST = 160, 20_000  # pixels of a picture's side; bytes of it, which no photo of that size comes to
_WORST, _EXAMPLES = 12, 12
_LARGEST_FIGURE = 200_000  # bytes of a figure of the run's
_MATRIX, _CLASSES, _CONFUSIONS = 20, 60, 20  # classes whose matrix is shown; rows of the other two tables
_LARGEST_ANSWERS = 32 << 20  # bytes of predictions.csv, some 200,000 photos
_THRESHOLDS = 20
_POINTS = 300  # of a curve
_LONGEST = 120  # characters of a name
_NOT_SHOWN = {"run", "runs", "overwrite", "prepare"}


def main(arguments: list[str]) -> None:
    """Writes the page. Raises UserError where there is no trained run, or its files are damaged."""
    parser = ScriptParser("python -m pipelines.report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    folder = parser.parse_args(arguments).run
    if not (folder / "model.json").is_file():
        raise UserError(f"{folder}: no run folder with a model.json (trained runs stand in runs/)")
    write_page(folder)
    print(f"page: {printable(folder / 'report.html')}")


def write_page(folder: Path) -> None:
    """UserError where a file of the run is damaged, or something else is called report.html; MachineError where it
    cannot be written, as on a full disk."""
    path = folder / "report.html"
    check_replaceable(path, begins_with(_PAGE.read_text("utf-8").partition("\n")[0]))
    content = page_of(folder).encode()
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror}): make room or mend the folder") from None


def page_of(folder: Path) -> str:
    """The page's HTML. UserError where a file of the run is damaged."""
    description = read_description(folder, "report")
    rows, own = RunFolder(folder).read_metrics(), predictions_of(folder)
    fault = _why_left_out(own, folder)
    answers = read_predictions(own) if own.exists() and not fault else None
    deadline = time.monotonic() + _SECONDS

    def photo(path: str) -> str:
        address = photo_address(description, folder, path, _SIDE) if time.monotonic() < deadline else ""
        return address if len(address) <= 4 / 3 * _LARGEST else ""

    settings = asdict(read_run_config(folder)) if (folder / "config.yaml").is_file() else {}
    best_by = BEST_BY.get(str(settings.get("best_by")), "val/top1")
    parts = [
        *_head(folder, description),
        *_scores(description, answers),
        *_curves(rows, best_by),
        *_calibration(folder, description),
        *_classes(folder, description, answers),
        *([f'<p class="quiet">{own.name} is {fault}: no recall, confusions and photos.</p>'] if fault else []),
        *(_confusions(answers, description["classes"]) if answers and len(answers) else []),
        *(_photos(answers, description["classes"], photo) if answers and len(answers) else []),
        *_settings(settings),
        *_loading(folder, description),
    ]
    name = _text(folder.resolve().name)  # last, as it may be BODY
    return _PAGE.read_text("utf-8").replace("BODY", "\n".join(parts), 1).replace("TITLE", name, 1)


def _why_left_out(answers: Path, folder: Path) -> str:
    """ "" where the file is not there, or can be shown."""
    if not answers.exists():
        return ""
    source, trained = source_of(answers), source_of_run(folder)
    if source and trained and source.is_other_than(trained):
        return "of other photos than the run's"
    return "too large for a page" if answers.stat().st_size > _LARGEST_ANSWERS else ""


def photo_address(description: Description, folder: Path, path: str, side: int) -> str:
    """A photo as the network of the run in `folder` sees it, a JPEG of side x side in a data: URL; "" where there is
    none to show.

    A run from elsewhere names what it likes: no path leads out of the folder that its model.json calls its data, but
    that may be any folder here.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not description["data"]:
        return ""
    data = Path(description["data"])
    try:
        root = data if data.is_dir() else folder_of_csv(data)
    except (OSError, UserError):
        return ""
    preprocess = read_preprocess(description, str(folder / "model.json"))
    pixels = pixels_of_file(str(root / path), preprocess, whole=False)
    if isinstance(pixels, str):
        return ""
    written = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(written, "JPEG", quality=80)
    return _address(written.getvalue(), "jpeg")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: object, longest: int = _LONGEST) -> str:
    """What stands in a page, whatever it is: a name may be any text."""
    shown = printable(value)
    return html.escape(shown if len(shown) <= longest else f"{shown[: longest - 1]}…")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(correct: int, count: int) -> str:
    low, high = wilson_interval(correct, count)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _head(folder: Path, description: Description) -> list[str]:
    versions = [f"{name} {version}" for name, version in islice(description["versions"].items(), 8)]
    classes = counted(len(description["classes"]), "class")
    network = f"{description['arch']} for {classes}"
    if description["average_of"]:
        network += f" · the mean of {listed(description['average_of'])}"
    return [
        f"<h1>{_text(folder.resolve().name)}</h1>",
        f'<p class="quiet">{_text(network, 400)} · {_text(", ".join(versions), 400)}</p>',
    ]


def _scores(description: Description, answers: Predictions | None) -> list[str]:
    """Of the best evaluation."""
    scores: Mapping[str, Any] = description["scores"]
    correct, count = scores.get("correct", 0), scores.get("count", 0)
    cards = []
    if count:
        told = f"{correct:,} of {count:,}, 95 % interval {_interval(correct, count)}"
        cards.append(("right on validation photos", _percent(correct / count), told))
    if (balanced := scores.get("val/balanced_top1")) is not None:
        cards.append(("balanced", _percent(balanced), "mean recall of the classes"))
    if (loss := scores.get("val/loss")) is not None:
        undivided = ", of logits that no temperature divides" if description["temperature"] != 1 else ""
        cards.append(("loss", f"{loss:.4f}", f"cross-entropy{undivided}"))
    if answers and len(answers):
        commonest = int(np.bincount(answers.labels).max()) / len(answers)
        cards.append(("the commonest class alone", _percent(commonest), "what always answering it would reach"))
    if not cards:
        return []
    shown = "".join(
        f'<div class="card"><p class="quiet">{name}</p><p class="big">{value}</p><p class="quiet">{told}</p></div>'
        for name, value, told in cards
    )
    note = ", of the averaged weights" if scores.get("averaged") else ""
    at = (
        f'<p class="quiet">at epoch {scores["epoch"]}{note}; these photos have chosen it</p>'
        if "epoch" in scores
        else ""
    )
    return ["<h2>Scores</h2>", f'<div class="row">{shown}</div>', at]


def _curves(rows: Sequence[Mapping[str, Any]], best_by: str) -> list[str]:
    training = [row["epoch"] for row in rows if row.get("train/loss") is not None and "epoch" in row]
    unit = "epoch" if len(set(training)) == len(training) else "global_step"
    of_average = best_by.replace("val/", "ema/")
    balanced = [("balanced", best_by, "b dashed"), ("averaged, balanced", of_average, "c dashed")]
    charts = [
        (name, [("train", f"train/{key}", "a"), ("validation", f"val/{key}", "b"), ("averaged", f"ema/{key}", "c")])
        for name, key in (("loss", "loss"), ("accuracy", "top1"))
    ]
    charts[1][1].extend(balanced if best_by != "val/top1" else [])
    drawn = []
    for name, lines in charts:
        found = [(label, kind, _points(rows, unit, key)) for label, key, kind in lines]
        found = [each for each in found if each[2]]
        if any(len(points) > 1 for *_, points in found):
            drawn.append(_chart(name, unit.replace("global_", ""), found))
    return ["<h2>Curves</h2>", f'<div class="row charts">{"".join(drawn)}</div>'] if drawn else []


def _points(rows: Iterable[Mapping[str, Any]], unit: str, key: str) -> list[tuple[float, float]]:
    pairs = [(row.get(unit), row.get(key)) for row in rows]
    found = [(float(x), float(y)) for x, y in pairs if isinstance(x, int) and isinstance(y, int | float)]
    found = [(x, y) for x, y in found if math.isfinite(y)]
    return [*found[: -1 : max(1, -(-len(found) // _POINTS))], *found[-1:]]


def _chart(name: str, unit: str, lines: Sequence[tuple[str, str, list[tuple[float, float]]]]) -> str:
    """An inline SVG under its name and legend. lines: label, class, points."""
    values = [point for *_, points in lines for point in points]
    (left, right), (low, high) = ((min(each), max(each)) for each in zip(*values, strict=True))
    parts = []

    def x(value: float) -> float:
        return 46 + 300 * (0.5 if right == left else (value - left) / (right - left))

    def y(value: float) -> float:
        return 172 - 160 * (0.5 if high == low else (value - low) / (high - low))

    for step in range(5 if high > low else 1):
        value = low + (high - low) * step / 4
        parts.append(f'<line x1="46" x2="346" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="40" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in ((left, "start"), (right, "end")):
        parts.append(f'<text x="{x(value):.1f}" y="190" text-anchor="{anchor}">{unit} {value:g}</text>')
    for _, kind, points in lines:
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if len(points) <= 30:
            parts += [f'<circle class="{kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3"/>' for at, value in points]
    legend = "".join(f'<span><i class="{kind}"></i>{label}</span>' for label, kind, _ in lines)
    drawing = f'<svg viewBox="0 0 360 196" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f'<div class="card"><p><b>{name}</b></p>{drawing}<p class="legend quiet">{legend}</p></div>'


def _calibration(folder: Path, description: Description) -> list[str]:
    """What was found of the confidences: in words, as the run's picture, and from where on answers are unsure."""
    found = description["calibration"]
    if found is None:
        return []
    parts = ["<h2>Calibration</h2>", f"<p>{_text(calibration_line(found, description['temperature']), 600)}</p>"]
    with suppress(OSError):
        picture = folder / "figures" / "calibration.png"
        has_one = picture.is_file() and picture.stat().st_size <= _LARGEST_FIGURE  # a pipe would never end
        content = picture.read_bytes() if has_one else b""
        if content.startswith(b"\x89PNG"):
            parts.append(f'<img class="wide" src="{_address(content, "png")}" alt="how often confidences are right">')
    rows = [
        [
            _percent(each["wanted"]),
            f"{each['below']:.4f}",
            f"{each['kept']:,} of {each['photos']:,}",
            f"{each['right']:,}",
        ]
        for each in description["unsure"][:_THRESHOLDS]
    ]
    heads = ["wanted of the sure answers", "unsure below", "photos kept", "of them right"]
    return [*parts, _table(heads, rows)] if rows else parts


def _classes(folder: Path, description: Description, answers: Predictions | None) -> list[str]:
    """What there is of each, and how well it is told; of many classes those that are told worst."""
    names = [*map(name_in_files, description["classes"])]
    trained = kept_counts(folder / "photos.npz").get("train", {})
    pairs = _pairs(answers, names) if answers else np.zeros((0, 3), np.int64)
    truth, guess, photos = pairs.T
    asked, told = (np.bincount(each, photos, minlength=len(names)).astype(int) for each in (truth, guess))
    is_right = truth == guess
    right = np.bincount(truth[is_right], photos[is_right], minlength=len(names)).astype(int)
    recall = np.where(asked > 0, right / np.maximum(asked, 1), 2)
    order = np.argsort(recall, kind="stable") if len(names) > _CLASSES else np.arange(len(names))
    rows = []
    for at in order[:_CLASSES].tolist():
        cells = [f"{trained[description['classes'][at]]:,}" if description["classes"][at] in trained else "-"]
        cells += [f"{asked[at]:,}", "-", "-", "-"]
        if asked[at]:
            cells[2:4] = [_percent(right[at] / asked[at]), _interval(int(right[at]), int(asked[at]))]
        if told[at]:
            cells[4] = _percent(right[at] / told[at])
        rows.append([_text(names[at]), *cells])
    heads = ["class", "training photos", "validation photos", "recall", "95 % interval", "precision"]
    total = sum(trained.values())
    about = [counted(len(names), "class"), *([f"{counted(total, 'training photo')}"] if total else [])]
    about += [counted(len(answers), "validation photo")] if answers else []
    about += [f"the {_CLASSES} of the least recall are shown"] if len(names) > _CLASSES else []
    data = f"{_text(description['data'], 300)}: " if description["data"] else ""
    return ["<h2>Data and classes</h2>", f'<p class="quiet">{data}{", ".join(about)}</p>', _table(heads, rows)]


def _pairs(answers: Predictions, names: Sequence[str]) -> np.ndarray:
    """int64 [P, 3], true class, answered class, photos, by positions in `names`."""
    places = {name: at for at, name in enumerate(names)}
    if not {*answers.classes} <= places.keys():
        raise UserError("predictions.csv: of classes that model.json does not have: it is not of this run")
    at = np.array([places[name] for name in answers.classes], np.int64)
    return confusion_pairs(at[answers.answers[:, 0]], at[answers.labels], len(names))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = " class=number") -> str:
    """heads and cells: HTML. All but the first column are numbers; kind: an attribute that makes them so."""
    head = "".join(f"<th{kind if at else ''}>{each}</th>" for at, each in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind if at else ''}>{each}</td>" for at, each in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _confusions(answers: Predictions, classes: Sequence[str]) -> list[str]:
    """The matrix, or of many classes the commonest confusions."""
    names = [*map(name_in_files, classes)]
    pairs = _pairs(answers, names)
    if len(names) > _MATRIX:
        wrong = pairs[pairs[:, 0] != pairs[:, 1]]
        wrong = wrong[np.argsort(-wrong[:, 2], kind="stable")][:_CONFUSIONS].tolist()
        rows = [[f"{_text(names[truth])} → {_text(names[guess])}", f"{photos:,}"] for truth, guess, photos in wrong]
        title = "<h2>Commonest confusions</h2>"
        return [title, _table(["true class → answer", "photos"], rows)] if rows else []
    counts = np.zeros((len(names), len(names)), np.int64)
    counts[pairs[:, 0], pairs[:, 1]] = pairs[:, 2]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{_text(name, 40)}</th>" for name in names)
    body = "".join(
        f"<tr><th>{_text(name, 40)}</th>"
        + "".join(f'<td style="--share:{share:.2f}">{count:,}</td>' for count, share in zip(*row, strict=True))
        + "</tr>"
        for name, *row in zip(names, counts.tolist(), shares.tolist(), strict=True)
    )
    matrix = f"<table><thead><tr><th>true \u2193 answer \u2192</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return ["<h2>Confusion matrix</h2>", f'<div class="card scroll matrix">{matrix}</div>']


def _photos(answers: Predictions, classes: Sequence[str], photo: Callable[[str], str]) -> list[str]:
    """The worst mistakes, then the right answers that were closest to being wrong; and photos of each class."""
    order = np.lexsort((-answers.losses, answers.right))
    worst = order[:_WORST]
    of_class = [np.flatnonzero(answers.labels == label) for label in range(len(answers.classes))]
    most = max(1, _EXAMPLES // max(1, sum(len(each) > 0 for each in of_class)))
    examples = [int(at) for each in of_class for at in each[:most]][:_EXAMPLES]
    sheets = []
    for title, chosen in (("Worst validation photos", worst.tolist()), ("Some validation photos", examples)):
        figures = "".join(_figure(answers, at, photo(answers.paths[at])) for at in chosen)
        sheets += [f"<h2>{title}</h2>", f'<div class="photos">{figures}</div>']
    return sheets


def _figure(answers: Predictions, at: int, address: str) -> str:
    label, answer = answers.classes[answers.labels[at]], answers.classes[answers.answers[at, 0]]
    sureness = f"{answers.probabilities[at, 0]:.2f}"
    is_right = label == answer
    told = f"\u2713 {_text(answer)} {sureness}" if is_right else f"\u2717 {_text(answer)} {sureness}"
    image = f'<img src="{address}" alt="">' if address else '<span class="none">no picture</span>'
    kind = "" if is_right else ' class="wrong"'
    caption = f"<b>{_text(label)}</b><br><span{kind}>{told}</span><br>"
    caption += f'<span class="quiet">{_text(answers.paths[at])}</span>'
    return f'<figure class="card">{image}<figcaption>{caption}</figcaption></figure>'


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Those that differ from the recipe that most of them agree with: a run keeps its settings, not its recipe."""
    if not settings:
        return []
    recipe, changed = min(
        ((name, _differences(settings, values)) for name, values in _recipes().items()), key=lambda each: len(each[1])
    )
    if not changed:
        return ["<h2>Settings</h2>", f"<p>All as {recipe} has them.</p>"]
    rows = [[_text(key), _text(spelled(value), 300), _text(spelled(was), 300)] for key, (value, was) in changed.items()]
    note = f'<p class="quiet">Compared with {recipe}, which the fewest differ from.</p>'
    heads = ["setting", "here", recipe]
    return [f"<h2>Settings that differ from {recipe}</h2>", _table(heads, rows, kind=""), note]


def _recipes() -> dict[str, dict[str, Any]]:
    """The settings of the recipes beside train.py, and what holds without a recipe."""
    found = {}
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        with suppress(UserError):  # as a sweep is none
            found[f"configs/{file.name}"] = asdict(parse_config([f"--config={file}"])[0])
    return found | {"the defaults of docs/settings.md": {key: value["default"] for key, value in SCHEMA.items()}}


def _differences(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By setting its value in the two."""
    keys = [key for key in settings if key in SCHEMA and key not in _NOT_SHOWN]
    return {key: (settings[key], others[key]) for key in keys if settings[key] != others[key]}


def _loading(folder: Path, description: Description) -> list[str]:
    """As PyTorch's tutorial does, for any network: a head of so many classes has the name and the shape of its own."""
    lines = [
        "import torch, torchvision",
        "",
        f"model = torchvision.models.{description['arch']}(num_classes={len(description['classes'])})",
        f"model.load_state_dict(torch.load({str(folder / 'best.pt')!r}, map_location='cpu'))",
    ]
    note = "<code>model.json</code> beside it has the classes in order, sizes, mean and standard deviation."
    code = html.escape("\n".join(printable(line) for line in lines))
    return ["<h2>Load it</h2>", f'<div class="card"><pre>{code}</pre></div>', f'<p class="quiet">{note}</p>']


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
