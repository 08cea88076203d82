"""Runs a network in OpenVINO's format with PyTorch, on devices that OpenVINO has no plugin for.

A teacher is asked about every crop that its student is shown; on a GPU it must then answer there.
OpenVINO's own package computes on processors and GPUs of one maker. What is supported are the
layers of convolutional embedding networks, after the operation sets that OpenVINO documents (opset1
to opset8); anything else is refused by name.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import TeacherError
from model.files import reason

TYPES = {
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer as the file tells of it.

    Args:
        kind: Its type.
        data: Its attributes.
        sources: Identifiers of the layers that its inputs come from, in order.
    """

    kind: str
    data: Mapping[str, str]
    sources: tuple[str, ...]


class OpenVinoGraph(nn.Module):
    """A network of one input and one output from an ``.xml`` file and the ``.bin`` beside it.

    Args:
        path: Of the ``.xml`` file.

    Attributes:
        shape: Of its input, (N, C, H, W); -1 for any.

    Raises:
        TeacherError: A file is missing or damaged, the network has several inputs or outputs, or it
            has a layer that is not supported.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._layers = _read_layers(path)
        self._done_with = _last_uses(self._layers)
        self.shape = _input_shape(self._layers, path)
        try:
            weights = bytearray(path.with_suffix(".bin").read_bytes())
        except OSError as error:
            raise TeacherError(
                f"expected weights, could not read {path}: {reason(error)}"
            ) from error
        # Shapes and axes stay on the processor: to ask a GPU for a number is to wait for it.
        self._integers: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            if layer.kind == "Const":
                constant = _read_constant(layer.data, weights, path)
                if constant.is_floating_point():
                    self.register_buffer(f"const_{name}", constant)
                else:
                    self._integers[name] = constant
            elif layer.kind not in _KINDS:
                raise TeacherError(
                    f"expected layers among {', '.join(sorted(_KINDS))}, got {layer.kind}: {path}"
                )

    def forward(self, crops: Tensor) -> Tensor:
        """Run the network on crops, each for itself.

        Its file may say "one crop" in the middle, as a constant shape, so each is run as the file
        says and `torch.func.vmap` makes a batch of them.

        Args:
            crops: (N, C, H, W), floating.

        Returns:
            (N, ...), what the network says of each, in the same type.
        """
        made: Tensor = torch.func.vmap(self._run_one)(crops)
        return made

    def _run_one(self, crop: Tensor) -> Tensor:
        """(C, H, W) to the network's output without its batch dimension."""
        values: dict[str, Any] = {}
        for name, layer in self._layers.items():
            if layer.kind == "Parameter":
                values[name] = crop[None]
            elif name in self._integers:
                values[name] = self._integers[name]
            elif layer.kind == "Const":
                values[name] = getattr(self, f"const_{name}").to(crop.dtype)
            elif layer.kind == "Result":
                result: Tensor = values[layer.sources[0]]
                return result[0]
            else:
                inputs = [values[source] for source in layer.sources]
                values[name] = _KINDS[layer.kind](layer.data, *inputs)
            for source in self._done_with[name]:
                del values[source]
        raise TeacherError("expected a network with a result")


def _read_layers(path: Path) -> dict[str, _Layer]:
    """All layers, each after those that it takes from."""
    try:
        # A teacher is a file of the one who trains; nothing that a client sends comes here.
        root = ElementTree.parse(path).getroot()  # noqa: S314
    except (OSError, ElementTree.ParseError) as error:
        raise TeacherError(f"expected a network, could not read {path}: {error}") from error
    sources: dict[str, dict[int, str]] = {}
    used: dict[str, set[int]] = {}
    for edge in root.iterfind("edges/edge"):
        taken, source = sources.setdefault(edge.get("to-layer", ""), {}), edge.get("from-layer", "")
        taken[int(edge.get("to-port", "0"))] = source
        used.setdefault(source, set()).add(int(edge.get("from-port", "0")))
    if several := [name for name, ports in used.items() if len(ports) > 1]:
        raise TeacherError(
            f"expected layers with one output that is used, got several of layer {several[0]}: "
            f"{path}"
        )
    layers = {}
    for element in root.iterfind("layers/layer"):
        name, data = element.get("id", ""), element.find("data")
        taken = sources.get(name, {})
        layers[name] = _Layer(
            element.get("type", ""),
            {} if data is None else dict(data.attrib),
            tuple(taken[port] for port in sorted(taken)),
        )
    return _in_order(layers, path)


def _in_order(layers: dict[str, _Layer], path: Path) -> dict[str, _Layer]:
    """Sort layers so that each comes after its sources; a file need not list them so."""
    ordered: dict[str, _Layer] = {}
    waiting = layers
    while waiting:
        ready = {
            name: layer
            for name, layer in waiting.items()
            if all(source in ordered for source in layer.sources)
        }
        if not ready:
            raise TeacherError(f"expected a network without loops, got one: {path}")
        ordered |= ready
        waiting = {name: layer for name, layer in waiting.items() if name not in ready}
    return ordered


def _last_uses(layers: Mapping[str, _Layer]) -> dict[str, set[str]]:
    """After each layer, whose output nobody needs any more: to keep all would take far more memory.

    Args:
        layers: In order.
    """
    last = {source: name for name, layer in layers.items() for source in layer.sources}
    done: dict[str, set[str]] = {name: set() for name in layers}
    for source, name in last.items():
        done[name].add(source)
    return done


def _input_shape(layers: Mapping[str, _Layer], path: Path) -> tuple[int, ...]:
    inputs = [layer for layer in layers.values() if layer.kind == "Parameter"]
    outputs = [layer for layer in layers.values() if layer.kind == "Result"]
    if len(inputs) != 1 or len(outputs) != 1:
        raise TeacherError(
            f"expected a teacher with one input and one output, got {len(inputs)} and "
            f"{len(outputs)}: {path}"
        )
    return _numbers(inputs[0].data, "shape")


def _read_constant(data: Mapping[str, str], weights: bytearray, path: Path) -> Tensor:
    kind, shape = data.get("element_type", ""), _numbers(data, "shape")
    if kind not in TYPES:
        raise TeacherError(f"expected constants of {', '.join(TYPES)}, got {kind!r}: {path}")
    offset, count = int(data.get("offset", "0")), prod(shape)
    size = count * TYPES[kind].itemsize
    if offset + size > len(weights):
        raise TeacherError(
            f"expected at least {offset + size} bytes of weights, got {len(weights)}: {path}"
        )
    whole = torch.frombuffer(weights, dtype=TYPES[kind], count=count, offset=offset)
    return whole.reshape(shape).clone()


def _numbers(data: Mapping[str, str], name: str) -> tuple[int, ...]:
    """Comma-separated integers; none make a scalar's shape, and any size is -1."""
    sizes = [one.strip() for one in data.get(name, "").split(",")]
    return tuple(-1 if one == "?" else int(one) for one in sizes if one)


def _axes(axes: Tensor) -> list[int]:
    found: list[int] = axes.flatten().tolist()
    return found


def _convert(data: Mapping[str, str], value: Tensor) -> Tensor:
    # From one floating type to another is a matter of the file's size; we compute in one.
    integers = data["destination_type"].startswith(("i", "u"))
    return value.to(TYPES[data["destination_type"]]) if integers else value


def _padded(data: Mapping[str, str], value: Tensor, fill: float = 0.0) -> Tensor:
    """Pad as a layer says."""
    before, after = _pads(data)
    if not any(before + after):
        return value
    sides = [side for pair in zip(before, after, strict=True) for side in pair]
    # PyTorch wants the last dimension first.
    pairs = [sides[at : at + 2] for at in range(0, len(sides), 2)]
    return functional.pad(value, [side for pair in reversed(pairs) for side in pair], value=fill)


def _pads(data: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much a layer pads before and after each side."""
    if data.get("auto_pad", "explicit") not in ("explicit", "notset"):
        raise TeacherError(f"expected explicit padding, got auto_pad {data['auto_pad']}")
    return _numbers(data, "pads_begin"), _numbers(data, "pads_end")


def _convolution(data: Mapping[str, str], value: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    padding, after = _pads(data)
    if padding != after:
        value, padding = _padded(data, value), (0, 0)
    return functional.conv2d(
        value,
        kernel,
        stride=_numbers(data, "strides"),
        padding=padding,
        dilation=_numbers(data, "dilations"),
        groups=groups,
    )


def _group_convolution(data: Mapping[str, str], value: Tensor, kernel: Tensor) -> Tensor:
    """Its kernel is (groups, outputs of each, inputs of each, height, width)."""
    return _convolution(data, value, kernel.flatten(0, 1), groups=len(kernel))


def _normalise(data: Mapping[str, str], value: Tensor, axes: Tensor) -> Tensor:
    """Subtract the mean over axes and divide by the deviation (MVN of opset6)."""
    exact = value.float()
    variance, mean = torch.var_mean(exact, dim=_axes(axes), keepdim=True, correction=0)
    shifted = exact - mean
    if data["normalize_variance"] == "true":
        eps = float(data["eps"])
        if data["eps_mode"].upper() == "INSIDE_SQRT":
            shifted = shifted * (variance + eps).rsqrt()
        else:
            shifted = shifted / (variance.sqrt() + eps)
    return shifted.to(value.dtype)


def _prelu(_: Mapping[str, str], value: Tensor, slope: Tensor) -> Tensor:
    if slope.ndim == 1 and value.ndim > 1 and slope.numel() > 1:  # one for each channel
        slope = slope.view(1, -1, *[1] * (value.ndim - 2))
    return torch.where(value > 0, value, value * slope)


def _reduce_mean(data: Mapping[str, str], value: Tensor, axes: Tensor) -> Tensor:
    return value.mean(dim=_axes(axes), keepdim=data.get("keep_dims") == "true")


def _reshape(data: Mapping[str, str], value: Tensor, shape: Tensor) -> Tensor:
    sizes: list[int] = shape.flatten().tolist()
    if data.get("special_zero") == "true":
        sizes = [size or value.shape[place] for place, size in enumerate(sizes)]
    return value.reshape(sizes)


def _gather(data: Mapping[str, str], value: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
    if int(data.get("batch_dims", "0")):
        raise TeacherError(f"expected Gather without batch_dims, got {data['batch_dims']}")
    place = int(axis)
    if indices.ndim == 0:
        return value.select(place, int(indices))
    if indices.ndim > 1:
        raise TeacherError(f"expected Gather of a row of indices, got {tuple(indices.shape)}")
    # One by one: indices are on the processor, and few.
    return torch.stack([value.select(place, at) for at in indices.tolist()], dim=place)


def _broadcast(data: Mapping[str, str], value: Tensor, shape: Tensor) -> Tensor:
    if data.get("mode") != "numpy":
        raise TeacherError(f"expected Broadcast of mode numpy, got {data.get('mode')}")
    return value.expand(np.broadcast_shapes(value.shape, tuple(shape.tolist())))


def _matmul(data: Mapping[str, str], first: Tensor, second: Tensor) -> Tensor:
    if data.get("transpose_a") == "true":
        first = first.transpose(-1, -2)
    if data.get("transpose_b") == "true":
        second = second.transpose(-1, -2)
    return first @ second


def _max_pool(data: Mapping[str, str], value: Tensor) -> Tensor:
    _require_floor(data)
    dilation = _numbers(data, "dilations") or (1, 1)
    padded = _padded(data, value, fill=float("-inf"))
    return functional.max_pool2d(
        padded, _numbers(data, "kernel"), _numbers(data, "strides"), dilation=dilation
    )


def _average_pool(data: Mapping[str, str], value: Tensor) -> Tensor:
    _require_floor(data)
    before, after = _pads(data)
    if any(before + after):
        raise TeacherError("expected AvgPool without padding, got some")
    return functional.avg_pool2d(value, _numbers(data, "kernel"), _numbers(data, "strides"))


def _require_floor(data: Mapping[str, str]) -> None:
    if data.get("rounding_type", "floor") != "floor":
        raise TeacherError(f"expected pooling that rounds down, got {data['rounding_type']}")


_KINDS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, first, second: first + second,
    "AvgPool": _average_pool,
    "Broadcast": _broadcast,
    "Clamp": lambda data, value: value.clamp(float(data["min"]), float(data["max"])),
    "Concat": lambda data, *parts: torch.cat(parts, dim=int(data["axis"])),
    "Convert": _convert,
    "Convolution": _convolution,
    "Divide": lambda _, first, second: first / second,
    "Gather": _gather,
    "GroupConvolution": _group_convolution,
    "MVN": _normalise,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Maximum": lambda _, first, second: torch.maximum(first, second),
    "Minimum": lambda _, first, second: torch.minimum(first, second),
    "Multiply": lambda _, first, second: first * second,
    "PReLU": _prelu,
    "ReLU": lambda _, value: value.relu(),
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "ShapeOf": lambda _, value: torch.tensor(value.shape),
    "Sigmoid": lambda _, value: value.sigmoid(),
    "Subtract": lambda _, first, second: first - second,
    "Tanh": lambda _, value: value.tanh(),
}
# What is no operation but is handled where the network runs.
_KINDS |= dict.fromkeys(("Parameter", "Result"), lambda *_: torch.empty(0))
