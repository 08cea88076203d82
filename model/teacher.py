"""A teacher: a network that makes one embedding of one crop, for another network to learn from.

It is a file, ONNX or OpenVINO IR, or a checkpoint of ours. What it says of a data set is kept by
`model.teacher_cache`, and what a student makes of that is `model.distillation`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.embedder import Embedder
from model.errors import TeacherError
from model.files import reason
from model.frames import Clip, Preprocessing
from model.openvino_graph import OpenVinoGraph

Channels = Literal["rgb", "bgr"]
Runtime = Literal["auto", "onnxruntime", "openvino", "torch"]
Computation = Literal["fp32", "bf16"]
Triple = tuple[float, float, float]
Embeddings = NDArray[np.float32]

# The teacher that is no file but what a run begins with.
START = "start"
# Crops in one run of a teacher that takes any number of them; on a CPU more gains nothing.
MAX_CROPS = 16
MAX_CROPS_ON_GPU = 256
# Length below which an embedding counts as zero and is not scaled up to unit length.
TINY = 1e-6


@dataclass(frozen=True, slots=True)
class PixelRange:
    """How a teacher takes its pixels, see `model.distillation.DistillationConfig`."""

    channels: Channels
    scale: float
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        if self.channels not in get_args(Channels):
            raise ValueError(f"channels: expected {get_args(Channels)}, got {self.channels!r}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a positive number, got {self.scale}")
        if len(self.mean) != 3 or not np.isfinite(self.mean).all():
            raise ValueError(f"mean: expected 3 numbers, got {self.mean}")
        if len(self.std) != 3 or not all(0 < one < float("inf") for one in self.std):
            raise ValueError(f"std: expected 3 positive numbers, got {self.std}")

    def apply(self, crops: Clip) -> NDArray[np.float32]:
        """(N, H, W, 3) uint8 RGB to (N, 3, H, W) float32 as the teacher takes it."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        pixels = (crops.astype(np.float32) / np.float32(self.scale) - mean) / std
        if self.channels == "bgr":
            pixels = pixels[..., ::-1]
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def apply_tensor(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) float32 RGB from 0 to 255 to what the teacher takes, on its device."""
        order = (2, 1, 0) if self.channels == "bgr" else (0, 1, 2)
        # One by one, because a graph of a GPU's work cannot hold tensors made on the processor.
        taken = [(pixels[:, at] / self.scale - self.mean[at]) / self.std[at] for at in order]
        return torch.stack(taken, dim=1)


class Engine(NamedTuple):
    """A network in some runtime.

    Args:
        run: From (N, 3, H, W) float32 to its one output; N is a multiple of the network's own.
        shape: Of its one input; None where it takes any number.
        network: The same as a module that takes tensors, where PyTorch is the runtime.
    """

    run: Callable[[NDArray[np.float32]], NDArray[Any]]
    shape: tuple[int | None, ...]
    network: nn.Module | None = None


class Teacher:
    """A network that makes one embedding of one crop; `load_teacher` makes it.

    Args:
        engine: What computes.
        pixels: How it takes pixels.
        fingerprint: Its name: ``teacher-`` and 12 hex digits.
        preprocessing: Size and resizing of its crops, where the engine's shape does not say all.

    Attributes:
        preprocessing: The size that crops must have; its mean and deviation do not count here.
        fingerprint: See above. Two teachers share it only if they embed alike.
        dim: Length of its embeddings, D_t.
        network: See `Engine`.

    Raises:
        TeacherError: It does not take crops, or does not make one finite embedding of each.
    """

    def __init__(
        self,
        engine: Engine,
        pixels: PixelRange,
        fingerprint: str,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        shape = engine.shape
        if len(shape) != 4 or shape[1] != 3 or shape[2] is None or shape[3] is None:
            raise TeacherError(
                f"expected a teacher with input (N, 3, height, width) of a fixed size, got {shape}"
            )
        try:
            self.preprocessing = preprocessing or Preprocessing(height=shape[2], width=shape[3])
        except ValueError as error:
            raise TeacherError(f"teacher: {error}") from error
        self.fingerprint = fingerprint
        self._engine, self._pixels = engine, pixels
        self.network = engine.network
        # Grey comes first, so that a teacher that fails does so before there is work to lose.
        self.dim = self._run(np.full((1, shape[2], shape[3], 3), 127, dtype=np.uint8)).shape[1]

    def embed(self, crops: Clip) -> Embeddings:
        """Embed crops, a few at a time.

        Args:
            crops: (N, height, width, 3) uint8 RGB from `model.frames`, of the teacher's own size.

        Returns:
            (N, D_t) float32, as the teacher gives them: compare them by cosine.

        Raises:
            TeacherError: Crops have another shape or type, or an embedding is not finite.
        """
        size = (self.preprocessing.height, self.preprocessing.width, 3)
        if crops.ndim != 4 or crops.shape[1:] != size or crops.dtype != np.uint8:
            raise TeacherError(
                f"expected crops (N, {size[0]}, {size[1]}, 3) uint8 for the teacher, "
                f"got {crops.shape} {crops.dtype}"
            )
        # A whole number of what an engine takes at a time, so that it may work at several.
        step = (self._engine.shape[0] or 1) * (MAX_CROPS_ON_GPU if self._on_gpu else MAX_CROPS)
        made = [self._run(crops[start : start + step]) for start in range(0, len(crops), step)]
        return np.concatenate(made) if made else np.empty((0, self.dim), dtype=np.float32)

    @property
    def _on_gpu(self) -> bool:
        return self.network is not None and any(one.is_cuda for one in self.network.buffers())

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed crops that are tensors already, where PyTorch is the runtime.

        Args:
            pixels: (N, 3, height, width) float32 RGB from 0 to 255, of the teacher's own size, on
                the device of its network.

        Returns:
            (N, D_t) float32, as the teacher gives them; not looked at for NaN.

        Raises:
            TeacherError: It has another runtime.
        """
        if self.network is None:
            raise TeacherError("expected a teacher that PyTorch runs, got another runtime's")
        taken = self._pixels.apply_tensor(pixels)
        kind = next(self.network.buffers()).dtype
        embeddings: Tensor = self.network(taken.to(kind)).flatten(1).float()
        return embeddings

    def _run(self, crops: Clip) -> Embeddings:
        """Embed some crops, a few at a time where the engine takes a fixed number."""
        count, fixed = len(crops), self._engine.shape[0] or 1
        if missing := -count % fixed:  # fill up; what comes of that is cut off below
            crops = np.concatenate([crops, np.repeat(crops[-1:], missing, axis=0)])
        try:
            output = np.asarray(self._engine.run(self._pixels.apply(crops)))
        except Exception as error:  # the runtimes' errors share no base class
            raise TeacherError(f"the teacher failed on {len(crops)} crops: {error}") from error
        if output.ndim < 2 or len(output) != len(crops) or not output.size:
            raise TeacherError(
                f"expected one embedding for each of {len(crops)} crops from the teacher, "
                f"got an output of shape {output.shape}"
            )
        embeddings: Embeddings = output.reshape(len(crops), -1)[:count].astype(np.float32)
        if not np.isfinite(embeddings).all():
            raise TeacherError("expected finite embeddings from the teacher, got NaN or infinity")
        return embeddings


def load_teacher(
    path: str | Path,
    *,
    channels: Channels = "bgr",
    scale: float = 1.0,
    mean: Triple = (0.0, 0.0, 0.0),
    std: Triple = (1.0, 1.0, 1.0),
    precision: Computation = "fp32",
    runtime: Runtime = "auto",
    device: torch.device | None = None,
) -> Teacher:
    """Read a teacher and try it on a grey crop.

    Args:
        path: See `model.distillation.DistillationConfig`, likewise the next five.
        channels: Order in which the teacher takes them.
        scale: What pixels are divided by first.
        mean: Per channel R, G, B.
        std: Likewise.
        precision: In which it computes.
        runtime: What runs it. "auto" is OpenVINO for ``.xml``, or PyTorch without it; for ``.onnx``
            it is ONNX Runtime, or OpenVINO where only that is installed. "torch" reads ``.xml``,
            too, and is what computes on a GPU, see `model.openvino_graph`.
        device: Where "torch" computes; the CPU where None.

    Raises:
        TeacherError: The file is missing, damaged or no network of crops, or its runtime is not
            installed.
        ValueError: Another argument is out of range.
    """
    require_teacher_name(str(path))
    pixels = PixelRange(channels, scale, mean, std)
    path = Path(path)
    files = [path, path.with_suffix(".bin")] if is_openvino(path) else [path]
    for file in files:
        if not file.is_file():
            raise TeacherError(f"expected a teacher's file, got nothing at {file}")
    chosen = _choose_runtime(path, runtime)
    if chosen == "torch":
        engine = _open_torch(path, precision, device or torch.device("cpu"))
    elif chosen == "openvino":
        engine = _open_openvino(path, precision)
    elif precision == "fp32":
        engine = _open_onnxruntime(path)
    else:
        raise TeacherError(f"expected precision fp32 for ONNX Runtime, got {precision}: {path}")
    return Teacher(engine, pixels, _fingerprint(files, pixels, precision))


def teach_by_checkpoint(checkpoint: Checkpoint) -> Teacher:
    """Make a teacher of a network of ours: each crop is a tracklet of one frame.

    Args:
        checkpoint: The network. It runs on the CPU, like other teachers.
    """
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", max_frames=MAX_CROPS)
    size = embedder.preprocessing

    def run(crops: NDArray[np.float32]) -> NDArray[Any]:
        pixels = np.ascontiguousarray(crops.transpose(0, 2, 3, 1)).astype(np.uint8)
        return np.stack([one.embedding for one in embedder.embed(list(pixels[:, None]))])

    engine = Engine(run, (None, 3, size.height, size.width))
    pixels = PixelRange("rgb", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Teacher(engine, pixels, f"teacher-{checkpoint.fingerprint}", size)


def is_openvino(path: str | Path) -> bool:
    """Whether a teacher's file is one of OpenVINO's, by its name."""
    return Path(path).suffix.lower() == ".xml"


def require_teacher_name(teacher: str) -> None:
    """Refuse a path that is none of a teacher.

    Raises:
        ValueError: It is neither an ``.onnx`` nor an ``.xml`` file's.
    """
    if Path(teacher).suffix.lower() not in (".onnx", ".xml"):
        raise ValueError(
            f"teacher: expected an .onnx file or an OpenVINO .xml file, got {teacher!r}"
        )


def _choose_runtime(path: Path, runtime: Runtime) -> Runtime:
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime: expected {get_args(Runtime)}, got {runtime!r}")
    if is_openvino(path):
        if runtime == "onnxruntime":
            raise TeacherError(f"expected an .onnx file for ONNX Runtime, got {path}")
        if runtime == "torch" or (runtime == "auto" and find_spec("openvino") is None):
            return "torch"
        runtime = "openvino"
    elif runtime == "torch":
        raise TeacherError(f"expected an .xml file for PyTorch, got {path}")
    elif runtime == "auto":
        alone = find_spec("onnxruntime") is None and find_spec("openvino") is not None
        runtime = "openvino" if alone else "onnxruntime"
    if find_spec(runtime) is None:
        extra = "openvino" if runtime == "openvino" else "export"
        raise TeacherError(
            f"expected {runtime} to run {path}, got none: pip install 'passerby[{extra}]'"
        )
    return runtime


def _fingerprint(files: Sequence[Path], pixels: PixelRange, precision: Computation) -> str:
    """Name a teacher after its files and how it takes pixels: all that shapes its embeddings."""
    numbers = [float(one) for one in (pixels.scale, *pixels.mean, *pixels.std)]  # 0 is 0.0
    taken = [pixels.channels, *numbers] + ([] if precision == "fp32" else [precision])
    digest = hashlib.sha256(json.dumps(taken).encode())
    try:
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise TeacherError(f"expected a teacher, could not read {path}: {reason(error)}") from error
    return f"teacher-{digest.hexdigest()[:12]}"


def _open_torch(path: Path, precision: Computation, device: torch.device) -> Engine:
    network = OpenVinoGraph(path)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    network = network.eval().to(device, kind)

    @torch.inference_mode()
    def run(crops: NDArray[np.float32]) -> NDArray[Any]:
        said: Tensor = network(torch.from_numpy(crops).to(device, kind))
        return said.float().cpu().numpy()

    return Engine(run, (None, *network.shape[1:]), network)


def _open_onnxruntime(path: Path) -> Engine:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise TeacherError(f"expected an ONNX network, could not read {path}: {error}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _require_one(path, [one.name for one in inputs], [one.name for one in outputs])
    if inputs[0].type != "tensor(float)":
        raise TeacherError(f"expected a teacher with float32 input, got {inputs[0].type}: {path}")
    # A size that may be any is a name there, or None.
    shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
    name, fixed = inputs[0].name, shape[0]

    def run(crops: NDArray[np.float32]) -> NDArray[Any]:
        step = fixed or len(crops)
        parts = [crops[start : start + step] for start in range(0, len(crops), step)]
        return np.concatenate([session.run(None, {name: part})[0] for part in parts])

    return Engine(run, shape)


def _open_openvino(path: Path, precision: Computation) -> Engine:
    # OpenVINO gives the thread that runs it a stack of its own for signals and frees that with the
    # network; a signal that comes later then ends the process. So it has a thread to itself, and
    # Ctrl-C and SIGTERM stay safe in the main one.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
    engine = thread.submit(_compile_openvino, path, precision).result()
    return Engine(lambda crops: thread.submit(engine.run, crops).result(), engine.shape)


def _compile_openvino(path: Path, precision: Computation) -> Engine:
    import openvino

    core = openvino.Core()
    # Some processors would compute in bfloat16 unasked, and a cache is to be the same on all.
    # Many crops side by side are twice as fast as one after the other with all cores on each.
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "THROUGHPUT",
    }
    try:
        network = core.read_model(path)
        compiled = core.compile_model(network, "CPU", options)
    except RuntimeError as error:
        raise TeacherError(f"expected a network, could not read {path}: {error}") from error
    inputs, outputs = compiled.inputs, compiled.outputs
    _require_one(path, [str(one) for one in inputs], [str(one) for one in outputs])
    if inputs[0].element_type != openvino.Type.f32:
        raise TeacherError(
            f"expected a teacher with float32 input, got {inputs[0].element_type}: {path}"
        )
    sizes = inputs[0].partial_shape
    if sizes.rank.is_dynamic:
        raise TeacherError(f"expected a teacher with 4 input dimensions, got any number: {path}")
    shape = tuple(None if size.is_dynamic else size.get_length() for size in sizes)
    queue, fixed = openvino.AsyncInferQueue(compiled), shape[0] or 1
    made: dict[int, NDArray[Any]] = {}

    def keep(request: Any, place: int) -> None:
        made[place] = request.get_output_tensor(0).data.copy()  # the next run overwrites it

    def run(crops: NDArray[np.float32]) -> NDArray[Any]:
        made.clear()
        for place, start in enumerate(range(0, len(crops), fixed)):
            queue.start_async([crops[start : start + fixed]], place)
        queue.wait_all()
        return np.concatenate([made[place] for place in range(len(made))])

    queue.set_callback(keep)
    return Engine(run, shape)


def _require_one(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if len(inputs) != 1 or len(outputs) != 1:
        raise TeacherError(
            f"expected a teacher with one input and one output, got {len(inputs)} "
            f"({', '.join(inputs)}) and {len(outputs)} ({', '.join(outputs)}): {path}"
        )
