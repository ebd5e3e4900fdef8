"""Classifies photos with a trained run.

    python deploy/predict.py runs/NAME photo.jpg photos/            # a table; folders are searched at any depth
    python deploy/predict.py runs/NAME photos/ --csv answers.csv    # path,class,confidence,runner_up,error
    python deploy/predict.py runs/NAME photos/ --json - | jq .class  # one object a line, as the answers come
    python deploy/predict.py runs/NAME photos/ --grid picture.png   # the 16 photos that it is least sure of
    python deploy/predict.py runs/NAME photos/ --explain seen/      # where in each photo it finds its answer (Grad-CAM)
    python deploy/predict.py runs/NAME photos/ --unsure-for 0.99    # marks those that a person should look at

A file that is no readable photo is named and the rest goes on; the exit code is 2 then. Nothing is kept in memory but
the list of paths: a million photos stream through.
"""

import argparse
import heapq
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `predict.py ... | head` ends without a trace
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import SCHEMA, ScriptParser, engine_name
from pipelines.data.decode import photo_of_file, view_of_file
from pipelines.data.engines.factory import choose_engine
from pipelines.data.preprocess import Preprocess
from pipelines.distributed.exits import run_script
from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.launch import start_processes
from pipelines.errors import UserError, write_error
from pipelines.files import begins_with, check_apart, check_output, check_replaceable, csv_rows
from pipelines.inference import Answer, explainer, find_photos, open_run, unsure_below
from pipelines.run import figures
from pipelines.run.heat import laid_over
from pipelines.text import check_printed, counted, printable
from pipelines.training.calibration import unsure_line

import numpy as np
import torch
from tqdm import tqdm

_WIDEST = 60  # characters of a path in the table
_LARGEST_SHOWN = 640  # pixels of a photo's longer side in a picture of its own
_COLUMNS = ("path", "class", "confidence", "runner_up", "error")


def main(arguments: list[str]) -> None:
    """One pass over the photos. Raises MachineError, or UserError, also where a file was no readable photo."""
    started = time.perf_counter()
    options = _parse(arguments)
    paths = find_photos(options.photos)
    _check_no_photo(options.grid, paths)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("one process does it: start with python deploy/predict.py, without a launcher")
    device = torch.device("cpu") if options.cpu else start_processes().device
    engine, reason = choose_engine(options.loader, device)
    settings = {"batch_size": options.eval_batch_per_device, "test_flips": options.test_flips}
    run = open_run(options.run, device, engine=engine, threads=cpu_cores(), **settings)
    mirrored = ", each with its mirror image" if run.test_flips else ""
    explain = explainer(run) if options.explain else None
    unsure = unsure_below(options.run, options.unsure_for, test_flips=run.test_flips)
    files = f"{counted(len(paths), 'file')}{mirrored}"
    _say(f"{printable(options.run)} on {files}, {device.type}; loader: {engine} ({reason})")

    if unsure:
        _say(unsure_line(unsure))
    counts: Counter[str] = Counter()
    unsure_count = 0
    doubtful: list[tuple[float, int, str]] = []  # a heap of -confidence, number, class: the surest answer comes out
    with ExitStack() as stack:
        writers = _writers(options, stack, paths, run.classes)
        below = unsure["below"] if unsure else None
        rows_are_seen = sys.stdout.isatty() and (
            "-" in (options.csv, options.json) or not (options.csv or options.json)
        )
        hidden = rows_are_seen or not sys.stderr.isatty()
        bar = stack.enter_context(tqdm(total=len(paths), unit="photo", leave=False, disable=hidden))
        for number, answer in enumerate(run.classify(paths)):
            row = _row(answer, run.classes, below)
            unsure_count += row.get("unsure", False)
            if explain and not answer.error:
                picture = options.explain / f"{number + 1:0{len(str(len(paths)))}}_{_stem(answer.path)}.png"
                heat = partial(_save_explanation, picture, answer, row, explain, run.preprocess)
                row["picture"] = str(picture) if figures.attempt(picture.name, heat) else ""
            for write in writers:
                write(row)
            check_printed()
            if answer.error:
                bar.write(f"left out: {printable(answer.path)} ({answer.error})", file=sys.stderr)
            else:
                counts[row["class"]] += 1
                push = heapq.heappush if len(doubtful) < figures.MAX_PHOTOS else heapq.heappushpop
                push(doubtful, (-row["confidence"], number, row["class"]))
            bar.update()
    if options.grid and doubtful:
        shown = sorted(doubtful, reverse=True)
        if figures.attempt(options.grid.name, lambda: _save_grid(options.grid, paths, shown, run.preprocess)):
            _say(f"picture: {printable(options.grid)}")

    read = sum(counts.values())
    each = ", ".join(f"{printable(name)} {count}" for name, count in counts.most_common(5)) or "none"
    more = f" and {counted(len(counts) - 5, 'class')} more" if len(counts) > 5 else ""
    marked = f"; {unsure_count} of them unsure" if unsure else ""
    _say(f"{read} photo{'' if read == 1 else 's'} in {time.perf_counter() - started:.1f} s: {each}{more}{marked}")
    if read < len(paths):
        raise UserError(
            f"{len(paths) - read} of {counted(len(paths), 'file')} cannot be read as a photo; each is named above"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("predict.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with best.pt and model.json")
    parser.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--csv", metavar="FILE", help="write the answers there instead of a table; - is stdout")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, one object a line")
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="a picture of each photo there: where in it its class is found"
    )
    parser.add_argument("--grid", type=Path, metavar="PNG", help="a picture of the 16 least sure answers")
    engines, engine_help = SCHEMA["loader"]["enum"], "the engine (default: auto)"
    parser.add_argument("--loader", type=engine_name, choices=engines, default="auto", help=engine_help)
    parser.add_argument("--eval-batch-per-device", type=int, default=64, metavar="N", help="of a batch (default: 64)")
    parser.add_test_flips()
    parser.add_unsure_for()
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    options = parser.parse_args(arguments)
    if options.csv == options.json == "-":
        parser.error("--csv - and --json - would both write to stdout")
    if options.eval_batch_per_device < 1:
        parser.error("--eval-batch-per-device must be at least 1")
    if options.explain:
        _prepare_folder(options.explain, options.photos)
    csv, lines = (Path(output) if output and output != "-" else None for output in (options.csv, options.json))
    check_apart({"--csv": csv, "--json": lines, "--grid": options.grid})
    # `--csv photos/*.jpg`, the name forgotten, names the first photo.
    if csv:
        check_replaceable(csv, begins_with(",".join(_COLUMNS)))
    if lines:
        check_replaceable(lines, begins_with('{"path": '))
    if options.grid:
        check_output(options.grid, figures.is_own_picture, "--grid")
    return options


def _check_no_photo(picture: Path | None, paths: list[str]) -> None:
    """UserError where it would replace one of the photos, as an earlier such picture that lies among them."""
    if picture and picture.exists():
        place = os.path.realpath(picture)
        if any(os.path.basename(path) == picture.name and os.path.realpath(path) == place for path in paths):
            raise UserError(f"--grid {picture}: it is one of the photos: give another name")


def _prepare_folder(folder: Path, photos: list[str]) -> None:
    """Makes it. UserError where it cannot, or where pictures would lie among the photos: next time they were some;
    MachineError where the disk is full."""
    wanted = folder.resolve()
    for photo in map(Path, photos):
        place = photo if photo.is_dir() else photo.parent
        if wanted == place.resolve() or (photo.is_dir() and place.resolve() in wanted.parents):
            raise UserError(f"--explain {folder}: it lies among the photos: give a folder beside {place}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line = f"--explain {folder}: cannot be made ({error.strerror}): give another folder"
        raise write_error(error, line) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--explain {folder}: cannot be written to: give another folder")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _row(answer: Answer, classes: tuple[str, ...], below: float | None) -> dict[str, Any]:
    """What is written of a photo, or of a file that is none. below: which confidence is unsure."""
    if answer.error:
        return {"path": answer.path, "error": answer.error}
    (best, confidence), (runner_up, _) = answer.ranking(classes)[:2]
    row = {"path": answer.path, "class": best, "confidence": round(confidence, 6), "runner_up": runner_up}
    return row if below is None else row | {"unsure": confidence < below}


def _writers(
    options: argparse.Namespace, stack: ExitStack, paths: list[str], classes: tuple[str, ...]
) -> list[Callable[[dict[str, Any]], Any]]:
    """What each row is given to. The table is for people; who asks for a file has it instead."""
    writers: list[Callable[[dict[str, Any]], Any]] = []
    if options.csv:
        # A name that is not UTF-8 keeps its own bytes.
        file = _open(options.csv, stack, "surrogateescape")
        more = {"picture": options.explain, "unsure": options.unsure_for}
        columns = (*_COLUMNS, *(name for name, wanted in more.items() if wanted))
        write = csv_rows(file)
        write(columns)
        writers.append(lambda row: write([row.get(column, "") for column in columns]))
    if options.json:
        # A name that is not UTF-8 becomes JSON's escapes of its bytes, which Python reads back.
        lines = _open(options.json, stack, "backslashreplace")
        writers.append(lambda row: lines.write(json.dumps(row, ensure_ascii=False) + "\n"))
    return writers or [_table(paths, classes)]


def _open(target: str, stack: ExitStack, errors: str) -> TextIO:
    """A file that grows as the answers come; after Ctrl-C it holds those until then. "-" is stdout."""
    if target == "-":
        sys.stdout.reconfigure(encoding="utf-8", errors=errors, line_buffering=True)  # type: ignore[union-attr]
        return sys.stdout
    try:
        return stack.enter_context(open(target, "w", encoding="utf-8", errors=errors, newline=""))
    except OSError as error:
        raise write_error(error, f"{target}: cannot be written ({error.strerror}): give another file") from None


def _table(paths: list[str], classes: tuple[str, ...]) -> Callable[[dict[str, Any]], None]:
    widest = min(_WIDEST, max(len("photo"), *(len(path) for path in paths)))
    names = min(_WIDEST // 2, max(len("class"), *(len(name) for name in classes)))
    print(f"{'photo':<{widest}}  {'class':<{names}}  confidence  runner-up", flush=True)

    def write(row: dict[str, Any]) -> None:
        path = printable(row["path"])
        path = path if len(path) <= widest else f"…{path[1 - widest :]}"
        if "error" not in row:
            best, runner_up = printable(row["class"]), printable(row["runner_up"])
            unsure = "  unsure" if row.get("unsure") else ""
            print(f"{path:<{widest}}  {best:<{names}}  {row['confidence']:10.4f}  {runner_up}{unsure}", flush=True)

    return write


def _stem(path: str) -> str:
    """Of a file's name what any file system takes."""
    return re.sub(r"[^\w.-]", "_", Path(path).stem)[:60]


def _save_explanation(
    picture: Path,
    answer: Answer,
    row: dict[str, Any],
    explain: Callable[[np.ndarray, Answer], np.ndarray],
    preprocess: Preprocess,
) -> None:
    """The whole photo, and beside it the same with the heat map over what the network sees of it."""
    check_replaceable(picture, figures.is_own_picture)
    heat = explain(view_of_file(answer.path, preprocess), answer)
    photo, box = photo_of_file(answer.path, preprocess)
    width, height = photo.size
    photo.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    scale_x, scale_y = photo.width / width, photo.height / height
    seen = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
    pixels = np.asarray(photo)
    told = f"{row['class']}, confidence {row['confidence']:.2f}"
    figures.save_explanation(picture, pixels, laid_over(pixels, heat, seen), Path(answer.path).name, told)


def _save_grid(path: Path, paths: list[str], doubtful: list[tuple[float, int, str]], preprocess: Preprocess) -> None:
    images = [view_of_file(paths[number], preprocess) for _, number, _ in doubtful]
    predicted, confidence = [name for *_, name in doubtful], [-value for value, *_ in doubtful]
    names = [Path(paths[number]).name for _, number, _ in doubtful]
    figures.save_answers(path, np.stack(images), names, predicted, confidence)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
