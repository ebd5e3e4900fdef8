"""Where in a photo a network finds its answer: Grad-CAM (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from
Deep Networks via Gradient-based Localization").
"""

import threading

from pipelines.errors import UserError
from pipelines.model.folding import twin_of

import numpy as np
import torch
from torch import nn


class GradCam:
    """Heat maps of a network's last spatial feature map.

    network: torchvision's, as `TransferModel.network` is, on its device; nothing of it is changed, and frozen
    parameters make no difference. image_size: of the squares that it is given. test_flips: an answer is the mean of a
    photo's logits and its mirror image's, and so the map is the mean of theirs, laid upon each other. UserError where
    the network has no such map, as a vision transformer, which ends in tokens.
    """

    def __init__(self, network: nn.Module, image_size: int, *, test_flips: bool = False) -> None:
        self._network = twin_of(network)  # hooks are the twin's alone: others may ask the network at the same time
        self._test_flips = test_flips
        self._pass = threading.local()
        self._network.get_submodule(_last_map(self._network, image_size)).register_forward_hook(self._begin_graph)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """What speaks for the classes `labels`, int64 [n], in `images`, float [n, 3, H, W], normalised: float32
        [n, h, w], from 0 to 1, the hottest place's; h x w places that cover the square. All 0 where nothing does.

        It is the positive part of the feature map's channels, summed, each times the mean over its places of the
        logit's gradient.
        """
        maps = self._maps(images, labels)
        if self._test_flips:
            maps = maps + self._maps(images.flip(-1), labels).flip(-1)
        hottest = maps.amax(dim=(1, 2), keepdim=True)
        return (maps / torch.where(hottest > 0, hottest, 1)).cpu().numpy()

    def _maps(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            images, labels = images.clone(), labels.clone()  # autograd keeps no tensor of inference_mode
            logits = self._network(images)
            features = self._pass.__dict__.pop("features")
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
            weights = gradient.mean(dim=(2, 3), keepdim=True)
            return (weights * features.detach()).sum(dim=1).relu().float()

    def _begin_graph(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        """Autograd begins here, until the pass ends: what comes before takes no memory for it.

        What comes after may work in place, which a leaf forbids: hence a copy.
        """
        torch.set_grad_enabled(True)
        self._pass.features = output.detach().requires_grad_().clone()
        return self._pass.features


def _last_map(network: nn.Module, image_size: int) -> str:
    """The module whose output, [1, channels, h, w] of more than one place, is the last that has places."""
    found: list[tuple[str, torch.Size]] = []

    def note(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() > 2 and output[0, 0].numel() > 1:
            found.append((name, output.shape))

    # A network that pools to a fixed number of places, as VGG does, may repeat some: its map is what is pooled.
    hooks = [
        module.register_forward_hook(lambda *given, name=name: note(name, given[2]))
        for name, module in network.named_modules()
        if name and not isinstance(module, nn.AdaptiveAvgPool2d)
    ]
    try:
        parameter = next(network.parameters())
        with torch.inference_mode():
            network(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if not found or len(found[-1][1]) != 4:
        raise UserError(
            f"--explain: a {type(network).__name__} has no feature map at its end that Grad-CAM could show: leave the "
            "flag out"
        )
    return found[-1][0]
