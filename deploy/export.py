"""Writes a trained run for use elsewhere: RUN/export/ with model.onnx, model.safetensors and a model card.

    python deploy/export.py runs/NAME                    # checked on the run's own validation photos
    python deploy/export.py runs/NAME --photos photos/   # where those are not on this machine
    python deploy/export.py runs/NAME --graph normalised # the network alone

The graph takes uint8 pictures of any size and resizes, crops and normalises them itself. On the spot onnxruntime must
find the same class as PyTorch in all photos but a share of --tolerance, or nothing is written.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed
    import pipelines.early_interrupt  # noqa: F401

from pipelines.cache import cache_folder
from pipelines.config import GROUPS, SCHEMA, Config, ScriptParser
from pipelines.data.dataset import Dataset, load_dataset, map_labels, scan_dataset
from pipelines.data.preprocess import Preprocess
from pipelines.distributed.exits import run_script
from pipelines.distributed.hardware import cpu_cores
from pipelines.errors import MachineError, UserError
from pipelines.files import file_digest
from pipelines.inference import Classifier, find_photos, import_extra, open_onnx, open_run
from pipelines.model.network import restore_model
from pipelines.model.weights import Weights, read_run_weights
from pipelines.run import figures
from pipelines.run.folder import refuse_links
from pipelines.run.resume import spelled
from pipelines.run_files import read_description, read_run_config, what_auto_came_to
from pipelines.text import counted, listed, printable
from pipelines.training.evaluation import confusion_pairs, wilson_interval

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

_OPSET = 18  # the first whose Resize knows antialiasing
_TOLERANCE = 0.001  # of the photos: so many are closer to a tie than one grey level of a resized picture
_IR_VERSION = 10  # what onnxruntime reads since 1.18

# In ONNX's own notation. onnxruntime's Resize is Pillow's filter, rounded otherwise: at most one grey level apart, in a
# hundredth of the pixels of ants and bees; exclude_outside, as what lies beside a photo would count as black. N x H x W
# x 3, as its optimiser breaks a Resize between two transposes.
_CENTRE = """
    rows = Shape <start = 1, end = 2> (pictures)
    columns = Shape <start = 2, end = 3> (pictures)
    shorter = Min (rows, columns)
    wanted_rows = Mul (rows, shorter_side)
    wanted_columns = Mul (columns, shorter_side)
    resized_rows = Div (wanted_rows, shorter)
    resized_columns = Div (wanted_columns, shorter)
    sizes = Concat <axis = 0> (photos, resized_rows, resized_columns, three)
    resized = Resize <mode = "linear", antialias = 1, exclude_outside = 1> (pictures, no_roi, no_scales, sizes)
    resized_size = Concat <axis = 0> (resized_rows, resized_columns)
    surplus = Sub (resized_size, square)
    surplus_as_float = Cast <to = 1> (surplus)
    margin = Mul (surplus_as_float, half)
    whole_margin = Round (margin)
    start = Cast <to = 7> (whole_margin)
    end = Add (start, square)
    cropped = Slice (resized, start, end, rows_and_columns)"""
_OF_CENTRE = """int64[1] shorter_side = {{{resize}}}, int64[2] rows_and_columns = {{1, 2}}, float half = {{0.5}},
    """
_SQUASH = """
    sizes = Concat <axis = 0> (photos, square, three)
    cropped = Resize <mode = "linear", antialias = 1, exclude_outside = 1> (pictures, no_roi, no_scales, sizes)"""
_PREPROCESS = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
preprocess (uint8[n, height, width, 3] pictures) => (float[n, 3, {size}, {size}] normalised)
<
    int64[2] square = {{{size}, {size}}}, int64[1] three = {{3}}, float[0] no_roi = {{}}, float[0] no_scales = {{}},
    {more}float[1, 3, 1, 1] scale = {{{scale}}}, float[1, 3, 1, 1] shift = {{{shift}}}
>
{{
    photos = Shape <start = 0, end = 1> (pictures){resizing}
    channels_first = Transpose <perm = [0, 3, 1, 2]> (cropped)
    as_float = Cast <to = 1> (channels_first)
    scaled = Mul (as_float, scale)
    normalised = Add (scaled, shift)
}}
"""


class _Answering(torch.nn.Module):
    """`TransferModel.mean_logits` of a photo, and with `mirrored` its mirror image, in one graph."""

    def __init__(self, network: torch.nn.Module, *, mirrored: bool, temperature: float) -> None:
        super().__init__()
        self.network, self.mirrored, self.temperature = network, mirrored, temperature

    def forward(self, normalised: torch.Tensor) -> torch.Tensor:
        logits = self.network(normalised)
        logits = (logits + self.network(normalised.flip(-1))) / 2 if self.mirrored else logits
        return logits / self.temperature if self.temperature != 1 else logits


@dataclass(frozen=True)
class Check:
    """How a graph's answers compare with PyTorch's. differing: photos with another top-1 class. largest: difference of
    a logit. predicted: PyTorch's class of each photo, int64 [photos], -1 where there is no picture. margin: by how much
    PyTorch's confidence in its class exceeds that in the graph's, at most; 0 where none differ.
    """

    count: int
    differing: list[str]
    largest: float
    predicted: np.ndarray
    margin: float = 0.0


def main(arguments: list[str]) -> None:
    """One export. Raises UserError or MachineError."""
    options = _parse(arguments)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(name)
    run = options.run
    refuse_links(run, "export")
    description, config = read_description(run, "run"), _read_config(run)
    best = run / "best.pt"
    digest = file_digest(best) if best.is_file() else ""  # before they are read: a training may go on
    weights = read_run_weights(run, description["arch"], "run")
    device = torch.device("cpu")
    reference = open_run(run, device, batch_size=8, threads=cpu_cores(), test_flips=options.test_flips)
    try:
        dataset = _own_dataset(description, config)
    except UserError:
        if not options.photos:
            raise
        dataset = None  # a folder of that name that holds others, or nothing
    paths, labels = _photos(options, dataset, weights.classes or ())
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=run) as temporary:
            folder = Path(temporary)
            network = _network_graph(description, weights, options.opset, reference.test_flips)
            properties = _properties(reference, description["temperature"]) | {"weights_digest": digest}
            graph, check = _export_checked(network, reference, properties, paths, folder / "model.onnx", options)
            tensors = safetensors.torch.save(dict(weights.state or {}), properties | {"format": "pt"})
            (folder / "model.safetensors").write_bytes(tensors)  # by its own hand the file is for its owner alone
            has_matrix = False
            if labels is not None:
                read, names = check.predicted >= 0, reference.classes
                pairs = confusion_pairs(check.predicted[read], labels[read], len(names))
                picture = folder / "confusion_matrix.png"
                has_matrix = figures.attempt(picture.name, lambda: figures.save_confusion_matrix(picture, pairs, names))
            facts = _facts(run, description, config, dataset, reference)
            card = _model_card(facts, graph, check, options.opset, has_matrix=has_matrix)
            (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
            (run / "export").mkdir(exist_ok=True)
            for file in folder.iterdir():
                os.replace(file, run / "export" / file.name)
            if not has_matrix:  # that of an earlier export is of other photos
                (run / "export" / "confusion_matrix.png").unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{run}: cannot be written to ({error.strerror or error})") from None
    print(printable(f"{run / 'export'}: {', '.join(sorted(file.name for file in (run / 'export').iterdir()))}"))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("export.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with best.pt and model.json")
    parser.add_argument("--photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="check the graph on these")
    parser.add_argument(
        "--graph",
        choices=("pictures", "normalised"),
        help="what it takes (default: pictures, or normalised where those differ in more than --tolerance)",
    )
    parser.add_test_flips()
    parser.add_argument("--opset", type=int, default=_OPSET, help=f"of ONNX, {_OPSET} or higher (default: {_OPSET})")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        metavar="SHARE",
        help="of the photos, that may get another class than from PyTorch, as close ties do "
        f"(default: {_TOLERANCE}: 50 in 50,000, none in 999)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance <= 1:
        raise UserError(f"--tolerance {options.tolerance:g}: give a share, from 0 to 1")
    return options


def _read_config(run: Path) -> Config | None:
    """The run's settings, for the card; weights and model.json alone do for the rest."""
    return what_auto_came_to(run, read_run_config(run)) if (run / "config.yaml").exists() else None


def _own_dataset(description: Mapping[str, Any], config: Config | None) -> Dataset | None:
    """The run's own photos, where they are on this machine."""
    data = description["data"]
    if not data or not os.path.exists(data):
        return None
    chosen = [getattr(config, key, SCHEMA[key]["default"]) for key in ("val_fraction", "class_names")]
    dataset = load_dataset(scan_dataset(Path(data), cache_folder(), *chosen))
    if dataset.fingerprint != description["dataset_fingerprint"]:
        print(f"{printable(data)}: the photos have changed since the training", file=sys.stderr)
    return dataset


def _photos(
    options: argparse.Namespace, dataset: Dataset | None, classes: tuple[str, ...]
) -> tuple[list[str], np.ndarray | None]:
    """What the graph is checked on, with labels where they are the run's own validation photos."""
    if options.photos:
        return find_photos(options.photos), None
    if dataset is None or "val" not in dataset.splits:
        raise UserError(f"{options.run}: its validation photos are not on this machine: give some with --photos FOLDER")
    split = dataset.splits["val"]
    sound = np.flatnonzero(split.faults == 0)
    return [split.path(int(index)) for index in sound], map_labels(split, classes)[sound]


def _export_checked(
    network: Any,
    reference: Classifier,
    properties: Mapping[str, str],
    paths: Sequence[str],
    file: Path,
    options: argparse.Namespace,
) -> tuple[str, Check]:
    """Writes the graph; returns its input, "pictures" or "normalised", and how it did.

    Where more photos than are tolerated are so close to a tie that one grey level decides, the graph begins behind the
    preprocessing, unless one of the two was asked for.
    """
    graphs = [options.graph] if options.graph else ["pictures", "normalised"]
    for graph in graphs:
        _write_graph(network, graph, reference.preprocess, properties, options.opset, file)
        check = compare(reference, open_onnx(file, threads=cpu_cores()), paths)
        print(
            f"model.onnx, from {graph}: the same top-1 as PyTorch on {check.count - len(check.differing)} of "
            f"{counted(check.count, 'photo')}{', each with its mirror image' if reference.test_flips else ''}, largest "
            f"difference of a logit {check.largest:.2g}",
            flush=True,
        )
        if not check.count:
            raise UserError("none of the photos can be read, so the graph cannot be checked: give others with --photos")
        share, named = len(check.differing) / check.count, ", ".join(printable(path) for path in check.differing[:3])
        if check.differing:
            print(
                f"{len(check.differing)} ({share:.2g} of them) differ, in confidence by {check.margin:.2g} at most: "
                f"{named}{', ...' if len(check.differing) > 3 else ''}",
                flush=True,
            )
        if share <= options.tolerance:
            return graph, check
    raise MachineError(
        f"onnxruntime does not find PyTorch's class in {counted(len(check.differing), 'photo')} ({named}, ...): where "
        f"these are close ties, --tolerance {_rounded_up(share):g} takes the graph from {graph} all the same"
    )


def _rounded_up(share: float) -> float:
    """To two digits."""
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, round(math.ceil(share / step) * step, 12))


def compare(reference: Classifier, other: Classifier, paths: Sequence[str]) -> Check:
    """Both models' answers for the same files."""
    count, differing, largest, margin = 0, [], 0.0, 0.0
    predicted = np.full(len(paths), -1, np.int64)
    answers = zip(reference.classify(paths), other.classify(paths), strict=True)
    for index, (ours, theirs) in enumerate(tqdm(answers, "check", len(paths), leave=False, disable=None)):
        if ours.logits is None or theirs.logits is None:
            print(f"not checked: {printable(ours.path)} ({ours.error or theirs.error})", file=sys.stderr)
            continue
        count += 1
        predicted[index] = ours.logits.argmax()
        largest = max(largest, float(np.abs(ours.logits - theirs.logits).max()))
        if (other_class := theirs.logits.argmax()) != predicted[index]:
            differing.append(ours.path)
            odds = np.exp(ours.logits.astype(np.float64) - ours.logits.max())
            margin = max(margin, float((1 - odds[other_class]) / odds.sum()))
    return Check(count, differing, largest, predicted, margin)


def _network_graph(
    description: Mapping[str, Any], weights: Weights, opset: int = _OPSET, test_flips: bool = False
) -> Any:
    """The ONNX model from the normalised tensor to the logits, for any number of photos. UserError of a wrong opset."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not _OPSET <= opset <= newest:
        raise UserError(
            f"--opset {opset}: this version of onnx knows {newest} as the highest, and {_OPSET} is the least"
        )
    answering: Any = {"mirrored": test_flips, "temperature": description["temperature"]}
    network = _Answering(restore_model(description["arch"], weights).network, **answering)
    network = network.eval().to(memory_format=torch.contiguous_format)
    size = description["image_size"]
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=["normalised"],
        output_names=["logits"],
        opset_version=opset,
        verbose=False,
    )
    assert program is not None  # which it is where a file is written
    model = program.model_proto
    made = model.opset_import[0].version
    if made != opset:
        raise UserError(f"--opset {opset}: PyTorch's exporter made {made} of it; --opset {made} or {_OPSET} will do")
    model.ir_version = _ir_version(opset)
    for node in model.graph.node:
        del node.metadata_props[:]  # traces with this machine's paths
    return model


def _ir_version(opset: int) -> int:
    import onnx

    return max(_IR_VERSION, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def _write_graph(
    network: Any, graph: str, chosen: Preprocess, properties: Mapping[str, str], opset: int, file: Path
) -> None:
    import onnx

    model = network
    if graph == "pictures":
        model = onnx.compose.merge_models(
            onnx.parser.parse_model(_preprocess_text(chosen, opset)), network, [("normalised", "normalised")]
        )
    onnx.helper.set_model_props(model, dict(properties))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _preprocess_text(chosen: Preprocess, opset: int) -> str:
    mean, std = np.asarray(chosen.mean, np.float32), np.asarray(chosen.std, np.float32)
    is_central = chosen.crop_mode == "center"
    return _PREPROCESS.format(
        ir=_ir_version(opset),
        opset=opset,
        size=chosen.image_size,
        more=_OF_CENTRE.format(resize=chosen.resize) if is_central else "",
        resizing=_CENTRE if is_central else _SQUASH,
        scale=_listed(1 / (255 * std)),  # the engines' own arithmetic: x * scale + shift
        shift=_listed(-mean / std),
    )


def _listed(values: np.ndarray) -> str:
    return ", ".join(repr(float(value)) for value in values)


def _properties(reference: Classifier, temperature: float) -> dict[str, str]:
    """What a file of weights must carry with it, as JSON."""
    facts: dict[str, Any] = {"classes": list(reference.classes), "preprocess": asdict(reference.preprocess)}
    facts |= {"test_flips": reference.test_flips, "temperature": temperature}
    return {key: json.dumps(value) for key, value in facts.items()}


_CARD = """---
library_name: torchvision
pipeline_tag: image-classification
tags: [image-classification, {arch}]
---

# {name}

A {arch} that tells {count} classes apart: {classes}.{averaged}

## Scores

{scores}

{picture}

{confidence}

## Intended use

Photos of the kind that it was trained on, with one of these classes in them. It gives every photo one of its classes, a
photo of something else too, and its confidence is then no warning: have a person look where a mistake would matter. It
was not examined for biases in its data.

## Data

{data}

## Recipe

```yaml
{recipe}
```

{versions}

## Use

The photo upright (by its EXIF orientation) and RGB, what is transparent {transparency}; {geometry};
then minus {mean}, divided by {std}, on the 0..1 scale.

```python
import torchvision
from safetensors.torch import load_file

model = torchvision.models.{arch}(num_classes={count})
model.load_state_dict(load_file("model.safetensors"))
model.eval()
```

```python
import torch
from PIL import Image, ImageOps
from torchvision import transforms

classes = {class_list}
preprocess = transforms.Compose([
    {transforms},
    transforms.ToTensor(),
    transforms.Normalize({mean}, {std}),
])
photo = ImageOps.exif_transpose(Image.open("photo.jpg"))
{composing}photo = photo.convert("RGB"){unshrunk}
with torch.inference_mode():
    {logits}{over_temperature}
print(classes[logits.argmax()])
```

`model.onnx`, opset {opset}, {graph}
{mirrored}Checked with onnxruntime on the CPU: the same top-1 as PyTorch on {agreed} of {checked}, largest
difference of a logit {largest:.2g}. `classes`, `preprocess`, `test_flips` and `temperature` stand in its metadata, as
JSON.

From 1.29 on onnxruntime sends events to its makers unless `ORT_DISABLE_TELEMETRY=1` is set before it is loaded.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {{{feed}}})[0]
print(classes[logits.argmax()])
```
"""
_GRAPHS = {
    "pictures": (
        "takes uint8 pictures, N x H x W x 3, upright and RGB, of any size (N of one size in a batch),\nand resizes, "
        "crops and normalises them itself. A runtime without antialiasing `Resize` can begin at `normalised`.",
        '"pictures": np.asarray(photo)[None]',
    ),
    "normalised": (
        "takes what `preprocess` gives, float32, N x 3 x H x W.",
        '"normalised": preprocess(photo)[None].numpy()',
    ),
}


def _facts(
    run: Path,
    description: Mapping[str, Any],
    config: Config | None,
    dataset: Dataset | None,
    reference: Classifier,
) -> dict[str, Any]:
    """What the card says of the run."""
    preprocess = reference.preprocess
    classes = [printable(label) for label in description["classes"]]
    return {
        "name": printable(run.resolve().name),
        "arch": description["arch"],
        "count": len(classes),
        "classes": ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else ""),
        "class_list": repr(classes),
        "averaged": _averaged(description["average_of"]),
        "scores": _scores(description["scores"], test_flips=description["test_flips"]),
        "data": "\n".join(_data(description, dataset)),
        "recipe": _recipe(config),
        "versions": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
        "transparency": "ignored" if preprocess.transparency == "ignored" else f"on {preprocess.transparency}",
        "composing": ""
        if preprocess.transparency == "ignored"
        else "if photo.has_transparency_data:\n"
        f'    ground = Image.new("RGBA", photo.size, "{preprocess.transparency}")\n'
        '    photo = Image.alpha_composite(ground, photo.convert("RGBA"))\n',
        "unshrunk": "  # not shrunk first, as above, nor is it in the graph: answers differ a little"
        if preprocess.shrink
        else "",
        **_geometry(preprocess),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "confidence": _confidence(description, test_flips=reference.test_flips),
        "mirrored": "Its logits are the mean of a picture's and its mirror image's (`test_flips`).\n"
        if reference.test_flips
        else "",
        "logits": "view = preprocess(photo)[None]\n    logits = (model(view) + model(view.flip(-1))) / 2"
        if reference.test_flips
        else "logits = model(preprocess(photo)[None])",
        "over_temperature": f" / {temperature:g}" if (temperature := description["temperature"]) != 1 else "",
    }


def _geometry(preprocess: Preprocess) -> dict[str, str]:
    """How a photo becomes a square: in words, and in torchvision's."""
    size, resize, shrink = preprocess.image_size, preprocess.resize, preprocess.shrink
    first = (
        f"a shorter side above {shrink} pixels\nto {shrink}, bicubic, saved as JPEG (95, 4:4:4) and read; "
        if shrink
        else ""
    )
    if preprocess.crop_mode == "squash":
        words = f"{first}all of it squeezed into {size} x {size} pixels, bilinear\nwith antialiasing"
        return {"geometry": words, "transforms": f"transforms.Resize(({size}, {size}))"}
    words = f"{first}shorter side to {resize} pixels, bilinear with\nantialiasing; the central {size} x {size}"
    return {"geometry": words, "transforms": f"transforms.Resize({resize}),\n    transforms.CenterCrop({size})"}


def _model_card(facts: Mapping[str, Any], graph: str, check: Check, opset: int, *, has_matrix: bool) -> str:
    """README.md, in the form of a model card of the Hugging Face Hub."""
    graph_text, feed = _GRAPHS[graph]
    return _CARD.format(
        **facts,
        picture="![Confusion matrix](confusion_matrix.png)"
        if has_matrix
        else "`evaluate.py` draws a confusion matrix.",
        opset=opset,
        graph=graph_text,
        feed=feed,
        agreed=check.count - len(check.differing),
        checked=counted(check.count, "photo"),
        largest=check.largest,
    )


def _averaged(average_of: Sequence[str]) -> str:
    if not average_of:
        return ""
    return f"\n\nIts weights are a mean of trained ones, of {listed(average_of)}, and the recipe below is the first's."


def _scores(scores: Mapping[str, Any], *, test_flips: bool) -> str:
    views = "\n\nAn answer was the mean of the logits of a photo and of its mirror image." if test_flips else ""
    try:
        low, high = wilson_interval(scores["correct"], scores["count"])
        balanced = f"{scores['val/balanced_top1']:.4f}" if "val/balanced_top1" in scores else "not known"
        return (
            f"| split | top-1 | 95 % interval (Wilson) | balanced | photos | loss |\n|---|---|---|---|---|---|\n"
            f"| val | {scores['val/top1']:.4f} | {low:.3f} to {high:.3f} | {balanced} | {scores['correct']} of "
            f"{scores['count']} | {scores['val/loss']:.4f} |\n\nThe best of its training's evaluations, on photos that "
            f"chose it: a test set's are likely to be a little lower.{views}"
        )
    except KeyError:
        return "Not known: the run's `model.json` has none."


def _confidence(description: Mapping[str, Any], *, test_flips: bool) -> str:
    calibration, own = description["calibration"], description["test_flips"]
    if calibration is None or calibration["after"] is None:
        return "Confidences are the softmax of the network's logits; no temperature was fitted."
    before, after = calibration["before"], calibration["after"]
    temperature = description["temperature"]
    others = f" All this is of the run's own `test_flips: {spelled(own)}`, which the graph differs in."
    return (
        f"Confidences are the softmax of logits / {temperature:g} (Guo et al. 2017); the graph divides by itself. "
        f"The calibration error is {before['ece']:.4f} without and {after['ece']:.4f} with a temperature, on the "
        f"validation photos, each by one that was fitted on the others of {calibration['folds']} folds."
        f"{others if test_flips != own else ''}"
    )


def _data(description: Mapping[str, Any], dataset: Dataset | None) -> list[str]:
    lines = [f"`{printable(Path(description['data'] or 'unknown').name)}`"]
    lines += [f"- fingerprint {description['dataset_fingerprint'] or 'unknown'}"]
    for split in dataset.splits.values() if dataset else ():
        counts = sorted(split.class_counts().items())
        each = ", ".join(f"{printable(label)} {count}" for label, count in counts[:20])
        lines.append(f"- {printable(split.name)}: {counted(sum(count for _, count in counts), 'photo')} ({each})")
    return lines


def _recipe(config: Config | None) -> str:
    """The settings that decide what is learned. A path is named by its end: the card is made to be shown."""
    if config is None:
        return "# not known: the run has no config.yaml"
    groups = ("Images", "Model", "Training", "Optimizer")
    settings = {key: getattr(config, key) for group in groups for key in GROUPS[group]} | {"seed": config.seed}
    settings["weights"] = Path(config.weights or "imagenet, or DALITUNE_WEIGHTS").name
    settings["teacher"] = config.teacher and Path(config.teacher).name
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
