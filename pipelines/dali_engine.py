"""The DALI engine: one pipeline definition for the CPU and the GPU, the device a parameter.

The crop is known before the photo is read, so the decoder skips the rest of the picture. DALI's own random operators,
readers and samplers are not used: paths, windows and flips are fed in from the plan, one micro-batch at a time.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from pipelines.dataset import Split
from pipelines.errors import MachineError
from pipelines.headers import for_pillow
from pipelines.loader import Pixels
from pipelines.plan import Views
from pipelines.torch_engine import SIZE_HAS_CHANGED, TorchEngine

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

_READERS = ("fn.decoders.image_slice", "fn.io.file.read", "fn.peek_image_shape")  # what fails because of a photo
_LONGEST = 16  # sides of the kept square


@pipeline_def
def image_pipeline(*, device: str, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Paths and views in; float32 [n, image_size, image_size, 3] and the photos' shapes, int64 [n, 3], out.

    device: "cpu" or "gpu".
    """
    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    window_start = fn.external_source(name="window_start", dtype=types.INT32, ndim=1)
    window_shape = fn.external_source(name="window_shape", dtype=types.INT32, ndim=1)
    resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    encoded = fn.io.file.read(paths)
    images = fn.decoders.image_slice(
        encoded,
        start=window_start,
        shape=window_shape,
        axis_names="HW",
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        # On a GPU the default is false, unlike on the CPU and in Pillow.
        jpeg_fancy_upsampling=True,
    )
    # At the window's edge DALI's filter repeats the last pixel; Pillow's and torchvision's leaves the outside out. So
    # the outside is made black, and the edge brightened by what is then missing.
    margin = fn.external_source(name="margin", dtype=types.INT32, ndim=1)
    edge_gain = [fn.external_source(name=f"edge_gain_{axis}", dtype=types.FLOAT, ndim=3) for axis in "yx"]
    bordered = fn.slice(
        images,
        start=-margin,
        shape=window_shape + 2 * margin,
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    roi = {
        "roi_start": fn.cast(margin, dtype=types.FLOAT),
        "roi_end": fn.cast(margin + window_shape, dtype=types.FLOAT),
    }
    images = fn.resize(
        bordered, **roi, size=resized, interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.FLOAT
    )
    images = fn.slice(images, start=anchor, shape=[image_size, image_size], axis_names="HW")
    gain_y, gain_x = (gain.gpu() for gain in edge_gain) if device == "gpu" else edge_gain
    images = fn.cast(images * gain_y * gain_x, dtype=types.UINT8)  # rounds, as Pillow does
    images = fn.crop_mirror_normalize(
        images,
        mirror=flip,
        dtype=types.FLOAT,
        output_layout="HWC",  # dense rows of RGB are channels-last memory for PyTorch
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
    )
    return images, fn.peek_image_shape(encoded)


class DaliEngine:
    """See `loader.Engine`. micro_batch: the most views of one `submit`; threads: CPU threads.

    A photo that DALI cannot read is read by Pillow from then on, in its place in the batch, and so is what the scan
    marks (`headers.for_pillow`): the choice of the engine never changes which photos are used.
    """

    def __init__(
        self,
        split: Split,
        image_size: int,
        micro_batch: int,
        device: torch.device,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._split = split
        self._device = device
        self._image_size = image_size
        self._settings = {"image_size": image_size, "mean": tuple(mean), "std": tuple(std), "num_threads": threads}
        self._micro_batch = micro_batch
        self._pipeline = self._build(micro_batch)
        self._pillow = TorchEngine(split, image_size, device, threads, mean, std)
        self._not_for_dali: set[int] = set()  # positions in the split
        self._submitted: deque[tuple[Views, np.ndarray]] = deque()  # and which of them are for Pillow

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
        images, sizes = self._nothing() if outputs is None else self._taken(self._pipeline, outputs)
        self._submitted.popleft()
        by_dali = np.flatnonzero(~by_pillow)
        changed = (sizes != self._split.sizes[views.indices[by_dali]]).any(axis=1)
        failed = dict.fromkeys(by_dali[changed].tolist(), SIZE_HAS_CHANGED)
        if not by_pillow.any() and not failed:
            return Pixels(images, {})
        merged = images.new_empty((len(views), *images.shape[1:])).contiguous(memory_format=torch.channels_last)
        merged[by_dali] = images
        if by_pillow.any():
            pixels, positions = self._pillow.fetch(), np.flatnonzero(by_pillow)
            merged[np.delete(positions, list(pixels.failed))] = pixels.images
            failed |= {int(positions[at]): reason for at, reason in pixels.failed.items()}
        return Pixels(merged[np.delete(np.arange(len(views)), list(failed))], failed)

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

    def _is_for_pillow(self, views: Views) -> np.ndarray:
        # Of a strip of 1 x 5000 pixels DALI would resize all, to gigabytes; Pillow computes the square that is kept.
        is_strip = views.resized.max(axis=1) > _LONGEST * self._image_size
        return (
            is_strip | for_pillow(self._split.kinds[views.indices]) | np.isin(views.indices, list(self._not_for_dali))
        )

    def _start(self, views: Views, by_pillow: np.ndarray) -> None:
        if not by_pillow.all():
            self._schedule(self._pipeline, views.select(~by_pillow))
        if by_pillow.any():
            self._pillow.submit(views.select(by_pillow))

    def _build(self, batch_size: int) -> Pipeline:
        gpu = self._device.type == "cuda"
        pipeline = image_pipeline(
            **self._settings,
            device="gpu" if gpu else "cpu",
            batch_size=batch_size,
            device_id=(self._device.index or 0) if gpu else None,
            # The first schedule_run would otherwise ask for several batches at once, and an epoch may have one.
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline

    def _schedule(self, pipeline: Pipeline, views: Views) -> None:
        paths = [np.frombuffer(self._split.path_bytes(int(index)), np.uint8) for index in views.indices]
        pipeline.feed_input("paths", paths)
        pipeline.feed_input("window_start", np.ascontiguousarray(views.windows[:, :2]))
        pipeline.feed_input("window_shape", np.ascontiguousarray(views.windows[:, 2:]))
        pipeline.feed_input("resized", views.resized.astype(np.float32))
        pipeline.feed_input("anchor", views.anchors)
        margin, gain_y, gain_x = edge_correction(views, self._image_size)
        pipeline.feed_input("margin", margin)
        pipeline.feed_input("edge_gain_y", gain_y[:, :, None, None])
        pipeline.feed_input("edge_gain_x", gain_x[:, None, :, None])
        pipeline.feed_input("flip", views.flips.astype(np.int32))
        pipeline.schedule_run()

    def _taken(self, pipeline: Pipeline, outputs: tuple[Any, Any]) -> tuple[torch.Tensor, np.ndarray]:
        """The shared batch as float32 [n, 3, H, W], and the upright height and width of its photos, int32 [n, 2]."""
        pixels, shapes = outputs
        dense = pixels.as_tensor()
        images = torch.empty(dense.shape(), dtype=torch.float32, device=self._device)
        if self._device.type == "cuda":
            feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(self._device))
        else:
            feed_ndarray(dense, images)
        sizes = shapes.as_array()[:, :2].astype(np.int32)
        pipeline.release_outputs()
        return images.permute(0, 3, 1, 2), sizes

    def _nothing(self) -> tuple[torch.Tensor, np.ndarray]:
        shape = (0, self._image_size, self._image_size, 3)
        return torch.empty(shape, device=self._device).permute(0, 3, 1, 2), np.empty((0, 2), np.int32)

    def _recover(self, error: RuntimeError) -> None:
        """A pipeline is dead after an exception that does not name the photo: try the submitted ones one by one."""
        known = len(self._not_for_dali)
        probe = self._build(1)
        for views, by_pillow in self._submitted:
            for position in np.flatnonzero(~by_pillow):
                try:
                    self._schedule(probe, views.select(np.array([position])))
                    probe.share_outputs()
                    probe.release_outputs()
                except RuntimeError as failure:
                    if not any(operator in str(failure) for operator in _READERS):
                        break
                    self._not_for_dali.add(int(views.indices[position]))
                    probe = self._build(1)
        if len(self._not_for_dali) == known:
            line = f"DALI failed, not because of a photo: {_reason(error)}; try --loader torch"
            raise MachineError(line, on_one_process=True) from error
        self._pillow.cancel()
        self._pipeline = self._build(self._micro_batch)
        again, self._submitted = [views for views, _ in self._submitted], deque()
        for views in again:
            self.submit(views)


def edge_correction(views: Views, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What makes up for DALI's treatment of a window's edge, where the window is made smaller.

    Returns int32 [n, 2], the black pixels to put around each window, above and below, left and right; and, for rows and
    for columns, float32 [n, image_size], what to multiply them by. Only the first and the last row or column of a
    resized window reach over its edge: their centre is half a resized pixel from it, and the triangle is one wide.
    """
    scale = views.windows[:, 2:] / views.resized  # [n, 2]
    support = np.maximum(scale, 1)
    taps = np.arange(-int(np.ceil(support.max())) - 1, int(np.ceil(2 * support.max())) + 1)
    weights = np.maximum(0, 1 - np.abs(taps + 0.5 - scale[..., None] / 2) / support[..., None])  # [n, 2, taps]
    inside = weights[..., taps >= 0].sum(axis=-1) / weights.sum(axis=-1)
    margin = np.where(scale > 1, np.ceil(support), 0).astype(np.int32)
    gain = np.ones((2, len(views), image_size), np.float32)
    for axis in (0, 1):
        for edge in (0, views.resized[:, axis] - 1):
            at = edge - views.anchors[:, axis]
            kept = np.flatnonzero((at >= 0) & (at < image_size) & (scale[:, axis] > 1))
            gain[axis, kept, at[kept]] = 1 / inside[kept, axis]
    return margin, gain[0], gain[1]


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else len(lines)
    return lines[after] if after < len(lines) else lines[0]
