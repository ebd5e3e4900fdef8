"""The weights that a network starts from: ImageNet's, a run's, or a state_dict as people have them."""

import argparse
import functools
import hashlib
import os
import pickle
import re
import sys
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pipelines.vision  # noqa: F401 (torchvision comes with it)
from pipelines.config import Config
from pipelines.errors import MachineError, UserError
from pipelines.files import file_digest
from pipelines.model.tensors import load_tensors
from pipelines.run_files import read_description
from pipelines.text import printable

import safetensors.torch
import torch
from torch import nn
from torchvision import models

_WANTED = "give imagenet, none, a state_dict file or a run folder"
_MOST_REPEATED = 1 << 28  # bytes of a tensor that repeats its values by strides of 0, which could be terabytes
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEEPEST = 6  # state_dicts are looked for in this many mappings of mappings
_LONGEST = 500  # characters of a tensor's name
_SHOWN = 3  # names of tensors in a line
_AVERAGED = re.compile(r"(^|[._])ema([._]|$)")
# What torchvision has called them, in files that it still hands out: a DenseNet's and a vision transformer's layers.
_OLD_NAMES = (
    (r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)


@dataclass(frozen=True)
class Weights:
    """Where a network starts from.

    state: a torchvision network's state_dict on the CPU, None for random weights, or {} where a checkpoint has all of
    a run that did not begin with random ones.
    source: what to call it. classes: of its head, in order, where a run folder tells them. notes: lines to say.
    """

    state: Mapping[str, torch.Tensor] | None
    source: str
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Hex, of the names and values; the file's name and format do not matter."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted((self.state or {}).items()):
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def head_name(network: nn.Module) -> str:
    """What a network calls its head, its last linear layer: fc, classifier.3, heads.head."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def read_weights(config: Config) -> Weights:
    """What the setting `weights` means: ImageNet's through torchvision, none, a state_dict file, or a run folder.

    Without the setting, the file DALITUNE_WEIGHTS stands in for torchvision's download of a ResNet-18.
    """
    wanted, named = config.weights, "weights"
    if wanted is None and config.arch == "resnet18" and os.environ.get("DALITUNE_WEIGHTS"):
        wanted, named = os.environ["DALITUNE_WEIGHTS"], "DALITUNE_WEIGHTS"
    if wanted == "none":
        return Weights(None, "random")
    if wanted in (None, "imagenet"):
        return _imagenet_weights(config)
    path = Path(os.path.expanduser(str(wanted)))
    if os.path.isdir(path):
        return read_run_weights(path, config.arch, named)
    return read_weights_file(path, config.arch, named)


def read_weights_file(path: Path, arch: str, named: str = "weights") -> Weights:
    """The state_dict of an `arch` in a file of PyTorch's or of safetensors, on the CPU. UserError where there is none.

    It may lie in other mappings, as in a training's checkpoint; its names may have something in front, as wrappers put
    it; the head may be missing, or be another one, which then is left out. Averaged weights (EMA) win over those that
    they are the average of. Whatever is not taken as it stands is said in `notes`. Read with weights_only=True: a file
    that would run code is refused, not run. Names, shapes and kinds of number are checked, so that nothing of the body
    stays as it was drawn.
    """
    if not os.path.exists(path):  # unlike Path's, it raises nothing where a folder may not be read
        raise UserError(f"{named}: {path} does not exist: {_WANTED}")
    if not os.path.isfile(path):  # a pipe would keep its reader waiting, and a device never end
        raise UserError(f"{named}: {path} is no regular file: {_WANTED}")
    try:
        content = _content(path)
    except Exception as error:
        detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({str(error)[:160] or type(error).__name__})"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            detail = f" (it asks for {code[1]}: code, which is never run)"
        raise UserError(
            f"{named}: {path} is cut off, or not a file that holds tensors and nothing else{detail}: {_WANTED}"
        ) from None
    return take_weights(content, arch, path, named)


def take_weights(content: Any, arch: str, path: Path, named: str = "weights") -> Weights:
    """As `read_weights_file`, of what was in the file."""
    tensors = _tensors(content)
    if not tensors:
        raise UserError(f"{named}: {path} does not hold a state_dict (names -> tensors) of a {arch}: {_WANTED}")
    expected, head = _expected(arch)
    first = next(iter(expected))
    fronts = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    differing = {front: _difference(tensors, front, expected, head) for front in fronts or [""]}
    found = [front for front in fronts if not differing[front]]
    if not found:
        difference = printable(differing[min(differing, key=len)])[:80]
        raise UserError(
            f"{named}: {path} is not a {arch} in torchvision's layout (first difference: {difference}): {_WANTED}"
        )
    chosen = [front for front in found if _AVERAGED.search(front)] or found
    taken = [_take(tensors, front, expected, head) for front in chosen]
    for name, value in (pair for state, _ in taken for pair in state.items()):
        _check_tensor(name, value, expected[name], f"{named}: {path}")
    # A module that two attributes name stands twice in a state_dict.
    if len(taken) > 1 and len({Weights(state, "").digest() for state, _ in taken}) > 1:
        raise UserError(
            f"{named}: {path} holds several {arch}, with {_listed(chosen)} in front of the names: save the one that "
            "is meant by itself"
        )
    (state, notes), front = taken[0], chosen[0]
    notes = [f"{front!r} is taken off the names"] * bool(front) + notes
    if passed_over := [each for each in found if each not in chosen]:
        notes.append(f"these are averages (EMA), and {_listed(passed_over)} is passed over")
    return Weights(state, str(path), notes=(f"{named}: {path}: {'; '.join(notes)}",) if notes else ())


def _content(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":  # behind the length of a header in JSON
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # a training's arguments, which only hold values
        return load_tensors(path)


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """All tensors in a mapping and the mappings in it, each of which counts once, by their names joined with dots."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def look_into(part: Mapping[Any, Any], front: str, depth: int) -> None:
        seen.add(id(part))
        for key, value in part.items():
            name = f"{front}{key}" if isinstance(key, str) and len(front) + len(key) < _LONGEST else ""
            if isinstance(value, torch.Tensor) and name and not value.is_nested:
                for old, new in _OLD_NAMES:
                    name = re.sub(old, new, name)
                found.setdefault(name, value.detach())
            elif isinstance(value, Mapping) and name and id(value) not in seen and depth < _DEEPEST:
                look_into(value, f"{name}.", depth + 1)

    if isinstance(content, Mapping):
        look_into(content, "", 1)
    return found


def _difference(
    tensors: Mapping[str, torch.Tensor], front: str, expected: Mapping[str, torch.Tensor], head: str
) -> str:
    """The first name, without `front`, by which a body differs from the expected one; "" where it is the same."""
    body = {name: like for name, like in expected.items() if not name.startswith(f"{head}.")}
    # Files from before PyTorch 0.4.1 do not count batches, and nothing here reads what is no float.
    needed = [name for name, like in body.items() if like.is_floating_point() or front + name in tensors]
    missing = (name for name in needed if getattr(tensors.get(front + name), "shape", None) != body[name].shape)
    if name := next(missing, ""):
        return name
    roots = {name.partition(".")[0] for name in body}
    below = (name.removeprefix(front) for name in tensors if name.startswith(front))
    others = (name for name in below if name not in body and not name.startswith(f"{head}."))
    return next((name for name in others if name.partition(".")[0] in roots), "")


def _take(
    tensors: Mapping[str, torch.Tensor], front: str, expected: Mapping[str, torch.Tensor], head: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state_dict below `front`, and what is to say of its head and of what is left out."""
    below = {name.removeprefix(front): value for name, value in tensors.items() if name.startswith(front)}
    own = {f"{head}.weight", f"{head}.bias"}
    state = {
        name: torch.zeros(like.shape, dtype=like.dtype)
        for name, like in expected.items()
        if not like.is_floating_point()
    }
    state |= {name: value for name, value in below.items() if name in expected and name not in own}
    rest = {name: value for name, value in below.items() if name not in state}
    notes = []
    # The network's own head, with any number of classes, or a linear layer of another name that is all there is beside.
    names = own if own <= rest.keys() else set(rest)
    other = next((name.removesuffix(".weight") for name in names if name.endswith(".weight")), "")
    if names == {f"{other}.weight", f"{other}.bias"}:
        weight, bias = rest[f"{other}.weight"], rest[f"{other}.bias"]
        if weight.shape == (bias.numel(), expected[f"{head}.weight"].shape[1]) and bias.ndim == 1:
            state |= {f"{head}.weight": weight, f"{head}.bias": bias}
            rest = {name: value for name, value in rest.items() if name not in names}
            notes += [f"{other!r} is taken for the head, {head}"] * (other != head)
    notes += ["it has no head"] * (f"{head}.bias" not in state)
    return state, notes + [f"left out: {_listed(sorted(rest))}"] * bool(rest)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _check_tensor(name: str, value: torch.Tensor, like: torch.Tensor, where: str) -> None:
    """UserError where it could not be trained from, or lacks some of its values."""
    if value.layout != torch.strided or (
        value.dtype not in _FLOATS and (like.is_floating_point() or value.dtype not in (torch.int64, torch.int32))
    ):
        raise UserError(f"{where} holds {name} as {value.dtype}, {value.layout}: floats are needed")
    if value.is_meta or value.nbytes > max(value.untyped_storage().nbytes(), _MOST_REPEATED):
        raise UserError(f"{where} holds {name} without all of its values: {_WANTED}")
    if like.is_floating_point() and not value.float().isfinite().all():
        raise UserError(f"{where} holds {name} with values that are not finite: it comes of a failed run")


@functools.cache
def _expected(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    """The state_dict of torchvision's network, of which only shapes and kinds count, and the name of its head."""
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):  # a RegNet computes its widths with tensors
        network = models.get_model(arch, weights=None)
    return network.state_dict(), head_name(network)


def count_classes(weights: Weights, arch: str) -> int:
    """How many classes the head of an `arch` tells apart; 0 where there is none."""
    return len((weights.state or {}).get(f"{_expected(arch)[1]}.bias", ()))


def _imagenet_weights(config: Config) -> Weights:
    """torchvision's own file, through the folder where torch.hub keeps it; MachineError where it cannot be fetched.

    torch.hub would believe a file that lies there already, and unpickle whatever is in it.
    """
    arch = config.arch
    default = models.get_model_weights(arch).DEFAULT
    name = default.url.rsplit("/", 1)[-1]
    prefix = name.rpartition("-")[2].partition(".")[0]  # of the file's SHA-256, by torch.hub's convention
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(default.url, str(file), prefix, progress=sys.stderr.isatty())
        digest = file_digest(file, "sha256")
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise MachineError(
            f"weights: cannot fetch the ImageNet weights of {arch} from {default.url} ({reason}): "
            f"{_other_weights(config)}, or --weights none"
        ) from None
    if not digest.startswith(prefix):
        raise UserError(
            f"weights: {file} is cut off or not torchvision's (its SHA-256 begins with {digest[:8]}): delete it, and "
            "it is fetched again"
        )
    (size,), (resize,) = default.transforms().crop_size, default.transforms().resize_size
    note = f"weights: torchvision tests them at {size} pixels: --image_size {size} --resize {resize} for the same here"
    notes = () if size == config.evaluation_size else (note,)
    return replace(read_weights_file(file, arch), source=f"imagenet ({name})", notes=notes)


def _other_weights(config: Config) -> str:
    """What to give in place of ImageNet's, of what would have an effect."""
    file = "give a state_dict file with --weights FILE"
    if config.arch != "resnet18":
        return file
    if config.weights is None:
        return f"{file} or the variable DALITUNE_WEIGHTS"
    if os.environ.get("DALITUNE_WEIGHTS"):
        return 'DALITUNE_WEIGHTS stands in only where no weights are named: give --weights "$DALITUNE_WEIGHTS"'
    return f"{file}, or --weights null and the variable DALITUNE_WEIGHTS"


def read_run_weights(run: Path, arch: str, named: str) -> Weights:
    """The best weights of a run folder, with its classes. UserError where it holds none, or another architecture."""
    best, description = run / "best.pt", run / "model.json"
    if not os.path.exists(best) or not os.path.exists(description):
        raise UserError(f"{named}: {run} is not a run folder with best.pt and model.json: {_WANTED}")
    model = read_description(run, named)
    found, classes = model["arch"], tuple(model["classes"])
    if found != arch:
        raise UserError(f"{named}: {run} holds a {found}, not a {arch}: add --arch {found}")
    weights = read_weights_file(best, arch, named)
    if (found_classes := count_classes(weights, arch)) != len(classes):
        raise UserError(f"{named}: {best} has {found_classes} classes and {description} {len(classes)}")
    return replace(weights, source=str(run), classes=classes)
