"""A trained model and any files: one way from a file to the network's answer, whoever asks.

What is done to a photo stands in the run's `model.json`. The scan's inspection of a file, the
plan's central view and the engines do it, as in an evaluation: the same pixels.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pipelines.data.dataset import Split
from pipelines.data.decode import inspect_at, pixels_of_file, split_of, undecodable, views_of_sound
from pipelines.data.engines.base import Engine
from pipelines.data.engines.factory import make_engine
from pipelines.data.engines.pillow import network_input
from pipelines.data.headers import FAULTS
from pipelines.data.layout import Findings, photos_below
from pipelines.data.plan import Views
from pipelines.data.preprocess import Preprocess
from pipelines.distributed.hardware import cpu_cores
from pipelines.errors import UserError
from pipelines.files import file_digest
from pipelines.model.gradcam import GradCam
from pipelines.model.network import TransferModel, restore_model
from pipelines.model.weights import read_run_weights
from pipelines.run.resume import spelled
from pipelines.run_files import Unsure, check_preprocessing, read_description
from pipelines.text import listed, printable
from pipelines.training.calibration import unsure_for

import numpy as np
import torch

_PREFETCH = 2  # batches that are decoded while the network works on another


@dataclass(frozen=True)
class Answer:
    """What a model says of one file: logits over the temperature, float32 [classes]; or None and `error`, why there is
    no picture in it."""

    path: str
    logits: np.ndarray | None
    error: str = ""

    def ranking(self, classes: Sequence[str]) -> list[tuple[str, float]]:
        """All classes with their softmax probabilities, the likeliest first; [] where there is no picture."""
        if self.logits is None:
            return []
        odds = np.exp(self.logits.astype(np.float64) - self.logits.max())
        order = np.argsort(-self.logits, kind="stable")
        return [(classes[label], float(odds[label] / odds.sum())) for label in order]


class Classifier(Protocol):
    """A trained model of `classes`, printable names, with the preprocessing that it was trained for."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def test_flips(self) -> bool:
        """Whether an answer is the mean of a photo's logits and its mirror image's."""
        ...

    def classify(self, paths: Sequence[str]) -> Iterator[Answer]:
        """One answer for each file, in order. No file raises an error. Threads may ask at the same time."""
        ...

    @property
    def takes_whole(self) -> bool:
        """Whether `logits_of` takes whole photos; else the squares that the network sees."""
        ...

    def logits_of(self, pixels: np.ndarray) -> np.ndarray:
        """The last step alone, of what `pixels_of_file` gives, uint8 [H, W, 3] -> float32 [classes]."""
        ...


@dataclass(frozen=True)
class ViewClassifier:
    """A network behind an engine: a million files stream through, `batch_size` at a time.

    network: float32 [n, 3, image_size, image_size], normalised, on `device` -> logits, float32 [n, classes].
    model: PyTorch's, where `network` asks it.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    network: Callable[[torch.Tensor], np.ndarray]
    device: torch.device
    engine: str
    batch_size: int
    threads: int
    test_flips: bool = False
    model: TransferModel | None = None

    def classify(self, paths: Sequence[str]) -> Iterator[Answer]:
        """See `Classifier`."""
        if not paths:
            return
        split, chosen = split_of(paths, self.preprocess), self.preprocess
        engine = make_engine(
            self.engine,
            split,
            micro_batch=min(self.batch_size, len(paths)),
            device=self.device,
            threads=self.threads,
            mean=chosen.mean,
            std=chosen.std,
        )
        try:
            submitted = self._submitted(split, engine)
            ahead = deque(islice(submitted, 1 + _PREFETCH))
            while ahead:
                indices, views = ahead.popleft()
                errors = {index: FAULTS[split.faults[index]] for index in indices if split.faults[index]}
                logits: Iterator[np.ndarray] = iter(())
                if len(views):
                    pixels = engine.fetch()
                    logits = iter(self.network(pixels.images) if len(pixels.images) else ())
                    for position, reason in pixels.failed.items():
                        errors[int(views.indices[position])] = undecodable(reason)
                for index in indices:
                    error = errors.get(index, "")
                    yield Answer(paths[index], None, error) if error else _answer(paths[index], next(logits))
                ahead.extend(islice(submitted, 1))
        finally:
            engine.close()

    @property
    def takes_whole(self) -> bool:
        return False

    def logits_of(self, pixels: np.ndarray) -> np.ndarray:
        """See `Classifier`."""
        return self.network(self.images_of(pixels[None]))[0]

    def images_of(self, squares: np.ndarray) -> torch.Tensor:
        """uint8 [n, image_size, image_size, 3] -> what the network takes."""
        return network_input(squares, self.preprocess.mean, self.preprocess.std, self.device)

    def _submitted(self, split: Split, engine: Engine) -> Iterator[tuple[range, Views]]:
        with ThreadPoolExecutor(min(32, 4 * cpu_cores(), self.batch_size)) as pool:
            for first in range(0, len(split), self.batch_size):
                indices = range(first, min(first + self.batch_size, len(split)))
                list(pool.map(lambda index: inspect_at(split, index), indices))
                views = views_of_sound(split, self.preprocess, indices)
                if len(views):
                    engine.submit(views)
                yield indices, views


@dataclass(frozen=True)
class PictureClassifier:
    """A graph that resizes, crops and normalises by itself.

    graph: uint8 [1, H, W, 3], an upright RGB picture of any size -> logits, float32 [1, classes].
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    graph: Callable[[np.ndarray], np.ndarray]
    test_flips: bool = False

    @property
    def takes_whole(self) -> bool:
        return True

    def classify(self, paths: Sequence[str]) -> Iterator[Answer]:
        """See `Classifier`."""
        for path in paths:
            yield answer_of(self, path, pixels_of_file(path, self.preprocess, whole=True))

    def logits_of(self, pixels: np.ndarray) -> np.ndarray:
        """See `Classifier`."""
        return self.graph(pixels[None])[0]


def open_run(
    run: Path,
    device: torch.device,
    *,
    engine: str = "pillow",
    batch_size: int = 1,
    threads: int = 1,
    test_flips: bool | None = None,
) -> ViewClassifier:
    """The best weights of a run folder, through PyTorch. engine: of `factory.ENGINES`, with `threads` decoding threads.

    test_flips: None for the run's own setting. UserError where `best.pt` or `model.json` is missing or damaged.
    """
    description = read_description(run, "run")
    weights = read_run_weights(run, description["arch"], "run")
    flips = description["test_flips"] if test_flips is None else test_flips
    answering: Any = {"test_flips": flips, "temperature": description["temperature"]}
    model = restore_model(description["arch"], weights, **answering).to(device).for_evaluation()

    def network(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model.mean_logits(model.view_features(images)).cpu().numpy()

    preprocess = read_preprocess(description, str(run / "model.json"))
    classes = tuple(map(printable, description["classes"]))
    return ViewClassifier(classes, preprocess, network, device, engine, batch_size, threads, flips, model)


def explainer(classifier: Classifier) -> Callable[[np.ndarray, Answer], np.ndarray]:
    """What says where an answer comes from: the square that the network sees of a photo, uint8 [image_size, image_size,
    3], and the answer to it -> the heat map of its class, float32 [h, w], as `GradCam` gives it. Threads may ask at the
    same time. UserError where the network has no map to show, or is none of PyTorch's.
    """
    if not isinstance(classifier, ViewClassifier) or classifier.model is None:
        raise UserError("--explain: an ONNX graph has no gradients: it takes PyTorch's weights")
    cam = GradCam(classifier.model.network, classifier.preprocess.image_size, test_flips=classifier.test_flips)

    def explain(square: np.ndarray, answer: Answer) -> np.ndarray:
        assert answer.logits is not None, "there is no picture in this file"
        label = torch.tensor([answer.logits.argmax()], device=classifier.device)
        return cam(classifier.images_of(square[None]), label)[0]

    return explain


def unsure_below(run: Path, wanted: float | None, *, test_flips: bool) -> Unsure | None:
    """Below which confidence an answer is unsure, so that the others are as often right as `wanted`, of UNSURE_FOR, as
    the run's validation photos say. UserError where they do not, or were answered otherwise; None without `wanted`.

    test_flips: whether answers are of both views, which the run's own setting says for its thresholds.
    """
    if wanted is None:
        return None
    description = read_description(run, "run")
    if test_flips != description["test_flips"]:
        own, here = map(spelled, (description["test_flips"], test_flips))
        raise UserError(
            f"--unsure-for: the thresholds of {run} are of answers with test_flips {own}, and these are with {here}: "
            "leave --test-flips out, of export.py too"
        )
    if found := unsure_for(description, wanted):
        return found
    if not description["calibration"]:
        raise UserError(
            f"--unsure-for: {run / 'model.json'} has no thresholds: it is of an earlier version, or an average"
        )
    there = listed([f"{each['wanted']:g}" for each in description["unsure"]]) or "none"
    raise UserError(f"--unsure-for {wanted:g}: the surest answers to the validation photos are not; there is: {there}")


def open_onnx(file: Path, *, threads: int = 1, made_of: Path | None = None) -> Classifier:
    """A `model.onnx` that deploy/export.py made, on the CPU, with `threads` threads. UserError where it is not one.

    made_of: weights; UserError where they are there and it was made of others.
    """
    onnxruntime = import_extra("onnxruntime")
    if not file.exists():
        raise UserError(f"{file} does not exist: make it with `python deploy/export.py {file.parent.parent}`")
    onnxruntime.disable_telemetry_events()  # of its builds for Windows; for the others see pipelines/__init__.py
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # it would keep what the largest photo needed
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map
        classes, preprocess = tuple(json.loads(facts["classes"])), json.loads(facts["preprocess"])
        flips = json.loads(facts.get("test_flips", "false")) is True  # by itself; older graphs never do
    except Exception as error:  # onnxruntime's own kinds of error derive from Exception alone
        raise UserError(f"{file}: not a model that deploy/export.py made ({printable(error)[:160]})") from None
    if made_of and made_of.exists():
        digest = facts.get("weights_digest")
        # Of a graph without a digest the time must do, which copies may lose.
        is_old = digest != file_digest(made_of) if digest else file.stat().st_mtime < made_of.stat().st_mtime
        if is_old:
            again = printable(f"python deploy/export.py {file.parent.parent}")
            raise UserError(f"{printable(file)} was made of other weights than {made_of.name}: make it anew, `{again}`")
    name = session.get_inputs()[0].name

    def graph(inputs: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {name: inputs})[0]

    chosen = read_preprocess(preprocess, str(file))
    if name == "pictures":
        return PictureClassifier(classes, chosen, graph, flips)
    return ViewClassifier(
        classes, chosen, lambda images: graph(images.contiguous().numpy()), torch.device("cpu"), "pillow", 1, 1, flips
    )


def read_preprocess(description: Mapping[str, Any], source: str) -> Preprocess:
    """What is done to a photo, as a `model.json` says it. UserError where something is missing or wrong."""
    found = check_preprocessing(description, source)
    (r, g, b), (std_r, std_g, std_b) = found["mean"], found["std"]
    return Preprocess(
        *(found["resize"], found["image_size"], (r, g, b), (std_r, std_g, std_b)),
        transparency=found["transparency"],
        crop_mode=found["crop_mode"],
        shrink=found["shrink"],
    )


def find_photos(given: Sequence[str]) -> list[str]:
    """The files that are given, and the pictures in the folders that are given, by their endings, at any depth.

    Those of formats that are not read are among them, for their answers to say so. Hidden files and the like are not.
    UserError where a folder cannot be read or there is no photo in it. A file that is missing is told by its answer.
    """
    paths = []
    for path in given:
        if os.path.isdir(path):
            try:
                found = photos_below(path, Findings(), unread=True)
            except OSError as error:
                raise UserError(f"{printable(error.filename or path)}: cannot be read ({error.strerror})") from None
            if not found:
                raise UserError(f"{printable(path)}: no photos in this folder")
            paths += found
        else:
            paths.append(path)
    return paths


def import_extra(name: str) -> Any:
    """A library of the optional dependencies `deploy`. UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"{name} is not installed: start with `uv run --extra deploy ...`, or pip install -e '.[deploy]'"
        ) from None


def answer_of(classifier: Classifier, path: str, pixels: np.ndarray | str) -> Answer:
    """What `pixels_of_file` found, through the network."""
    return Answer(path, None, pixels) if isinstance(pixels, str) else _answer(path, classifier.logits_of(pixels))


def _answer(path: str, logits: np.ndarray) -> Answer:
    """Of a network that has diverged there is no largest logit."""
    finite = bool(np.isfinite(logits).all())
    return Answer(path, logits) if finite else Answer(path, None, "gets no finite answer from the network")
