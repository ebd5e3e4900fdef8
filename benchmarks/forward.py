"""How fast the frozen part runs: images a second of a ResNet-18's forward pass, in several ways.

    python benchmarks/forward.py --runs 9              # the usable cores, batches of 8, as a pass over photos has them
    python benchmarks/forward.py --runs 9 --batch 64

Ways: the network as PyTorch's tutorial runs it (default memory layout, a BatchNorm layer behind each convolution); in
channels-last layout; with BatchNorm folded into the convolutions, which is what runs here; the same in bf16 under
autocast, as `accelerate launch --mixed_precision bf16` has it; and the same network in onnxruntime, where that and onnx
are installed. The ways take turns within a run, `--seconds` each, after a first pass that does not count. Weights are
random: they make no difference to the time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.config import Config
from pipelines.distributed.hardware import machine
from pipelines.model.network import build_model
from pipelines.model.weights import Weights
from pipelines.run.folder import versions

import torch
from torchvision import models

SIZE = 224  # pixels


def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="how often each way has its turn")
    parser.add_argument("--batch", type=int, default=8, help="photos at a time")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    options = parser.parse_args()
    ways = {name: way for name, way in ways_of(options.batch).items() if way is not None}
    with torch.inference_mode():
        for way in ways.values():
            way()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, way in ways.items():
                rates[name].append(options.batch * rate(way, options.seconds))
    print(machine(), ", ".join(f"{library} {number}" for library, number in versions().items()), sep="\n")
    print(table(rates, options.batch))


def ways_of(batch: int) -> dict[str, Callable[[], object] | None]:
    """For each way a pass over one batch; None where it cannot run here."""
    state = models.resnet18().state_dict()
    plain = models.resnet18().eval()
    plain.load_state_dict(state)
    channels_last = models.resnet18().eval().to(memory_format=torch.channels_last)
    channels_last.load_state_dict(state)
    ours = build_model(Config(mode="feature_extract", batchnorm="frozen"), Weights(state, ""), ("a", "b")).eval()
    images = torch.randn(batch, 3, SIZE, SIZE)
    laid_out = images.contiguous(memory_format=torch.channels_last)

    def in_bf16() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return ours.forward_frozen(laid_out)

    return {
        "as the tutorial": lambda: plain(images),
        "channels last": lambda: channels_last(laid_out),
        "BatchNorm folded, as here": lambda: ours.forward_frozen(laid_out),
        "the same, bf16": in_bf16,
        "onnxruntime": _onnxruntime(plain, images),
    }


def _onnxruntime(network: torch.nn.Module, images: torch.Tensor) -> Callable[[], object] | None:
    try:
        import onnx  # noqa: F401 (PyTorch writes with it)
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "network.onnx"))
        torch.onnx.export(network, (images,), file, input_names=["images"], dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: session.run(None, {"images": array})


def rate(way: Callable[[], object], seconds: float) -> float:
    """Passes a second, over at least `seconds`."""
    started, passes = time.perf_counter(), 0
    while (now := time.perf_counter()) < started + seconds:
        way()
        passes += 1
    return passes / (now - started)


def table(rates: dict[str, list[float]], batch: int) -> str:
    """Markdown: of each way the median, the range, and the median over the first way's."""
    first = statistics.median(next(iter(rates.values())))
    lines = [f"| {batch} photos at a time | n | images/s, median | range | ratio |", "|---|---|---|---|---|"]
    for name, found in rates.items():
        median = statistics.median(found)
        lines.append(
            f"| {name} | {len(found)} | {median:.0f} | {min(found):.0f} to {max(found):.0f} | {median / first:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
