"""The model: a torchvision network with a head for the data's classes, cut into a frozen and a trained part."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pipelines.vision  # noqa: F401 (torchvision comes with it)
from pipelines.config import Config
from pipelines.data.plan import HEAD_WEIGHTS, random_bits, uniform
from pipelines.model.folding import Pair, foldable, folded
from pipelines.model.weights import Weights, head_name
from pipelines.text import composed

import numpy as np
import torch
from torch import nn
from torchvision import models, ops

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")  # of a ResNet; another network's body is one stage


class TransferModel(nn.Module):
    """A network whose first stages may be frozen: `forward_frozen` runs them without autograd, on images, and
    `forward_trained` the rest, on what that returns; `forward` one after the other.

    network: torchvision's; its state_dict is what is saved. head: its last layer, which is linear; head_name: what the
    network calls it. frozen_stages: how many of STAGES are frozen; of a network that is no ResNet all or none.
    batchnorm: "frozen" (statistics stay as they are, everywhere), or "train" or "sync" (they follow the batches, in
    the frozen part too); "none" where the network has none. Dropout and stochastic depth are left out. test_flips:
    whether `view_features` and `mean_logits`, which an evaluation asks, look at each photo's mirror image too.
    temperature: what `mean_logits` divides by, above 0 (Guo et al. 2017).
    A frozen part that is fixed is run by a copy with BatchNorm folded into its convolutions.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        frozen_stages: int,
        batchnorm: str,
        test_flips: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.head_name = head_name(network)
        self.batchnorm = batchnorm if batchnorms(network) else "none"
        self.test_flips = test_flips
        self.temperature = temperature
        # What it was made of, and it. In a tuple, and so no part of this module: not saved, not moved, not trained.
        self._folded_frozen_part: tuple[object, TransferModel] | None = None
        self._is_folded = False
        # It would be drawn otherwise on another number of processes, and after a stop.
        dropout = [each for each in network.modules() if isinstance(each, (nn.Dropout, ops.StochasticDepth)) and each.p]
        for module in dropout:
            module.p = 0.0
        self.dropout_is_left_out = bool(dropout)
        self.freeze(frozen_stages)
        self.train(network.training)  # a frozen BatchNorm is so from the start

    def freeze(self, frozen_stages: int) -> None:
        """Freezes the first `frozen_stages` of STAGES and no others; before an optimizer is made, or DDP."""
        self._frozen_stages = frozen_stages
        self._resting_stages = -1
        self.rest(frozen_stages)

    def rest(self, stages: int) -> bool:
        """Until another call the first `stages` of STAGES, those that are frozen among them, have no gradient, and so
        neither momentum nor decay moves them; all others have. Of a network that is no ResNet all rest or none.

        BatchNorm goes on as it is set: statistics that are trained follow the batches. Returns whether other parameters
        than before have a gradient now: what DDP has made of the network counts on those before.
        """
        is_change = stages != self._resting_stages
        self._resting_stages = stages
        self.network.requires_grad_(stages < len(STAGES))
        self.head.requires_grad_(True)
        if 0 < stages < len(STAGES):
            for part in self._layers(STAGES[:stages]):
                part.requires_grad_(False)
        return is_change

    def trained_stages(self) -> dict[str, list[nn.Parameter]]:
        """Of a ResNet, the parameters of each stage that is trained, the last stage first."""
        stages = reversed(STAGES[self._frozen_stages :])
        return {stage: [value for part in self._layers([stage]) for value in part.parameters()] for stage in stages}

    @property
    def head(self) -> nn.Linear:
        return self.network.get_submodule(self.head_name)

    @property
    def droppable(self) -> list[nn.Module]:
        """Of each block that `drop_path` may leave something out of, in order, the module that what it adds goes
        through, once or twice; none where the body is frozen or at rest."""
        if self._resting_stages == len(STAGES):
            return []
        return [module for module in self.network.modules() if isinstance(module, ops.StochasticDepth)]

    @property
    def frozen_part_is_fixed(self) -> bool:
        """Whether `forward_frozen` does something that is always the same for a view, so that once is enough."""
        return self._frozen_stages > 0 and self.batchnorm in ("frozen", "none")

    def reset_head(self) -> None:
        """The head's weights and bias are zeros from now on."""
        _draw_head(self.head, None)

    def frozen_digest(self) -> str:
        """Hex, of the frozen layers and their values: what `forward_frozen` makes of a photo depends on no others."""
        is_whole = self._frozen_stages == len(STAGES)
        digest = hashlib.blake2b(type(self.network).__name__.encode(), digest_size=16)
        for part in self._frozen_parts():
            for name, module in part.named_modules():
                if not list(module.children()) and module is not self.head:
                    digest.update(f"{name} {module}".encode())
            state = {name: value.cpu() for name, value in part.state_dict().items() if "num_batches" not in name}
            if is_whole:
                state = {name: value for name, value in state.items() if name.rpartition(".")[0] != self.head_name}
            digest.update(str([value.stride() for value in state.values()]).encode())
            digest.update(Weights(state, "").digest().encode())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> "TransferModel":
        super().train(mode)
        if self.batchnorm == "frozen":
            for module in batchnorms(self):
                module.eval()
        return self

    def forward_frozen(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, H, W] -> what `forward_trained` takes: the images themselves, feature maps or [n, features]."""
        if not self._frozen_stages:
            return images
        if self.frozen_part_is_fixed and not self._is_folded:
            return self._with_folded_frozen_part().forward_frozen(images)
        with torch.no_grad(), _NoStatisticsOfEmptyBatches(self, images):
            if self._frozen_stages == len(STAGES):
                return self._features(images)
            return self._run(STAGES[: self._frozen_stages], images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, H, W] -> logits float [n, classes]."""
        return self.forward_trained(self.forward_frozen(images))

    def forward_trained(
        self, hidden: torch.Tensor, scales: torch.Tensor | None = None, path_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of `forward_frozen` -> logits float [n, classes].

        scales: float32 [n, features], what the head's inputs are multiplied by; None for nothing. path_scales: float32
        [n, blocks, 2], what the additions of each block of `droppable` are; None for nothing.
        """
        with _NoStatisticsOfEmptyBatches(self, hidden), _ScaledPaths(self, path_scales):
            if not self._frozen_stages and scales is None:
                return self.network(hidden)
            if not self._frozen_stages and not isinstance(self.network, models.ResNet):
                hidden = self._features(hidden)
            elif self._frozen_stages < len(STAGES):
                hidden = self.network.avgpool(self._run(STAGES[self._frozen_stages :], hidden)).flatten(1)
            return self.head(hidden if scales is None else hidden * scales)

    def for_evaluation(self) -> "TransferModel":
        """A copy of the model as it is now, for the forward pass only, with BatchNorm folded into the convolutions."""
        start = self._with_folded_frozen_part() if self.frozen_part_is_fixed else self
        return self._folded(start.network, self._foldable)

    def view_features(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, H, W] -> what `mean_logits` takes: `forward_frozen`'s output, with `test_flips` [2n, ...]."""
        features = self.forward_frozen(images)
        return torch.cat([features, self.forward_frozen(images.flip(-1))]) if self.test_flips else features

    def mean_logits(self, features: torch.Tensor) -> torch.Tensor:
        """The output of `view_features` -> the views' mean logits over the temperature, float32 [n, classes].

        Their softmax is the geometric mean of the views' probabilities, normalised: confidence, loss and calibration
        follow from it as from a single view's. The views run one after the other, as `n` is what memory was chosen for.
        """
        views = features.chunk(1 + self.test_flips)
        return torch.stack([self.forward_trained(view).float() for view in views]).mean(dim=0) / self.temperature

    @functools.cached_property
    def _foldable(self) -> list[Pair]:
        return foldable(self.network)

    def _with_folded_frozen_part(self) -> "TransferModel":
        """Made anew where the weights have been loaded, moved to a device or laid out otherwise since.

        Of the frozen stages alone, also in an average, whose weights all need no gradient: what moves it on a GPU
        (torch._foreach_lerp_) counts no version there.
        """
        layers = [module for part in self._frozen_parts() for module in part.modules() if module is not self.head]
        values = [value for each in layers for value in chain(each.parameters(False), each.buffers(False))]
        state = [(value.data_ptr(), value._version) for value in values]
        if self._folded_frozen_part is None or self._folded_frozen_part[0] != state:
            self._folded_frozen_part = None  # its memory is free before the next takes some
            frozen = [pair for pair in self._foldable if self.network.get_submodule(pair[0]) in layers]
            self._folded_frozen_part = (state, self._folded(self.network, frozen))
        return self._folded_frozen_part[1]

    def _folded(self, network: nn.Module, pairs: Sequence[Pair]) -> "TransferModel":
        settings: Any = {"batchnorm": self.batchnorm, "test_flips": self.test_flips, "temperature": self.temperature}
        model = TransferModel(folded(network, pairs), frozen_stages=self._frozen_stages, **settings)
        model._is_folded = True
        model.rest(self._resting_stages)  # most of its parameters are this network's own
        return model

    def _frozen_parts(self) -> list[nn.Module]:
        """The modules of the frozen stages; of a network that is frozen as a whole all of it, the head included."""
        is_whole = self._frozen_stages == len(STAGES)
        return [self.network] if is_whole else self._layers(STAGES[: self._frozen_stages])

    def _layers(self, stages: Sequence[str]) -> list[nn.Module]:
        net = self.network
        parts = {"stem": [net.conv1, net.bn1, net.relu, net.maxpool]}
        return [module for stage in stages for module in parts.get(stage) or [getattr(net, stage)]]

    def _run(self, stages: Sequence[str], hidden: torch.Tensor) -> torch.Tensor:
        for module in self._layers(stages):
            hidden = module(hidden)
        return hidden

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            self.network(images)
        finally:
            hook.remove()
        return found[0]


class TrainedPart(nn.Module):
    """What an update runs of a model, for DDP and torch.compile, which go by `forward`: it takes features."""

    def __init__(self, model: TransferModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: torch.Tensor, scales: torch.Tensor | None = None, path_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the model's `forward_trained`."""
        return self.model.forward_trained(features, scales, path_scales)


class _NoStatisticsOfEmptyBatches:
    """BatchNorm in train mode would take the mean of no photo at all, NaN, into its statistics.

    SyncBatchNorm goes on: it knows empty shares, and the other processes wait for it.
    """

    def __init__(self, model: nn.Module, batch: torch.Tensor) -> None:
        alone = [module for module in batchnorms(model) if not isinstance(module, nn.SyncBatchNorm)]
        self._paused = [] if len(batch) else [module for module in alone if module.training]

    def __enter__(self) -> None:
        for module in self._paused:
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module in self._paused:
            module.train()


class _ScaledPaths:
    """Multiplies what comes out of a model's `droppable` modules, in their first call and in their second."""

    def __init__(self, model: TransferModel, scales: torch.Tensor | None) -> None:
        self._of_modules = [] if scales is None else [*zip(model.droppable, scales.unbind(1), strict=True)]
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for module, scales in self._of_modules:
            calls = iter(scales.unbind(1))

            def scaled(_: nn.Module, __: object, output: torch.Tensor, calls: Any = calls) -> torch.Tensor:
                factors = next(calls).to(output.dtype)
                return output * factors.view(len(factors), *[1] * (output.ndim - 1))

            self._hooks.append(module.register_forward_hook(scaled))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def batchnorms(model: nn.Module) -> list[Any]:
    """The model's BatchNorm layers, synchronised ones included."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def build_model(config: Config, weights: Weights, classes: Sequence[str]) -> TransferModel:
    """The model that `config` describes, on the CPU, with `weights` and a head for `classes`.

    The head is the weights' own where they come from a run with the same classes. Otherwise it is new: drawn from the
    seed where `head_init` is uniform, else zeros.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # for random weights; pretrained ones overwrite what is drawn here
        network = models.get_model(config.arch, weights=None, num_classes=len(classes))
    head = head_name(network)
    same_classes = has_head_for(classes, weights)
    if weights.state:
        # Strict, so that no layer stays random: of the network as it was drawn only a new head is kept.
        new_head = {} if same_classes else network.get_submodule(head).state_dict(prefix=f"{head}.")
        _load(network, {**weights.state, **new_head})
    if not same_classes:
        _draw_head(network.get_submodule(head), config.seed if config.head_init == "uniform" else None)
    batchnorm = resolve_batchnorm(config, weights)
    if batchnorm == "sync" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    model = TransferModel(
        network, frozen_stages=frozen_stages(config, config.freeze), batchnorm=batchnorm, test_flips=config.test_flips
    )
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def has_head_for(classes: Sequence[str], weights: Weights) -> bool:
    """Whether the weights come from a run with the same classes."""
    return [*map(composed, weights.classes or ())] == [*map(composed, classes)]


def restore_model(arch: str, weights: Weights, *, test_flips: bool = False, temperature: float = 1.0) -> TransferModel:
    """A trained model as it was saved, head and all, for evaluation only; `weights` has state and classes."""
    network = models.get_model(arch, weights=None, num_classes=len(weights.classes or ()))
    _load(network, weights.state or {})
    answering: Any = {"test_flips": test_flips, "temperature": temperature}
    model = TransferModel(network, frozen_stages=0, batchnorm="frozen", **answering)
    return model.to(memory_format=torch.channels_last)


def _load(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Strictly; buffers that are no statistics, as a Swin's table of positions, are the network's own in any file."""
    own = {name: value for name, value in network.named_buffers() if not name.endswith(_STATISTICS)}
    network.load_state_dict({**state, **own})


def resolve_batchnorm(config: Config, weights: Weights) -> str:
    """The setting `batchnorm` with `auto` resolved: frozen with pretrained weights, train from scratch."""
    if config.batchnorm != "auto":
        return config.batchnorm
    return "train" if weights.state is None else "frozen"


def average_batchnorm_statistics(model: TransferModel, world_size: int) -> None:
    """Makes the running statistics one and the same on all processes, each of which has seen photos of its own.

    A mean, weighted by the batches that each has seen: a process that had no photo so far has nothing to say. Where no
    process has seen any, as before the first update, they are those of the first weights and stay.
    """
    if world_size == 1 or model.batchnorm != "train":  # the others are the same already, and rounding would move them
        return
    for module in batchnorms(model):
        batches = module.num_batches_tracked.to(module.running_mean.dtype)
        all_batches = batches.clone()
        torch.distributed.all_reduce(all_batches)
        for buffer in (module.running_mean, module.running_var):
            mean = buffer * (batches / all_batches.clamp(min=1))
            torch.distributed.all_reduce(mean)
            buffer.copy_(torch.where(all_batches > 0, mean, buffer))
        torch.distributed.all_reduce(module.num_batches_tracked, torch.distributed.ReduceOp.MAX)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def frozen_stages(config: Config, freeze: str) -> int:
    """How many of STAGES are frozen, `freeze` being the setting's value, or what `auto` has come to; 0 before that."""
    if config.mode == "feature_extract":
        return len(STAGES)
    return STAGES.index(freeze) + 1 if freeze in STAGES else 0


def _draw_head(head: nn.Linear, seed: int | None) -> None:
    """PyTorch's default, uniform in +-1/sqrt(features), from the plan's bits: the same on every machine and version.

    Without a seed, zeros.
    """
    if seed is None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return
    values = uniform(random_bits(seed, HEAD_WEIGHTS, np.arange(head.weight.numel() + head.bias.numel())))
    drawn = torch.from_numpy((2 * values - 1) / np.sqrt(head.in_features)).float()
    with torch.no_grad():
        head.weight.copy_(drawn[: head.weight.numel()].view_as(head.weight))
        head.bias.copy_(drawn[head.weight.numel() :])
