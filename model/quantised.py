"""A backbone of 8-bit weights and activations: what it is, in PyTorch and for OpenVINO.

Between convolutions values are whole numbers from 0 to 255, with a scale and a zero for the whole
tensor; weights are whole numbers from -64 to 64, with a scale for each output channel. PyTorch
computes with the values that these stand for, which is exact and slow; OpenVINO multiplies the
whole numbers. `model.quantisation` makes such backbones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from model.network import Backbone, build_backbone

LEVELS = 255
"""The largest whole number that stands for an activation; the least is 0."""
# Processors without instructions for 8 bits (VNNI) add two products in 16 bits and clip the sum:
# with weights up to 127 the same file embeds by 3.5 % otherwise there. 2 * 255 * 64 just fits.
WEIGHT_LEVELS = 64
"""The largest whole number that stands for a weight; the least is its negative."""

Kind = Literal["input", "convolution", "relu", "max_pool", "add"]
_KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv2d: "convolution",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool",
}
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a backbone whose batch normalisations are folded.

    Args:
        kind: What it does.
        name: Of its module; "" where it has none.
        sources: Places of the steps that it takes from, in order.
        number: Of a convolution or a pooling: which of them, from 0.
        rounded: Which of the scales what it makes is rounded with; None where it is not.
        last_uses: Places of the steps whose values nobody needs after it.
    """

    kind: Kind
    name: str
    sources: tuple[int, ...]
    number: int
    rounded: int | None
    last_uses: tuple[int, ...]


def plan_steps(backbone: nn.Sequential) -> tuple[Step, ...]:
    """Take a backbone apart; batch normalisations are passed over.

    Rounded is whatever a convolution or an addition takes, so that both work on whole numbers. What
    a pooling makes are values of what it takes.

    Args:
        backbone: Of `model.network.build_backbone`.
    """
    modules = dict(backbone.named_modules())
    places: dict[fx.Node, int] = {}
    found: list[tuple[Kind, str, tuple[int, ...]]] = []
    for node in fx.Tracer().trace(backbone).nodes:
        if node.op == "output":
            break
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        sources = tuple(places[source] for source in node.all_input_nodes)
        if isinstance(module, nn.BatchNorm2d | nn.Identity):
            places[node] = sources[0]
            continue
        kind: Kind = "input" if node.op == "placeholder" else "add"
        if module is not None:
            kind = _KINDS[type(module)]
        places[node] = len(found)
        found.append((kind, "" if module is None else str(node.target), sources))
    return _number(found)


def _number(found: Sequence[tuple[Kind, str, tuple[int, ...]]]) -> tuple[Step, ...]:
    last = {source: place for place, (*_, sources) in enumerate(found) for source in sources}
    takers: dict[int, set[Kind]] = {}
    for kind, _, sources in found:
        for source in sources:
            takers.setdefault(source, set()).add(kind)
    steps: list[Step] = []
    for place, (kind, name, sources) in enumerate(found):
        whole = bool(takers.get(place, set()) & {"convolution", "add", "max_pool"})
        rounded = sum(step.rounded is not None for step in steps)
        steps.append(
            Step(
                kind,
                name,
                sources,
                number=sum(step.kind == kind for step in steps),
                rounded=rounded if whole and kind != "max_pool" else None,
                last_uses=tuple(source for source in set(sources) if last[source] == place),
            )
        )
    return tuple(steps)


def walk(steps: Sequence[Step], first: _V, compute: Callable[[Step, list[_V]], _V]) -> _V:
    """Go through the steps of a backbone with values of any kind.

    Args:
        steps: In order.
        first: What the first step is given.
        compute: Makes a step's value of those that it takes.

    Returns:
        The value of the last step.
    """
    values: dict[int, _V] = {}
    made = first
    for place, step in enumerate(steps):
        made = compute(step, [values[source] for source in step.sources] or [first])
        values[place] = made
        for source in step.last_uses:
            del values[source]
    return made


class QuantisedConvolution(nn.Module):
    """A convolution with 8-bit weights.

    Args:
        like: Whose shape, stride and padding it has; its weights are not looked at.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__()
        if like.groups != 1 or like.padding_mode != "zeros" or isinstance(like.padding, str):
            raise ValueError(f"expected a plain convolution, got {like}")
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.register_buffer("weight", torch.zeros(like.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(like.out_channels))
        self.register_buffer("bias", torch.zeros(like.out_channels))

    def forward(self, values: Tensor) -> Tensor:
        """(N, C, H, W) to (N, outputs, H', W'), float32."""
        weight = self.weight.float() * self.scale.view(-1, 1, 1, 1)
        return functional.conv2d(
            values, weight, self.bias, self.stride, self.padding, self.dilation
        )


class QuantisedBackbone(nn.Module):
    """Takes the place of ``TrackletNet.backbone``; its numbers are still to be filled in.

    What it does follows from its name alone: a file brings numbers, never a graph.

    Args:
        name: Of the backbone that it stands for.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(self, name: Backbone) -> None:
        super().__init__()
        with torch.device("meta"):  # for its shapes alone
            original = build_backbone(name)
        self.steps = plan_steps(original)
        modules = dict(original.named_modules())
        self._pools: list[Any] = [
            modules[step.name] for step in self.steps if step.kind == "max_pool"
        ]
        self.convolutions = nn.ModuleList(
            QuantisedConvolution(cast(nn.Conv2d, modules[step.name]))
            for step in self.steps
            if step.kind == "convolution"
        )
        rounded = sum(step.rounded is not None for step in self.steps)
        self.register_buffer("scales", torch.ones(rounded))
        self.register_buffer("zeros", torch.zeros(rounded, dtype=torch.uint8))

    def forward(self, frames: Tensor) -> Tensor:
        """Make feature maps as 8-bit hardware does, but for its last bits.

        Args:
            frames: (N, 3, height, width), RGB, normalised by `model.frames`.

        Returns:
            (N, C, H, W) float32, non-negative.
        """

        def compute(step: Step, sources: list[Tensor]) -> Tensor:
            return self.round(step, self.compute(step, sources))

        with torch.autocast(frames.device.type, enabled=False):
            return walk(self.steps, frames.float(), compute)

    def compute(self, step: Step, sources: Sequence[Tensor]) -> Tensor:
        """One step, before it is rounded."""
        if step.kind == "convolution":
            made: Tensor = self.convolution(step)(sources[0])
            return made
        return compute_plain(step, sources, self._pools)

    def convolution(self, step: Step) -> QuantisedConvolution:
        """The convolution of a step."""
        return cast(QuantisedConvolution, self.convolutions[step.number])

    def round(self, step: Step, values: Tensor) -> Tensor:
        """What 8 bits keep of a step's values; all of them where the step is not rounded."""
        if step.rounded is None:
            return values
        scale, zero = self.scales[step.rounded], self.zeros[step.rounded].int()
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, LEVELS)

    def add_to_graph(self, frames: Any) -> Any:
        """The same as nodes of OpenVINO, which recognises them and computes on whole numbers.

        Args:
            frames: A node, normalised pixels (N, 3, height, width).

        Returns:
            A node, feature maps (N, C, H, W) float32; for `model.openvino_runtime.build_graph`.
        """

        def compute(step: Step, sources: list[Any]) -> Any:
            return self._rounded_node(step, self._node(step, sources))

        return walk(self.steps, frames, compute)

    def _node(self, step: Step, sources: list[Any]) -> Any:
        from openvino import opset13 as ops

        if step.kind == "input":
            return sources[0]
        if step.kind == "relu":
            return ops.relu(sources[0])
        if step.kind == "add":
            return ops.add(*sources)
        if step.kind == "max_pool":
            pool = self._pools[step.number]
            sides = [_pair(one) for one in (pool.stride, pool.dilation, pool.padding)]
            strides, dilations, padding = sides
            [pooled, _] = ops.max_pool(
                sources[0], strides, dilations, padding, padding, _pair(pool.kernel_size)
            ).outputs()
            return pooled
        convolution = self.convolution(step)
        weight = ops.constant(convolution.weight.numpy())
        scale = ops.constant(convolution.scale.view(-1, 1, 1, 1).numpy())
        padding = list(convolution.padding)
        made = ops.convolution(
            sources[0],
            ops.multiply(ops.convert(weight, np.float32), scale),
            list(convolution.stride),
            padding,
            padding,
            list(convolution.dilation),
        )
        return ops.add(made, ops.constant(convolution.bias.view(1, -1, 1, 1).numpy()))

    def _rounded_node(self, step: Step, values: Any) -> Any:
        from openvino import opset13 as ops

        if step.rounded is None:
            return values
        scale, zero = float(self.scales[step.rounded]), int(self.zeros[step.rounded])
        ends = [np.float32(-zero * scale), np.float32((LEVELS - zero) * scale)]
        return ops.fake_quantize(values, *ends, *ends, levels=LEVELS + 1)


def compute_plain(step: Step, sources: Sequence[Tensor], pools: Sequence[Any]) -> Tensor:
    """One step that has no weights.

    Args:
        step: No convolution.
        sources: What it takes.
        pools: Of the backbone, by number.
    """
    if step.kind == "input":
        return sources[0]
    if step.kind == "relu":
        return sources[0].relu()
    if step.kind == "add":
        return sources[0] + sources[1]
    pooled: Tensor = pools[step.number](sources[0])
    return pooled


def _pair(sides: int | tuple[int, int]) -> list[int]:
    return [sides, sides] if isinstance(sides, int) else list(sides)
