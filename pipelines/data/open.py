"""The photos of a run, found and scanned once for all processes."""

from collections.abc import Callable
from pathlib import Path

from pipelines.cache import cache_folder
from pipelines.config import Config
from pipelines.data.dataset import Dataset, load_dataset, scan_dataset
from pipelines.data.samples import locate
from pipelines.data.shrink import ShrunkCopies
from pipelines.distributed.sync import on_main_process, share_file
from pipelines.errors import MachineError
from pipelines.text import printable

from accelerate import PartialState


def open_dataset(
    state: PartialState, config: Config, arrange: Callable[[Path], Path] = lambda index_file: index_file
) -> Dataset:
    """The photos that the setting `data` means, found and scanned by the main process, once for all.

    arrange: what is done to the index on the main process, for a run that goes on.
    """

    def scan() -> str:
        cache = cache_folder()
        index_file = scan_dataset(locate(config.data, cache), cache, config.val_fraction, config.class_names)
        return str(arrange(index_file))

    index = Path(on_main_process(state, scan))
    share_file(state, index)
    dataset = load_dataset(index, config.transparency)
    if dataset.fingerprint != on_main_process(state, lambda: dataset.fingerprint):
        told = "the processes have found other photos each, as while some are copied there: start again"
        raise MachineError(f"{printable(dataset.root)}: {told}")
    return dataset.shrunk(ShrunkCopies(config.shrink, cache_folder())) if config.shrink else dataset
