"""The DALI engine: one pipeline definition for the CPU and the GPU, the device a parameter.

The crop is known before the photo is read, so on a CPU the decoder skips the rest of the picture. DALI's own random
operators, readers and samplers are not used: paths, windows and flips come from the plan, one micro-batch at a time.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.data.dataset import Split
from pipelines.data.decode import SIZE_HAS_CHANGED, window_of
from pipelines.data.engines.base import Engine, EngineSettings, Fault, Pixels
from pipelines.data.engines.dali_check import fault_of_dali
from pipelines.data.engines.pillow import PillowEngine
from pipelines.data.headers import for_pillow
from pipelines.data.plan import Views
from pipelines.distributed.copies import to_device
from pipelines.errors import MachineError

import numpy as np
import torch

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

_READERS = ("fn.decoders.image", "fn.io.file.read", "fn.peek_image_shape")  # what fails because of a photo
# In a row, of photos that Pillow reads: then it is the decoder that fails. Each costs a new pipeline.
_MOST_FAILURES = 8
_MOST_PREALLOCATED = 2**30  # bytes


def image_pipeline(*, device: str, mean: Sequence[float], std: Sequence[float], largest: tuple[int, int]) -> Any:
    """Paths and views in; float32 [n, image_size, image_size, 3] and the photos' shapes, int64 [n, 3], out.

    For DALI's `pipeline_def`. device: "cpu" or "gpu". largest: height and width of photos for which a GPU's decoder
    makes room at once; for larger ones it does when they come.
    """
    from nvidia.dali import fn, types

    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    window = {
        "start": fn.external_source(name="window_start", dtype=types.INT32, ndim=1),
        "shape": fn.external_source(name="window_shape", dtype=types.INT32, ndim=1),
        "axis_names": "HW",
    }
    roi_start = fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=1)
    roi_end = fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    encoded = fn.io.file.read(paths)
    if device == "gpu":
        # Never a region of interest: with it nvImageCodec 0.9 crashes on a GPU (its issue #55).
        photos = fn.decoders.image(
            encoded,
            device="mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as on the CPU and in Pillow
            hw_decoder_load=1.0,  # below 1 and above 0 a photo's decoder depends on the rest of its batch
            affine=False,
            preallocate_height_hint=largest[0],
            preallocate_width_hint=largest[1],
        )
        windows, shapes = fn.slice(photos, **window, out_of_bounds_policy="pad"), photos.shape()
    else:
        windows = fn.decoders.image_slice(encoded, **window, output_type=types.RGB)
        shapes = fn.peek_image_shape(encoded)
    squares = fn.resize(
        windows,
        roi_start=roi_start,
        roi_end=roi_end,
        size=size,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    images = fn.crop_mirror_normalize(
        squares,
        mirror=flip,
        dtype=types.FLOAT,
        output_layout="HWC",  # dense rows of RGB are channels-last memory for PyTorch
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
    )
    return images, shapes


class DaliEngine:
    """See `base.Engine`.

    A photo that DALI cannot read is read by Pillow from then on, in its place in the batch, and so is what the scan
    marks (`headers.for_pillow`): the choice of the engine never changes which photos are used.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow", "pillow-heif")

    def __init__(self, settings: EngineSettings) -> None:
        self._split = split = settings.split
        self._device = settings.device
        self._of_pipeline = {
            "mean": tuple(settings.mean),
            "std": tuple(settings.std),
            "largest": _preallocated(split.sizes, settings.micro_batch),
            "num_threads": settings.threads,
        }
        self._micro_batch = settings.micro_batch
        self._pipeline = self._build(settings.micro_batch)
        self._pillow = PillowEngine(settings)
        self._not_for_dali: set[int] = set()  # positions in the split
        self._has_source = np.zeros(len(split), bool)  # looked for once, until something fails
        self._failures = 0  # in a row, of photos that Pillow reads
        self._submitted: deque[tuple[Views, np.ndarray]] = deque()  # and which of them are for Pillow
        self._held: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def submit(self, views: Views) -> None:
        by_pillow = self._is_for_pillow(views)
        self._submitted.append((views, by_pillow))
        self._start(views, by_pillow)

    def fetch(self) -> Pixels:
        views, by_pillow = self._submitted[0]
        try:
            outputs = None if by_pillow.all() else self._pipeline.share_outputs()
        except RuntimeError as error:
            self._recover(error)
            return self.fetch()
        self._failures = self._failures if outputs is None else 0
        images, sizes = self._nothing(views.image_size) if outputs is None else self._taken(self._pipeline, outputs)
        self._submitted.popleft()
        by_dali = np.flatnonzero(~by_pillow)
        changed = (sizes != self._split.sizes[views.indices[by_dali]]).any(axis=1)
        failed = dict.fromkeys(by_dali[changed].tolist(), SIZE_HAS_CHANGED)
        if not by_pillow.any() and not failed:
            return Pixels(images, {})
        merged = images.new_empty((len(views), *images.shape[1:])).contiguous(memory_format=torch.channels_last)
        merged.index_copy_(0, self._rows(by_dali), images)
        if by_pillow.any():
            pixels, positions = self._pillow.fetch(), np.flatnonzero(by_pillow)
            merged.index_copy_(0, self._rows(np.delete(positions, list(pixels.failed))), pixels.images)
            failed |= {int(positions[at]): reason for at, reason in pixels.failed.items()}
        if failed:
            merged = merged.index_select(0, self._rows(np.delete(np.arange(len(views)), list(failed))))
        return Pixels(merged, failed)

    def _rows(self, positions: np.ndarray) -> torch.Tensor:
        """For PyTorch, on the device; an index on the host would make a GPU's host wait."""
        return to_device(torch.from_numpy(positions), self._device)

    def cancel(self) -> None:
        # Pipeline.reset() in mid-epoch is silently ignored, so what was started is taken out and dropped.
        self._pillow.cancel()
        try:
            while self._submitted:
                _, by_pillow = self._submitted.popleft()
                if not by_pillow.all():
                    self._pipeline.share_outputs()
                    self._pipeline.release_outputs()
        except RuntimeError:
            self._submitted.clear()
            self._pipeline = self._build(self._micro_batch)

    def close(self) -> None:
        self.cancel()
        self._pillow.close()
        del self._pipeline
        if self._held:  # written by DALI, and read by kernels that may not have ended
            torch.cuda.current_stream(self._device).synchronize()
            self._held.clear()
        if self._device.type == "cuda":
            # Otherwise DALI's pool keeps what photos have taken.
            from nvidia.dali import backend

            backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]

    def _is_for_pillow(self, views: Views) -> np.ndarray:
        for index in views.indices[~self._has_source[views.indices]].tolist():
            self._has_source[index] = self._split.has_source(index)
        unreadable = for_pillow(self._split.kinds[views.indices]) | np.isin(views.indices, list(self._not_for_dali))
        return unreadable | ~self._has_source[views.indices]

    def _start(self, views: Views, by_pillow: np.ndarray) -> None:
        if not by_pillow.all():
            self._schedule(self._pipeline, views.select(~by_pillow))
        if by_pillow.any():
            self._pillow.submit(views.select(by_pillow))

    def _build(self, batch_size: int) -> "Pipeline":
        from nvidia.dali import pipeline_def

        gpu = self._device.type == "cuda"
        pipeline = pipeline_def(image_pipeline)(
            **self._of_pipeline,
            device="gpu" if gpu else "cpu",
            batch_size=batch_size,
            device_id=(self._device.index or 0) if gpu else None,
            # The first schedule_run would otherwise ask for several batches at once, and an epoch may have one.
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline

    def _schedule(self, pipeline: "Pipeline", views: Views) -> None:
        paths = [np.frombuffer(self._split.source(int(index)), np.uint8) for index in views.indices]
        pipeline.feed_input("paths", paths)
        pipeline.feed_input("window_start", np.ascontiguousarray(views.windows[:, :2]))
        pipeline.feed_input("window_shape", np.ascontiguousarray(views.windows[:, 2:]))
        # The part of the window, in its own pixels, that becomes the square.
        scale = views.windows[:, 2:] / views.resized
        pipeline.feed_input("roi_start", (views.anchors * scale).astype(np.float32))
        pipeline.feed_input("roi_end", ((views.anchors + views.image_size) * scale).astype(np.float32))
        pipeline.feed_input("size", np.full((len(views), 2), views.image_size, np.float32))
        pipeline.feed_input("flip", views.flips.astype(np.int32))
        pipeline.schedule_run()

    def _taken(self, pipeline: "Pipeline", outputs: tuple[Any, Any]) -> tuple[torch.Tensor, np.ndarray]:
        """The shared batch as float32 [n, 3, H, W], and the upright height and width of its photos, int32 [n, 2]."""
        pixels, shapes = outputs
        # As DALI's own iterator hands its batches over: each run has memory of its own, which the tensor keeps alive.
        images = torch.from_dlpack(pixels.as_tensor())
        if self._device.type == "cuda":
            self._hold(images)
        sizes = shapes.as_array()[:, :2].astype(np.int32)
        pipeline.release_outputs()
        return images.permute(0, 3, 1, 2), sizes

    def _hold(self, images: torch.Tensor) -> None:
        """Keeps a batch until a GPU has done what was queued before the next one was fetched.

        PyTorch's kernels run behind the host, on a stream that DALI's allocator does not wait for: the memory of a
        batch that Python has dropped would be the next one's at once.
        """
        if self._held:
            self._held[-1][1].record(torch.cuda.current_stream(self._device))
        while self._held and self._held[0][1].query():
            self._held.popleft()
        self._held.append((images, torch.cuda.Event()))

    def _nothing(self, image_size: int) -> tuple[torch.Tensor, np.ndarray]:
        shape = (0, image_size, image_size, 3)
        return torch.empty(shape, device=self._device).permute(0, 3, 1, 2), np.empty((0, 2), np.int32)

    def _recover(self, error: RuntimeError) -> None:
        """A pipeline is dead after an exception that does not name the photo: try the submitted ones one by one."""
        known, is_lost = len(self._not_for_dali), False
        self._has_source[:] = False
        probe = self._build(1)
        for views, by_pillow in self._submitted:
            for position in np.flatnonzero(~by_pillow):
                view = views.select(np.array([position]))
                if not self._split.has_source(int(views.indices[position])):  # a copy that somebody has removed
                    is_lost = True
                    continue
                try:
                    self._schedule(probe, view)
                    probe.share_outputs()
                    probe.release_outputs()
                    self._failures = 0
                except RuntimeError as failure:
                    if not any(operator in str(failure) for operator in _READERS):
                        break
                    self._failures += _is_readable(self._split, view)
                    if self._failures >= _MOST_FAILURES:
                        raise MachineError(
                            f"DALI cannot decode photos that are sound ({_reason(failure)}): give --loader pillow",
                            on_one_process=True,
                        ) from failure
                    self._not_for_dali.add(int(views.indices[position]))
                    probe = self._build(1)
        if len(self._not_for_dali) == known and not is_lost:
            line = f"DALI failed, not because of a photo: {_reason(error)}; try --loader pillow"
            raise MachineError(line, on_one_process=True) from error
        self._pillow.cancel()
        self._pipeline = self._build(self._micro_batch)
        again, self._submitted = [views for views, _ in self._submitted], deque()
        for views in again:
            self.submit(views)


def _is_readable(split: Split, view: Views) -> bool:
    """Whether Pillow makes a picture of a view's photo."""
    with suppress(Exception):  # its parsers raise many kinds of error on broken data
        window_of(split, view, 0)
        return True
    return False


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else len(lines)
    return lines[after] if after < len(lines) else lines[0]


ENGINE: type[Engine] = DaliEngine
AUTO_WITH = ("a GPU",)
USES_MEMORY = False


def fault(device: torch.device) -> Fault | None:
    """On a GPU it is tried in a child process first (`dali_check`)."""
    try:
        import nvidia.dali
    except ModuleNotFoundError:
        remedy = "install nvidia-dali-cuda130, whose wheels are for Linux on x86-64 and aarch64"
        return Fault("DALI is not installed here", remedy)
    if device.type != "cuda":
        return None
    # Of another CUDA than PyTorch's Accelerate would start, and DALI crash later.
    dali, ours = nvidia.dali.__cuda_version__ // 1000, int((torch.version.cuda or "0").split(".")[0])
    if dali != ours:
        return Fault(f"DALI is built for CUDA {dali}, PyTorch for CUDA {ours}", "install the build that fits")
    found = fault_of_dali(device)
    return Fault(found) if found else None


def _preallocated(sizes: np.ndarray, micro_batch: int) -> tuple[int, int]:
    """The largest height and width, or less: a decoder makes room for a whole batch of such photos, in RGB.

    sizes: int [N, 2]. A tall and a wide photo make a size that no photo has.
    """
    height, width = sizes.max(axis=0, initial=0).tolist()
    part = min(1.0, (_MOST_PREALLOCATED / max(1, micro_batch * 3 * height * width)) ** 0.5)
    return int(part * height), int(part * width)
