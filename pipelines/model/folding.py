"""BatchNorm in eval mode is a factor and a sum for each channel: they can be taken into the convolution before it."""

import copy
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Pair = tuple[str, str]  # names of a convolution and of the BatchNorm that alone takes its output


def foldable(network: nn.Module) -> list[Pair]:
    """What can be folded in a network that torch.fx can trace, as torchvision's can."""
    network = twin_of(network)
    modules = dict(network.named_modules())
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()):
        return []
    tracer = fx.Tracer()
    nodes = tracer.trace(network).nodes
    del tracer.root  # the traced functions refer to the tracer, and it would hold the weights until a later collection
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.modules.batchnorm._BatchNorm):
            continue
        source: Any = node.args[0]
        follows = source.op == "call_module" and isinstance(modules[source.target], nn.Conv2d)
        if follows and len(source.users) == calls[source.target] == calls[node.target] == 1:
            pairs.append((source.target, str(node.target)))
    return pairs


def folded(network: nn.Module, pairs: Iterable[Pair]) -> nn.Module:
    """A copy in eval mode, for the forward pass only, without the BatchNorm layers of `pairs`; equal to float rounding.

    All other parameters and buffers are the network's own, not copies: only the new weights take memory.
    """
    with torch.inference_mode(False), torch.no_grad():
        twin = twin_of(network)
        for convolution, batchnorm in pairs:
            before: Any = twin.get_submodule(convolution)
            after: Any = twin.get_submodule(batchnorm)
            if not isinstance(after, nn.Identity):  # as it is where this pair has been folded before
                twin.set_submodule(convolution, fuse_conv_bn_eval(before, after))
                twin.set_submodule(batchnorm, nn.Identity())
    return twin


def twin_of(network: nn.Module) -> nn.Module:
    """The modules anew, in eval mode; their parameters and buffers are the same ones."""
    return copy.deepcopy(network, {id(value): value for value in chain(network.parameters(), network.buffers())}).eval()
