"""Photos that are mixed with others, mixup and CutMix, behind the engine and all that is done to a photo alone.

The plan has drawn partners and shares (`plan.Mixing`). Where a photo's partner stands in another batch, of this process
or of another one, it is decoded for this batch too: so neither the processes nor the micro-batches make a difference.
"""

from dataclasses import dataclass, replace

from pipelines.data.augment import in_boxes
from pipelines.data.plan import Mixing, Plan, TrainPlan, Views
from pipelines.distributed.copies import to_device

import numpy as np
import torch

MOST_OTHERS = 2  # partners that a batch of neighbours needs from others: of its first photo and of its last


@dataclass(frozen=True)
class MixedViews:
    """The views of a batch's photos, and behind them those of partners from other batches.

    mixing: of the photos; a partner's place is one among `views`. None where no photo is mixed.
    """

    views: Views
    mixing: Mixing | None = None

    def __len__(self) -> int:
        """The batch's photos."""
        return len(self.views if self.mixing is None else self.mixing.partners)

    @property
    def indices(self) -> np.ndarray:
        """int64 [n], of the batch's photos, in the dataset's split."""
        return self.views.indices[: len(self)]

    def select(self, kept: np.ndarray) -> "MixedViews":
        """Without those views where `kept`, bool, is False; who loses a partner stays as it is."""
        if self.mixing is None:
            return MixedViews(self.views.select(kept))
        photos, places = np.flatnonzero(kept[: len(self)]), np.cumsum(kept) - 1
        mixing = Mixing(self.mixing.partners[photos], self.mixing.shares[photos], self.mixing.boxes[photos])
        has_partner = kept[mixing.partners]
        mixing = Mixing(
            partners=places[np.where(has_partner, mixing.partners, photos)],
            shares=np.where(has_partner, mixing.shares, np.float32(1)),
            boxes=mixing.boxes * has_partner[:, None],
        )
        return MixedViews(self.views.select(kept), mixing)


def mixed_views(plan: Plan, epoch: int, positions: np.ndarray) -> MixedViews:
    """What a batch of the photos at `positions` (int64 [n], ascending) of `epoch` is made of."""
    mixing = plan.mixing(epoch, positions) if isinstance(plan, TrainPlan) else None
    if mixing is None:
        return MixedViews(plan.views(epoch, positions))
    everyone = np.concatenate([positions, np.setdiff1d(mixing.partners, positions)])
    order = np.argsort(everyone)
    places = order[np.searchsorted(everyone, mixing.partners, sorter=order)]
    return MixedViews(plan.views(epoch, everyone), replace(mixing, partners=places))


def mixed(images: torch.Tensor, mixing: Mixing) -> torch.Tensor:
    """The first n of the images, as `mixing` says, without waiting for the device.

    images: float32 [n or more, 3, size, size], channels last in memory; so is what is returned, of n.
    """
    partners = images.index_select(0, to_device(torch.from_numpy(mixing.partners), images.device))
    shares = to_device(torch.from_numpy(mixing.shares), images.device).view(-1, 1, 1, 1)
    if mixing.boxes.any():
        boxes = to_device(torch.from_numpy(mixing.boxes), images.device)
        is_own = ~in_boxes(boxes, images.shape[2])
        shares = torch.where(boxes[:, 2].view(-1, 1, 1, 1) > 0, is_own.to(shares.dtype), shares)
    result = images[: len(mixing.shares)] * shares + partners * (1 - shares)
    return result.contiguous(memory_format=torch.channels_last)
