"""Whether DALI can be trusted on a GPU: a child process decodes a few photos with it, before a training depends on it.

A decoder that crashes takes its process with it, and one that is wrong says nothing. The answer is kept in the cache
for this GPU, driver and these versions.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipelines.cache import cache_folder
from pipelines.files import ROOT, keep_json

import numpy as np
import torch
from PIL import Image

_SECONDS = 120  # PyTorch and DALI are imported, and a GPU is started
_MEAN_LEVELS, _FAR_LEVELS, _MOST_FAR = 2.0, 12, 0.02  # of 255; a GPU's decoder rounds otherwise than libjpeg
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# What may be otherwise a moment later: it is not kept.
_PASSING = re.compile(r"memory|too many open files|resource temporarily|busy or unavailable|no space left|quota", re.I)
_PASSING_SIGNALS = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"}


def fault_of_dali(device: torch.device, command: Sequence[str] | None = None) -> str:
    """ "" where DALI's photos on `device` are Pillow's, else one line: on what, with which versions, what happened.

    command: what is started instead of this module's own child, for tests.
    """
    on = _hardware_and_versions(device)
    file = cache_folder() / "dali" / f"{blake2b(_key(on).encode(), digest_size=8).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(file.read_text(encoding="utf-8"))["fault"])
    happened, is_lasting = _ask_child(device, command)
    fault = f"DALI does not work here: {happened} ({on})" if happened else ""
    if fault and is_lasting:
        fault += f"; it is tried again without {file}"
    if is_lasting:
        keep_json(file, {"on": on, "fault": fault})
    return fault


def _hardware_and_versions(device: torch.device) -> str:
    found = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
    libraries = [f"{name} {found[name]}" for name in sorted(found) if re.match(r"nvidia-(dali|nvimgcodec)-", name)]
    driver = ""
    with suppress(OSError):
        driver = (re.search(r"\d+\.\d[\d.]*", _NVIDIA_DRIVER.read_text(errors="replace")) or [""])[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return ", ".join([name, f"driver {driver or 'unknown'}", *libraries])


def _key(on: str) -> str:
    """Another graph may work where this one does not."""
    graph = Path(__file__).with_name("dali.py").read_text(encoding="utf-8")
    return f"{on}, PyTorch {torch.__version__}, {graph}"


def _ask_child(device: torch.device, command: Sequence[str] | None) -> tuple[str, bool]:
    """What happened to the child, "" where all is well; and whether it will be the same the next time."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import child; child(sys.argv[1])"
    # It is no process of the training: it must not look for the others.
    private = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    )
    environment = {name: value for name, value in os.environ.items() if name not in private}
    try:
        done = subprocess.run(
            command or [sys.executable, "-c", code, str(device)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        # Kept, one slow disk would decide for all later runs.
        return f"no answer within {_SECONDS} seconds; --loader pillow does not wait for one", False
    except OSError as error:
        return f"its check could not be started: {error.strerror}", False
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"its decoder ends with {name}", name not in _PASSING_SIGNALS
    told = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode:
        reason = next(
            (line.strip() for line in reversed(told) if re.match(r"\w+(\.\w+)*(Error|Exception)\b", line)), ""
        )
        return reason[:300] or f"its check ends with code {done.returncode}", not _PASSING.search(done.stderr)
    try:
        mean, far = json.loads(told[-1])
    except (ValueError, TypeError, IndexError):
        return "its check gives no answer", False
    is_right = mean <= _MEAN_LEVELS and far <= _MOST_FAR
    return "" if is_right else f"its pictures are not Pillow's: {mean:.1f} of 255 levels apart on average", True


def child(device_name: str) -> None:
    """Prints how far DALI's pictures are from Pillow's: mean difference in levels of 255, share of values far apart.

    A traceback of a user's DALI is for the parent, which tells its last line.
    """
    from pipelines.data.dataset import load_dataset, scan_dataset
    from pipelines.data.engines.factory import make_engine
    from pipelines.data.plan import EvalPlan, Plan, TrainPlan

    size, device, differences = 224, torch.device(device_name), []
    with tempfile.TemporaryDirectory(prefix="dalitune-") as folder:
        for number, encode in enumerate(_PHOTOS):
            photo = Path(folder, "train", "ab"[number % 2], f"{number}.jpg")
            photo.parent.mkdir(parents=True, exist_ok=True)
            photo.write_bytes(encode(_picture(number)))
        split = load_dataset(scan_dataset(Path(folder), Path(folder, "cache"), 0.01)).splits["train"]
        options: dict[str, Any] = {"micro_batch": len(split), "threads": 2}
        options |= {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # so that pixels come out, 0 to 255
        dali = make_engine("dali", split, device=device, **options)
        pillow = make_engine("pillow", split, device=torch.device("cpu"), **options)
        plans: list[Plan] = [
            EvalPlan(split.sizes, image_size=size, resize=256),
            TrainPlan(split.sizes, seed=0, image_size=size, crop_scale_min=0.25, flip_probability=0.5),
        ]
        for plan in plans:
            views = plan.views(0, np.arange(len(split)))
            for engine in (dali, pillow):
                engine.submit(views)
            ours, expected = dali.fetch().images.cpu(), pillow.fetch().images
            differences.append((ours - expected).abs().flatten())
        dali.close()
        pillow.close()
    every = torch.cat(differences)
    print(json.dumps([float(every.mean()), float((every > _FAR_LEVELS).float().mean())]), flush=True)


def _picture(seed: int) -> Image.Image:
    """A photo's like, 480 x 360: smooth colours, an edge, some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:360, 0:480]
    colours = [np.sin(x / rng.uniform(20, 60) + phase) + np.cos(y / rng.uniform(20, 60)) for phase in rng.random(3)]
    pixels = 128 + 40 * np.stack(colours, axis=2) + rng.normal(0, 4, (360, 480, 3))
    pixels[(x - 240) ** 2 + (y - 150) ** 2 < 80**2] *= 0.4
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jpeg(mode: str = "RGB", orientation: int = 1, **options: object) -> Callable[[Image.Image], bytes]:
    def encode(picture: Image.Image) -> bytes:
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        picture.convert(mode).save(file, "JPEG", quality=92, exif=exif, **options)
        return file.getvalue()

    return encode


_PHOTOS = [
    *(_jpeg(), _jpeg(subsampling=0), _jpeg("L"), _jpeg(progressive=True), _jpeg(), _jpeg()),
    *(_jpeg(orientation=6), _jpeg(orientation=3), _jpeg(orientation=8), _jpeg(orientation=5)),
]
