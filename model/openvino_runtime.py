"""OpenVINO as what computes frame embeddings on a CPU: our network as its graph, and that run.

The graph is built layer by layer, not traced: that takes a tenth of a second, says which numbers
may be rounded, and warns of nothing.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import Bottleneck

from model.frames import Clip, Preprocessing
from model.network import NetworkConfig, TrackletNet
from model.runtimes import Collect, Resolved

_CELLS = (1, 2)  # axes of a map (N, H, W)
_UNWRITTEN = -np.inf  # what no embedding and no attention holds


class OpenVinoRuntime:
    """The backbone, its attention and its pooling in OpenVINO; head and neck in PyTorch.

    In a bf16 graph OpenVINO rounds what leads to a convolution or a matrix product. Attention and
    pooling come after the last one and have none, so they stay float32; a head would not.

    Args:
        network: In eval mode; only its head and neck are used.
        graph: Of `build_graph`, or one like it, such as one in 8 bits.
        precision: "fp32" or "bf16".
        threads: Of the processor.
    """

    overlaps = False

    def __init__(
        self,
        network: TrackletNet,
        graph: Any,
        precision: Resolved,
        *,
        threads: int,
    ) -> None:
        self._head = nn.Sequential(network.head, network.neck)
        self._graph = graph
        # Some processors would compute in bfloat16 unasked.
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        self._request: Any = None
        self._thread: ThreadPoolExecutor | None = None

    def warm_up(self, max_frames: int) -> None:
        """Compile, and run as many frames as there will be at once."""
        if self._request is None:
            _, *size = self._graph.input(0).partial_shape.get_max_shape()
            self._run_apart(np.zeros((max_frames, *size), np.uint8))

    @torch.inference_mode()
    def launch(self, pieces: Sequence[Clip]) -> Collect:
        """See `FrameRuntime.launch`; all is done when it returns."""
        pooled, attention = self._run_apart(np.concatenate(pieces))
        embeddings: Tensor = self._head(torch.from_numpy(pooled))
        return lambda: (embeddings, torch.from_numpy(attention))

    def _run_apart(self, frames: Clip) -> tuple[Any, Any]:
        # OpenVINO gives the thread that runs it a stack of its own for signals and frees that with
        # the network; a signal that comes later then ends the process. So it has a thread to
        # itself, and Ctrl-C and SIGTERM stay safe in the others.
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openvino")
        return self._thread.submit(self._run, frames).result()

    def _run(self, frames: Clip) -> tuple[Any, Any]:
        if self._request is None:
            import openvino

            compiled = openvino.Core().compile_model(self._graph, "CPU", self._options)
            self._request = compiled.create_infer_request()
            self._graph = None  # its weights are held by what was compiled
        made = self._give_outputs(len(frames))
        try:
            self._request.infer([frames], share_inputs=True, share_outputs=True)
            # On one thread OpenVINO (2026.4) does not say that it has no memory, and its own
            # outputs are then still those of the call before: of another person.
            if any((one == _UNWRITTEN).any() for one in made):
                raise MemoryError(f"expected OpenVINO to embed {len(frames)} frames, got nothing")
        except (RuntimeError, MemoryError):
            # It keeps what it took before it failed, which may be all that there is.
            self._request.get_compiled_model().release_memory()
            raise
        return made[0], made[1]

    def _give_outputs(self, count: int) -> list[Any]:
        """Arrays into which the next run writes what it makes of so many frames."""
        import openvino

        made = []
        for place, output in enumerate(self._request.model_outputs):
            _, *shape = (size.get_max_length() for size in output.partial_shape)
            made.append(np.full((count, *shape), _UNWRITTEN, np.float32))
            self._request.set_output_tensor(place, openvino.Tensor(made[-1], shared_memory=True))
        return made


def build_graph(
    network: TrackletNet,
    preprocessing: Preprocessing,
    add_backbone: Callable[[Any], Any] | None = None,
) -> Any:
    """What OpenVINO compiles, an `openvino.Model`.

    Args:
        network: In eval mode.
        preprocessing: Of its frames.
        add_backbone: From normalised pixels (N, 3, height, width) to features (N, C, H, W), nodes
            of a graph, where not the network's own backbone does that.

    Returns:
        From "frames" (N, height, width, 3) uint8 to "pooled" (N, C) and "attention" (N, H, W),
        float32: what `model.network.pool_cells` makes, before any head.

    Raises:
        TypeError: The backbone has a layer that is not known here.
    """
    import openvino
    from openvino import opset13 as ops

    size = (preprocessing.height, preprocessing.width)
    frames = ops.parameter([-1, *size, 3], np.uint8, name="frames")
    mean = 255 * np.array(preprocessing.mean, np.float64)
    std = 255 * np.array(preprocessing.std, np.float64)
    pixels = ops.subtract(ops.convert(frames, "f32"), _constant(mean))
    pixels = ops.multiply(pixels, _constant(1 / std))
    pixels = ops.transpose(pixels, ops.constant(np.array([0, 3, 1, 2])))
    with torch.no_grad():
        add = add_backbone or partial(_add_layer, layer=network.backbone)
        features = add(pixels)  # (N, C, H, W)
    attention = _attend(features, network.config)  # (N, H, W)
    weights = ops.unsqueeze(attention, ops.constant(np.array([1])))
    # A product and a sum where a matrix product would do: see `OpenVinoRuntime`.
    weighted = ops.multiply(features, weights)
    reduce = ops.reduce_mean if network.config.pool == "mean" else ops.reduce_sum
    pooled = reduce(weighted, ops.constant(np.array([2, 3])), False)
    outputs = [ops.result(pooled, name="pooled"), ops.result(attention, name="attention")]
    return openvino.Model(outputs, [frames], "passerby")


def _constant(values: Any) -> Any:
    from openvino import opset13 as ops

    return ops.constant(np.asarray(values, np.float32))


def _add_layer(value: Any, layer: nn.Module) -> Any:
    """Continue a graph by a layer of a backbone."""
    from openvino import opset13 as ops

    if isinstance(layer, nn.Sequential):
        return _add_layers(value, list(layer))
    if isinstance(layer, Bottleneck):
        shortcut = value if layer.downsample is None else _add_layer(value, layer.downsample)
        value = _add_layers(value, [layer.conv1, layer.bn1, layer.relu])
        value = _add_layers(value, [layer.conv2, layer.bn2, layer.relu])
        value = _add_layers(value, [layer.conv3, layer.bn3])
        return ops.relu(ops.add(value, shortcut))
    if isinstance(layer, nn.ReLU):
        return ops.relu(value)
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride, padding = map(_pair, (layer.kernel_size, layer.stride, layer.padding))
        return ops.max_pool(value, stride, [1, 1], padding, padding, kernel).output(0)
    raise TypeError(f"expected a layer of a backbone, got {type(layer).__name__}")


def _add_layers(value: Any, layers: Sequence[nn.Module]) -> Any:
    for place, layer in enumerate(layers):
        following = layers[place + 1] if place + 1 < len(layers) else None
        if isinstance(layer, nn.Conv2d):
            if isinstance(following, nn.BatchNorm2d):
                layer = fuse_conv_bn_eval(layer, following)
            value = _convolve(value, layer)
        elif not isinstance(layer, nn.BatchNorm2d):  # which went into its convolution
            value = _add_layer(value, layer)
    return value


def _convolve(value: Any, layer: nn.Conv2d) -> Any:
    from openvino import opset13 as ops

    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise TypeError(f"expected a plain convolution, got {layer}")
    padding = list(layer.padding)
    weight = ops.constant(layer.weight.contiguous().float().cpu().numpy())
    made = ops.convolution(
        value, weight, list(layer.stride), padding, padding, list(layer.dilation)
    )
    if layer.bias is None:
        return made
    return ops.add(made, _constant(layer.bias.view(1, -1, 1, 1).float().cpu().numpy()))


def _pair(size: int | tuple[int, ...]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _attend(features: Any, config: NetworkConfig) -> Any:
    """`model.network.SpatialAttention`, from (N, C, H, W) to (N, H, W)."""
    from openvino import opset13 as ops

    cells = ops.constant(np.array(_CELLS))
    saliency = ops.reduce_sum(features, ops.constant(np.array([1])), False)  # (N, H, W)
    _, channels, height, width = (
        size.get_length() if size.is_static else -1 for size in features.get_output_partial_shape(0)
    )
    uniform = ops.broadcast(_constant(1 / (height * width)), ops.shape_of(saliency))
    if config.attention == "none":
        return uniform
    if config.attention == "l1":
        mass = ops.reduce_sum(saliency, cells, True)
        shares = ops.divide(saliency, ops.maximum(mass, _constant(1e-12)))
        return ops.select(ops.greater(mass, _constant(0)), shares, uniform)
    if config.attention == "mean":
        logits = ops.divide(saliency, _constant(channels))
    elif config.temperature == "std":
        logits = ops.divide(saliency, _deviation(saliency, cells))
    else:
        logits = ops.divide(saliency, _constant(config.temperature))
    flat = ops.reshape(logits, ops.constant(np.array([-1, height * width])), False)
    shape = ops.constant(np.array([-1, height, width]))
    return ops.reshape(ops.softmax(flat, 1), shape, False)


def _deviation(saliency: Any, cells: Any) -> Any:
    """Each map's deviation, kept from zero as `model.network.SpatialAttention` does."""
    from openvino import opset13 as ops

    centred = ops.subtract(saliency, ops.reduce_mean(saliency, cells, True))
    deviation = ops.sqrt(ops.reduce_mean(ops.multiply(centred, centred), cells, True))
    floor = ops.multiply(ops.reduce_mean(ops.abs(saliency), cells, True), _constant(1e-4))
    return ops.maximum(ops.maximum(deviation, floor), _constant(1e-12))
