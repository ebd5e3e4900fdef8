"""The files of a run folder, read. A run may come from anywhere: each file is checked against types and ranges.

What an older version did not write is filled in with what it meant then; a newer format is refused by its number.
"""

import json
import math
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pipelines.config import Arch, Config, ImageSize, Resize, Shrink, Transparency, config_of, parse_config, read_recipe
from pipelines.errors import UserError

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict  # pydantic asks for it before Python 3.12

# A format goes up when an older version would misread the file. A key that is only added stands below, with the value
# that means what versions without it did.
CHECKPOINT_FORMAT = 1
# 2 with crop_mode squash, as older versions would cut; 3 with shrink, which they would leave out; all else is written
# as 1.
MODEL_FORMAT = 3
_ADDED_TO_MODEL = {
    "format": 1,
    "scores": {},
    "data": "",
    "dataset_fingerprint": "",
    "versions": {},
    "test_flips": False,
    "temperature": 1.0,
    "calibration": None,
    "unsure": [],
    "average_of": [],
}
_ADDED_TO_PREPROCESSING = {"transparency": "ignored", "crop_mode": "center", "shrink": None}
MEANT_BEFORE = {"transparency": "ignored"}  # settings that have another default
# Before an engine was kept, auto was Pillow on a CPU; on a GPU it is chosen again.
_ADDED_TO_CHECKPOINT: dict[str, int | str | None] = {
    "format": 1,
    "precision": None,
    "first_weights": None,
    "teacher": None,
    "settings": None,
    "engine": "pillow",
    "device": "cpu",
}
_CHECKPOINT = re.compile(r"epoch-(\d+)-step-(\d+)")
_LARGEST = 1 << 24  # bytes of a file of JSON; a line of metrics.jsonl may have a sixteenth of it

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float | None
Kind = TypeVar("Kind")


def _differ(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
    return names


def _check_scores(scores: dict[str, Any]) -> dict[str, Any]:
    whole = [scores.get(key, 0) for key in ("epoch", "correct", "count")]
    if not all(isinstance(each, int) and each >= 0 for each in whole) or whole[1] > whole[2]:
        raise ValueError("epoch, correct and count must be counts, and correct at most count")
    if not all(isinstance(scores.get(key, 0.0), float) for key in ("val/loss", "val/top1", "val/balanced_top1")):
        raise ValueError("val/loss, val/top1 and val/balanced_top1 must be numbers")
    return scores


def _check_best(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("epoch"), int):
        raise ValueError("it must have an epoch")
    return row


def _check_counts(row: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(count, int) and count >= 0 for count in (row.get("epoch", 0), row.get("global_step"))):
        raise ValueError("epoch and global_step must be counts")
    return row


_READING = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@with_config(_READING)
class Preprocessing(TypedDict):
    """What is done to a photo before the network sees it; mean and std by channel, on the 0..1 scale."""

    image_size: ImageSize
    resize: Resize
    mean: Annotated[list[Annotated[float, Field(ge=-10, le=10)]], Field(min_length=3, max_length=3)]
    transparency: Transparency
    crop_mode: Literal["center", "squash"]
    shrink: Shrink | None
    std: Annotated[list[Annotated[float, Field(ge=1e-3, le=10)]], Field(min_length=3, max_length=3)]


Share = Annotated[float, Field(ge=0, le=1)]


@with_config(_READING)
class SavedReliability(TypedDict):
    """See `calibration.Reliability`; a bin is photos, mean confidence and accuracy."""

    loss: Annotated[float, Field(ge=0)]
    ece: Share
    bins: list[Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)]]


@with_config(_READING)
class SavedCalibration(TypedDict):
    """See `calibration.Calibration`."""

    photos: Count
    folds: Count
    reason: str
    before: SavedReliability
    after: SavedReliability | None


@with_config(_READING)
class Unsure(TypedDict):
    """Below which confidence an answer is unsure, for a wanted accuracy of the others; of the photos that chose it,
    how many were kept and how many of those were right."""

    wanted: Share
    below: Share
    photos: Count
    kept: Count
    right: Count


def _check_kept(unsure: Unsure) -> Unsure:
    if not unsure["right"] <= unsure["kept"] <= unsure["photos"]:
        raise ValueError("right must be at most kept, and kept at most photos")
    return unsure


@with_config(_READING)
class Description(Preprocessing):
    """model.json. scores: the best evaluation's row of metrics.jsonl, with the counts `correct` and `count`, of photos
    with their mirror images where test_flips says so. temperature: what logits are divided by. average_of: the names of
    the runs or checkpoints whose mean the weights are; none for those of a training."""

    format: int
    arch: Arch
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(_differ)]
    test_flips: bool
    temperature: Annotated[float, Field(ge=0.25, le=4)]
    calibration: SavedCalibration | None
    unsure: list[Annotated[Unsure, AfterValidator(_check_kept)]]
    average_of: list[str]
    scores: Annotated[dict[str, Number | str], AfterValidator(_check_scores)]
    data: str
    dataset_fingerprint: str
    versions: dict[str, str]


@with_config(_READING)
class Status(TypedDict):
    """status.json."""

    state: Literal["running", "stopped", "finished", "failed"]
    reason: str
    exit_code: Annotated[int, Field(ge=0, le=255)] | None
    epoch: Count
    global_step: Count
    job: NotRequired[str | None]  # Slurm's number of it


@with_config(ConfigDict(strict=True))
class Sums(TypedDict):
    """The state of a `progress.Interval`; a sum that is not finite is None, or NaN in files of version 0.1.0."""

    sums: Annotated[list[float | None], Field(min_length=5, max_length=5)]
    seconds: float
    waited: float


@with_config(ConfigDict(strict=True, extra="allow"))
class SavedProgress(TypedDict):
    """progress.json of a checkpoint. settings: those of the training. files: digest by name. engine: which one has
    decoded, for a device of this type. first_weights, teacher: digests of weights."""

    format: int
    epoch: Count
    global_step: Count
    skipped_steps: Count
    best: Annotated[dict[str, Number | str], AfterValidator(_check_best)]
    interval: Sums
    whole_epoch: Sums
    bad: dict[Literal["train", "val"], list[Count]]
    not_finite_in_a_row: Count
    world_size: Annotated[int, Field(ge=1)]
    precision: str | None
    engine: str
    device: str
    first_weights: str | None
    teacher: str | None
    settings: dict[str, bool | int | float | str | None] | None
    dataset_fingerprint: str
    metrics_bytes: Count
    versions: dict[str, str]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], str]


_PREPROCESSING, _DESCRIPTION, _STATUS = TypeAdapter(Preprocessing), TypeAdapter(Description), TypeAdapter(Status)
_PROGRESS, _TEXTS = TypeAdapter(SavedProgress), TypeAdapter(dict[str, str], config=_READING)
_ROW = TypeAdapter(Annotated[dict[str, Number], AfterValidator(_check_counts)], config=_READING)


def read_description(run: Path, named: str) -> Description:
    """A run folder's model.json. `named`: the setting that names the run. UserError where it is missing or damaged."""
    file = run / "model.json"
    try:
        description = _checked(
            _DESCRIPTION, _read_json(file, MODEL_FORMAT, _ADDED_TO_MODEL | _ADDED_TO_PREPROCESSING), file
        )
        check_preprocessing(description, file)
    except OSError as error:
        raise UserError(f"{named}: {file} cannot be read ({error.strerror}): give the folder of a run") from None
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    return description


def read_status(run: Path) -> Status | None:
    """A run folder's status.json; None where there is none. UserError where it is damaged."""
    file = run / "status.json"
    try:
        return _checked(_STATUS, _read_json(file), file)
    except OSError:
        return None


def read_progress(checkpoint: Path) -> SavedProgress:
    """A checkpoint's progress.json. Raises OSError where it cannot be read, UserError where it is damaged."""
    file = checkpoint / "progress.json"
    return _checked(_PROGRESS, _read_json(file, CHECKPOINT_FORMAT, _ADDED_TO_CHECKPOINT), file)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints/`, oldest first; a folder of another name is none, and is left alone.

    By number: as text, epoch-10000 would come before epoch-9999. By step: where `max_steps` has ended an epoch early,
    and more steps go on in it, the later checkpoint has fewer whole epochs.
    """
    names = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("epoch-*"))
    return [path for *_, path in sorted((int(name[2]), int(name[1]), path) for name, path in names if name)]


def read_trained_config(run: Path) -> Config | None:
    """The settings with which a run was trained, of its newest checkpoint that can be read; None where there is none,
    or an older version has not kept them. UserError where they are not of this version.
    """
    newest = newest_progress(run)
    settings = newest[1]["settings"] if newest else None
    if newest is None or settings is None:
        return None
    return config_of({**MEANT_BEFORE, **settings}, newest[0] / "progress.json")


def what_auto_came_to(run: Path, config: Config) -> Config:
    """`config`, of the run, with what `auto` has come to in it, as far as its newest readable checkpoint tells."""
    with suppress(NewerFormat, ValidationError):
        newest = newest_progress(run)
        kept: Mapping[str, Any] = newest[1] if newest else {}
        autos = [key for key in ("freeze", "views_per_photo", "epochs") if getattr(config, key) == "auto"]
        return replace(config, **{key: kept[key] for key in autos if key in kept})
    return config


def newest_progress(run: Path) -> tuple[Path, SavedProgress] | None:
    """The newest checkpoint that is not damaged, and its progress. NewerFormat where a later version has written it."""
    for folder in reversed(checkpoint_folders(run / "checkpoints")):
        try:
            return folder, read_progress(folder)
        except NewerFormat:
            raise
        except (OSError, UserError):  # the one before it is used
            continue
    return None


def read_texts(file: Path) -> dict[str, str]:
    """A file of names and what is noted of each. Raises OSError where it cannot be read, UserError where damaged."""
    return _checked(_TEXTS, _read_json(file), file)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last one that a kill has cut off; [] where there is no file."""
    rows: list[dict[str, Any]] = []
    if not file.exists():
        return rows
    refuse_what_is_no_file(file)
    with open(file, "rb") as lines:
        while line := lines.readline(_LARGEST // 16):
            where = f"{file}, line {len(rows) + 1}"
            if line.endswith(b"\n"):
                rows.append(_checked(_ROW, _parsed(line, where), where))
            elif len(line) == _LARGEST // 16:
                raise UserError(f"{where} is damaged: it is too long")
    return rows


def read_run_config(run: Path, *flags: str) -> Config:
    """A run folder's config.yaml, under `flags`. UserError where it is damaged, or not there."""
    try:
        refuse_what_is_no_file(run / "config.yaml")
    except OSError as error:
        raise UserError(f"{run / 'config.yaml'}: cannot be read ({error.strerror}); it must be in a run") from None
    absent = MEANT_BEFORE.keys() - read_recipe(run / "config.yaml").keys() - {_key_of(flag) for flag in flags}
    before = [f"--{key}={MEANT_BEFORE[key]}" for key in sorted(absent)]
    return parse_config([f"--config={run / 'config.yaml'}", *before, *flags])[0]


def _key_of(flag: str) -> str:
    return flag.partition("=")[0].removeprefix("--")


def is_run_config(file: Path) -> bool:
    """Whether it is the config.yaml of a run, which has every setting, and not some project's file of this name."""
    try:
        return {"run", "runs", "arch", "batch_size", "tracker"} <= read_recipe(file).keys()
    except UserError:
        return False


def check_preprocessing(content: Any, source: object) -> Preprocessing:
    """What a description says of photos, from anywhere. UserError, which names `source`, where it is damaged."""
    known = {**_ADDED_TO_PREPROCESSING, **content} if isinstance(content, dict) else content
    found = _checked(_PREPROCESSING, known, source)
    if found["resize"] < found["image_size"]:
        raise UserError(f"{source} is damaged: resize must be at least image_size")
    least = found["image_size" if found["crop_mode"] == "squash" else "resize"]
    if found["shrink"] is not None and found["shrink"] < least:
        raise UserError(f"{source} is damaged: shrink must be at least {least}")
    return found


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def _read_json(file: Path, newest: int = 0, added: Mapping[str, Any] | None = None) -> Any:
    """The file's content, with `added` where it has no such key. newest: the format that is known here."""
    refuse_what_is_no_file(file)
    with open(file, "rb") as opened:
        text = opened.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise UserError(f"{file} is damaged: it has more than {_LARGEST >> 20} MiB")
    content = _parsed(text, file)
    if not isinstance(content, dict) or added is None:
        return content
    content = {**added, **content}
    if isinstance(content["format"], int) and content["format"] > newest:
        raise NewerFormat(
            f"{file} is of format {content['format']}, and this version of dalitune reads up to {newest}: use the "
            "version that wrote it, or a newer one"
        )
    return content


class NewerFormat(UserError):
    """A file that a newer version has written, and this one would misread."""


def _parsed(text: bytes, source: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: no JSON ({str(error)[:100]})") from None


def _checked(kind: TypeAdapter[Kind], content: Any, source: object) -> Kind:
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in fault["loc"][:2])
        told = fault["msg"] if len(fault["msg"]) <= 160 else f"{fault['msg'][:150]} ..."  # of many possible values
        given = f", not {str(fault['input'])[:40]!r}" if isinstance(fault["input"], (str, int, float)) else ""
        raise UserError(f"{source} is damaged: {where or 'all of it'}: {told}{given}") from None


def refuse_what_is_no_file(file: Path) -> None:
    """A pipe would keep its reader waiting, and a device never end. Raises OSError where nothing is there."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise UserError(f"{file} is no regular file")
