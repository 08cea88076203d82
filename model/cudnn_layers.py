"""Layers of a backbone for a GPU: a convolution with all that follows it in one cuDNN kernel.

PyTorch alone adds the bias, adds the shortcut and cuts at zero in kernels of their own, each of
which reads and writes all features once more. No compiler is needed for these.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from model.network import TrackletNet


class ConvolutionRelu(nn.Module):
    """A convolution, cut at zero."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to what the convolution makes of it."""
        one: Any = self.layer
        return torch.cudnn_convolution_relu(
            features, one.weight, one.bias, one.stride, one.padding, one.dilation, one.groups
        )


class FusedBottleneck(nn.Module):
    """A bottleneck of a ResNet whose batch normalisations are folded."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.first, self.second = ConvolutionRelu(block.conv1), ConvolutionRelu(block.conv2)
        self.last, self.downsample = block.conv3, block.downsample

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to what the block makes of it."""
        shortcut = features if self.downsample is None else self.downsample(features)
        one, features = self.last, self.second(self.first(features))
        return torch.cudnn_convolution_add_relu(
            features,
            one.weight,
            shortcut,
            1.0,
            one.bias,
            one.stride,
            one.padding,
            one.dilation,
            one.groups,
        )


def with_fused_convolutions(network: TrackletNet) -> TrackletNet:
    """The same network and weights, its backbone in fewer kernels.

    Args:
        network: Of `model.embedder.fold_batch_norm`, on a GPU.
    """
    fused = copy.copy(network)
    fused._modules = dict(network._modules)
    fused.backbone = fuse(network.backbone)
    return fused


def fuse(backbone: nn.Sequential) -> nn.Sequential:
    """See `with_fused_convolutions`."""
    layers = [layer for layer in backbone if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*_fuse_layers(layers))


def _fuse_layers(layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for place, layer in enumerate(layers):
        following = layers[place + 1] if place + 1 < len(layers) else None
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.ReLU):
            yield ConvolutionRelu(layer)
        elif isinstance(layer, nn.ReLU) and isinstance(layers[place - 1], nn.Conv2d):
            continue  # it went into its convolution
        elif isinstance(layer, Bottleneck):
            yield FusedBottleneck(layer)
        elif isinstance(layer, nn.Sequential):
            yield fuse(layer)
        else:
            yield layer
