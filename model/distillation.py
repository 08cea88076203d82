"""Learning from another network: a teacher, its embeddings kept on disk, and the loss they add.

The teacher is a file, ONNX or OpenVINO IR, that makes one embedding of one crop. It sees each frame
once, as it lies on disk; training then reads its embeddings and never runs it. Ideas: a student
learns from a teacher's outputs (Hinton, Vinyals and Dean, arXiv:1503.02531), here embeddings and
not class probabilities, because the two know no common classes; and from how similar the teacher
finds the members of a batch (Tung and Mori, arXiv:1907.09682; Park et al., arXiv:1904.05068).
"""

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn import functional

from model.checkpoint import Checkpoint
from model.embedder import Embedder
from model.errors import TeacherError
from model.files import reason, written_aside
from model.frames import Clip, Preprocessing, read_frame
from model.views import plan_view, render_view

Channels = Literal["rgb", "bgr"]
Runtime = Literal["auto", "onnxruntime", "openvino"]
Computation = Literal["fp32", "bf16"]
Triple = tuple[float, float, float]
Embeddings = NDArray[np.float32]
Progress = Callable[[int, int], None]

CACHE_FORMAT = "passerby-teacher-cache-1"
# The teacher that is no file but what a run begins with.
START = "start"
# Another number wherever `model.views` draws other views.
VIEWS_FORMAT = 3
# Frames between two writes of a caching pass: what an interruption costs, some seconds on a CPU.
CHUNK_FRAMES = 512
# Crops in one run of a teacher that takes any number of them; on a CPU more gains nothing.
MAX_CROPS = 16
# Length below which an embedding counts as zero and is not scaled up to unit length.
TINY = 1e-6


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """What a recipe says of its teacher: the table ``[distillation]``.

    The teacher takes ``(pixel / scale - mean) / std`` of pixels from 0 to 255. The defaults are
    what the networks of Open Model Zoo take, BGR as it is; one trained on ImageNet by PyTorch takes
    "rgb", scale 255 and ImageNet's mean and deviation. A wrong one raises no error and teaches
    badly.

    Args:
        teacher: Path of an ``.onnx`` file, or of an OpenVINO ``.xml`` with its ``.bin`` beside it.
            Or "start": the weights that the run begins with, so that it does not forget what they
            knew; they take pixels as they always do, and the next five do not count.
        channels: Order in which the teacher takes them.
        scale: What pixels are divided by first.
        mean: Per channel R, G, B, whatever the order that the teacher takes.
        std: Likewise.
        precision: In which it computes. "bf16" is twice as fast where the processor multiplies it,
            needs OpenVINO, and is not the same to the last bit on every machine.
        similarity_weight: Of the similarity term of `DistillationLoss`.
        embedding_weight: Of its embedding term.
        projection: Whether the embedding term compares through a linear layer, which belongs to
            training; without it the student's embeddings must be as long as the teacher's, and
            come to stand where the teacher's do.
        views: How many looks of each frame the teacher sees: the frame itself, and others of
            `model.views`. A student is shown one of them at a time.
        cache: Folder for the teacher's embeddings; None leaves it to the caller.
    """

    teacher: str
    channels: Channels = "bgr"
    scale: float = 1.0
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    precision: Computation = "fp32"
    similarity_weight: float = 1.0
    embedding_weight: float = 1.0
    projection: bool = True
    views: int = 1
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.teacher != START:
            _require_teacher_name(self.teacher)
        _PixelRange(self.channels, self.scale, self.mean, self.std)  # refuses what is none
        if self.precision not in get_args(Computation):
            raise ValueError(f"precision: expected {get_args(Computation)}, got {self.precision!r}")
        for name in ("similarity_weight", "embedding_weight"):
            weight = getattr(self, name)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {weight}")
        if self.similarity_weight == self.embedding_weight == 0:
            raise ValueError(
                "distillation: expected a similarity_weight or an embedding_weight, got 0 for both"
            )
        if self.views < 1:
            raise ValueError(f"views: expected at least 1, the frame itself, got {self.views}")
        if self.cache is not None and not self.cache:
            raise ValueError("cache: expected a folder, got an empty path")


def _require_teacher_name(teacher: str) -> None:
    if Path(teacher).suffix.lower() not in (".onnx", ".xml"):
        raise ValueError(
            f"teacher: expected an .onnx file or an OpenVINO .xml file, got {teacher!r}"
        )


@dataclass(frozen=True, slots=True)
class _PixelRange:
    """How a teacher takes its pixels, see `DistillationConfig`."""

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


class _Engine(NamedTuple):
    """A network in some runtime.

    Args:
        run: From (N, 3, H, W) float32 to its one output; N is a multiple of the network's own.
        shape: Of its one input; None where it takes any number.
    """

    run: Callable[[NDArray[np.float32]], NDArray[Any]]
    shape: tuple[int | None, ...]


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

    Raises:
        TeacherError: It does not take crops, or does not make one finite embedding of each.
    """

    def __init__(
        self,
        engine: _Engine,
        pixels: _PixelRange,
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
        step = (self._engine.shape[0] or 1) * MAX_CROPS
        made = [self._run(crops[start : start + step]) for start in range(0, len(crops), step)]
        return np.concatenate(made) if made else np.empty((0, self.dim), dtype=np.float32)

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
) -> Teacher:
    """Read a teacher and try it on a grey crop.

    Args:
        path: See `DistillationConfig`, likewise the next five.
        channels: Order in which the teacher takes them.
        scale: What pixels are divided by first.
        mean: Per channel R, G, B.
        std: Likewise.
        precision: In which it computes.
        runtime: What runs it. "auto" is OpenVINO for ``.xml``; for ``.onnx`` it is ONNX Runtime,
            or OpenVINO where only that is installed.

    Raises:
        TeacherError: The file is missing, damaged or no network of crops, or its runtime is not
            installed.
        ValueError: Another argument is out of range.
    """
    _require_teacher_name(str(path))
    pixels = _PixelRange(channels, scale, mean, std)
    path = Path(path)
    files = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
    for file in files:
        if not file.is_file():
            raise TeacherError(f"expected a teacher's file, got nothing at {file}")
    if _choose_runtime(path, runtime) == "openvino":
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

    engine = _Engine(run, (None, 3, size.height, size.width))
    pixels = _PixelRange("rgb", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Teacher(engine, pixels, f"teacher-{checkpoint.fingerprint}", size)


def _choose_runtime(path: Path, runtime: Runtime) -> Runtime:
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime: expected {get_args(Runtime)}, got {runtime!r}")
    if path.suffix.lower() == ".xml":
        if runtime == "onnxruntime":
            raise TeacherError(f"expected an .onnx file for ONNX Runtime, got {path}")
        runtime = "openvino"
    elif runtime == "auto":
        alone = find_spec("onnxruntime") is None and find_spec("openvino") is not None
        runtime = "openvino" if alone else "onnxruntime"
    if find_spec(runtime) is None:
        extra = "openvino" if runtime == "openvino" else "export"
        raise TeacherError(
            f"expected {runtime} to run {path}, got none: pip install 'passerby[{extra}]'"
        )
    return runtime


def _fingerprint(files: Sequence[Path], pixels: _PixelRange, precision: Computation) -> str:
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


def _open_onnxruntime(path: Path) -> _Engine:
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

    return _Engine(run, shape)


def _open_openvino(path: Path, precision: Computation) -> _Engine:
    # OpenVINO gives the thread that runs it a stack of its own for signals and frees that with the
    # network; a signal that comes later then ends the process. So it has a thread to itself, and
    # Ctrl-C and SIGTERM stay safe in the main one.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
    engine = thread.submit(_compile_openvino, path, precision).result()
    return _Engine(lambda crops: thread.submit(engine.run, crops).result(), engine.shape)


def _compile_openvino(path: Path, precision: Computation) -> _Engine:
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
    return _Engine(run, shape)


def _require_one(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if len(inputs) != 1 or len(outputs) != 1:
        raise TeacherError(
            f"expected a teacher with one input and one output, got {len(inputs)} "
            f"({', '.join(inputs)}) and {len(outputs)} ({', '.join(outputs)}): {path}"
        )


class TeacherEmbeddings:
    """What a teacher makes of the frames of a data set, by their paths.

    Embeddings are kept at unit length, because only their cosines count, and in float16: each is
    off by less than 5e-4 of its length (2^-11), and so a cosine by less than 1e-3.

    Args:
        teacher: The teacher's fingerprint.
        frames: N image files, each once.
        embeddings: (V, N, D_t) float16 of unit length, of V looks of each frame; row n of each
            belongs to ``frames[n]``.
        cameras: Which camera each frame is of; see `cache_embeddings`.

    Raises:
        TeacherError: ``embeddings`` has another shape.
    """

    def __init__(
        self,
        teacher: str,
        frames: Sequence[Path],
        embeddings: NDArray[np.float16],
        cameras: Mapping[Path, str] | None = None,
    ) -> None:
        if embeddings.ndim != 3 or embeddings.shape[1] != len(frames) or not len(embeddings):
            raise TeacherError(
                f"expected embeddings (V >= 1, {len(frames)}, D_t) of the teacher, "
                f"got {embeddings.shape}"
            )
        self.teacher, self.views = teacher, len(embeddings)
        self.dim = int(embeddings.shape[2])
        self._embeddings = embeddings
        self._looks = _Looks(list(frames), _by_camera(frames, cameras))
        self._rows = {path: row for row, path in enumerate(frames)}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def of(self, frames: Path) -> Embeddings: ...

    @overload
    def of(self, frames: Sequence[Path], views: Sequence[int] | None = None) -> Embeddings: ...

    def of(self, frames: Path | Sequence[Path], views: Sequence[int] | None = None) -> Embeddings:
        """What the teacher makes of frames.

        Args:
            frames: Paths as they were given to `cache_embeddings`, N of them or a single one.
            views: Which look of each of N; where None the frames themselves.

        Returns:
            (N, D_t) float32 of unit length, or (D_t,) of a single one.

        Raises:
            TeacherError: The teacher has not seen one of them.
        """
        if isinstance(frames, Path):
            return np.asarray(self._embeddings[0, self._row(frames)], np.float32)
        rows = [self._row(path) for path in frames]
        looks = [0] * len(rows) if views is None else list(views)
        return np.asarray(self._embeddings[looks, rows], np.float32)

    def show(self, frame: Path, view: int, read: Callable[[Path], Clip]) -> Clip:
        """Show a frame as the teacher saw it.

        Args:
            frame: As it was given to `cache_embeddings`.
            view: Which look of it, from 0, the frame itself.
            read: Gives prepared frames, (H, W, 3) uint8 RGB of any one size.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            TeacherError: The teacher has not seen it.
        """
        return self._looks.show(self._row(frame), view, read)

    def _row(self, frame: Path) -> int:
        try:
            return self._rows[frame]
        except KeyError as error:
            raise TeacherError(
                f"expected one of the {len(self)} frames that the teacher has seen, got {frame}"
            ) from error


class _Looks(NamedTuple):
    """What the looks of frames are made of.

    Args:
        frames: All that the teacher sees.
        cameras: Their numbers, camera by camera.
    """

    frames: list[Path]
    cameras: list[list[int]]

    def show(self, row: int, view: int, read: Callable[[Path], Clip]) -> Clip:
        crop = read(self.frames[row])
        if view == 0:
            return crop
        plan = plan_view(row, view, self.cameras)
        return render_view(plan, crop, lambda number: read(self.frames[number]))


def _by_camera(frames: Sequence[Path], cameras: Mapping[Path, str] | None) -> list[list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, frame in enumerate(frames):
        numbers["" if cameras is None else cameras[frame]].append(number)
    return [numbers[camera] for camera in sorted(numbers)]


def cache_embeddings(
    teacher: Teacher,
    frames: Sequence[Path],
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    views: int = 1,
    cameras: Mapping[Path, str] | None = None,
) -> TeacherEmbeddings:
    """Read a teacher's embeddings of frames, and make those first that are not there.

    They are made of the frames as they lie on disk, resized to the teacher's own size. A pass that
    is interrupted goes on where it was, less at most `CHUNK_FRAMES` frames.

    A cache is found again by the teacher's fingerprint and by the list of frames: their paths below
    the folder that all share, and their sizes in bytes, in whatever order. Contents are not read,
    nor dates: a data set may be moved or copied, but a frame that is changed into another of the
    very same size is not noticed. Give all the frames of a data set at once, and its splits share a
    cache.

    Args:
        teacher: What embeds them.
        frames: Image files, at least one; those that are there twice count once.
        cache_dir: Folder for such files, made where it is missing.
        progress: Called with how many looks are done, and of how many.
        views: How many looks of each frame the teacher sees, see `DistillationConfig`. The others
            borrow from all the frames that are given: give those of one training half alone. More
            of them later cost only the new ones.
        cameras: Which camera each frame is of, so that looks take the colours of every camera as
            often as of every other; of one where None.

    Raises:
        TeacherError: There is no frame, a frame is missing, the teacher fails on one, the cache
            cannot be written, or what lies there does not fit.
        InvalidFramesError: A frame cannot be decoded.
    """
    listings = _list_frames(teacher, frames, views, cameras)
    ordered = listings[0].looks.frames
    embeddings = np.empty((views, len(ordered), teacher.dim), dtype=np.float16)
    with ThreadPoolExecutor() as threads:
        for view, listing in enumerate(listings):
            report = _counting(progress, view * len(ordered), views * len(ordered))
            embeddings[view] = _cache_view(listing, teacher, cache_dir, threads, report)
    return TeacherEmbeddings(teacher.fingerprint, ordered, embeddings, cameras)


def _counting(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return report


def _cache_view(
    listing: "_Listing",
    teacher: Teacher,
    cache_dir: Path,
    threads: ThreadPoolExecutor,
    report: Callable[[int], None],
) -> NDArray[np.float16]:
    """What the teacher makes of one look of every frame, (N, D_t), kept in a file."""
    total = len(listing.looks.frames)
    path = cache_dir / f"{teacher.fingerprint}-{listing.digest}.safetensors"
    if path.exists():
        embeddings = _read(path, listing, (total, teacher.dim))
        report(total)
        return embeddings
    parts = path.with_suffix(".parts")
    embeddings = np.empty((total, teacher.dim), dtype=np.float16)
    starts = range(0, total, CHUNK_FRAMES)
    chunks = [range(start, min(start + CHUNK_FRAMES, total)) for start in starts]
    for rows, pixels in _ahead(listing, teacher, parts, chunks, threads):
        made = _resume(_part(parts, rows), listing, teacher, rows, pixels)
        embeddings[rows.start : rows.stop] = made
        report(rows.stop)
    _write(path, embeddings, listing)
    shutil.rmtree(parts, ignore_errors=True)  # of no use any more, and of no harm
    return embeddings


def _part(parts: Path, rows: range) -> Path:
    return parts / f"{rows.start:09d}.safetensors"


def _ahead(
    listing: "_Listing",
    teacher: Teacher,
    parts: Path,
    chunks: Sequence[range],
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[range, list[Future[Clip]] | None]]:
    """Yield chunks with their looks, which are made while the teacher is busy with those before."""

    def begin(rows: range) -> list[Future[Clip]] | None:
        if _part(parts, rows).exists():
            return None
        return [threads.submit(_show, listing, teacher, row) for row in rows]

    following = begin(chunks[0])
    for number, rows in enumerate(chunks):
        pixels = following
        following = begin(chunks[number + 1]) if number + 1 < len(chunks) else None
        yield rows, pixels


def _show(listing: "_Listing", teacher: Teacher, row: int) -> Clip:
    return listing.looks.show(
        row, listing.view, lambda path: read_frame(path, teacher.preprocessing)
    )


class _Listing(NamedTuple):
    """One look of frames, in the order of a cache, and a name for that."""

    teacher: str
    looks: _Looks
    view: int
    digest: str

    @property
    def header(self) -> dict[str, str]:
        return {"format": CACHE_FORMAT, "teacher": self.teacher, "frames": self.digest}


def _list_frames(
    teacher: Teacher, frames: Sequence[Path], views: int, cameras: Mapping[Path, str] | None
) -> list[_Listing]:
    """Name the passes over all frames, one for each look of them."""
    if not frames:
        raise TeacherError("expected frames for the teacher, got none")
    absolute = {path: path.absolute() for path in frames}
    shared = os.path.commonpath([path.parent for path in absolute.values()])
    names = {path: whole.relative_to(shared).as_posix() for path, whole in absolute.items()}
    ordered = sorted(names, key=lambda path: (names[path], str(path)))
    try:
        listed = [(names[path], path.stat().st_size) for path in ordered]
    except OSError as error:
        raise TeacherError(
            f"expected a frame for the teacher, could not read {error.filename}: {reason(error)}"
        ) from error
    looks = _Looks(ordered, _by_camera(ordered, cameras))
    listings = []
    for view in range(views):
        named: Any = listed
        if view:  # what another look shows depends on more
            named = {"frames": listed, "cameras": looks.cameras, "view": [VIEWS_FORMAT, view]}
        digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
        listings.append(_Listing(teacher.fingerprint, looks, view, digest))
    return listings


def _resume(
    part: Path,
    listing: _Listing,
    teacher: Teacher,
    rows: range,
    pixels: list[Future[Clip]] | None,
) -> NDArray[np.float16]:
    """Embeddings of a chunk of frames, from an interrupted pass or from the teacher."""
    if pixels is None:
        try:
            return _read(part, listing, (len(rows), teacher.dim))
        except TeacherError:
            part.unlink(missing_ok=True)  # cut short, or of other chunks: it is made again
    if pixels is None:
        looks = [_show(listing, teacher, row) for row in rows]
    else:
        looks = [one.result() for one in pixels]
    embeddings = teacher.embed(np.stack(looks))
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: NDArray[np.float16] = (embeddings / np.maximum(lengths, TINY)).astype(np.float16)
    _write(part, unit, listing)
    return unit


def _read(path: Path, listing: _Listing, shape: tuple[int, int]) -> NDArray[np.float16]:
    advice = "remove it and it is made again"
    try:
        with safe_open(path, framework="np") as file:
            header: Mapping[str, str] = file.metadata() or {}
            embeddings: NDArray[np.float16] = file.get_tensor("embeddings")
    except (OSError, SafetensorError) as error:
        raise TeacherError(
            f"expected a teacher's cache, {path} is damaged: {reason(error)}; {advice}"
        ) from error
    if header != listing.header:
        raise TeacherError(f"expected a cache of {listing.header}, got {header}: {path}; {advice}")
    if embeddings.shape != shape or embeddings.dtype != np.float16:
        raise TeacherError(
            f"expected a cache of {shape} float16, got {embeddings.shape} {embeddings.dtype}: "
            f"{path}; {advice}"
        )
    if not np.isfinite(embeddings).all():
        raise TeacherError(f"expected finite embeddings in a cache, got others: {path}; {advice}")
    return embeddings


def _write(path: Path, embeddings: NDArray[np.float16], listing: _Listing) -> None:
    try:
        with written_aside(path) as draft:
            draft.write_bytes(save({"embeddings": embeddings}, metadata=listing.header))
    except OSError as error:
        raise TeacherError(f"could not write {path}: {reason(error)}") from error


class DistillationTerms(NamedTuple):
    """What the teacher adds to the loss.

    Args:
        total: The weighted sum, a scalar with a graph.
        similarity: Without its weight, a scalar; only for the log.
        embedding: Likewise.
    """

    total: Tensor
    similarity: Tensor
    embedding: Tensor


class DistillationLoss(nn.Module):
    """How far the frame embeddings of a batch are from the teacher's.

    With s_n and t_n the student's and the teacher's embedding of frame n of N in the batch:

        similarity = 1 / N^2 sum_nm (cos(s_n, s_m) - cos(t_n, t_m))^2
        embedding  = 1 / N   sum_n  (1 - cos(P s_n, t_n))

    The similarity term acts on the student's own embeddings, so that the space that serves takes
    the teacher's geometry. Tung and Mori (arXiv:1907.09682) compare G = A A^T of activations with
    its rows scaled to unit length, by the same mean of squares; here the entries are cosines, which
    do not depend on what else is in the batch. Park et al. (arXiv:1904.05068) compare distances,
    scaled by their mean, and angles. The embedding term needs the projection P because the two
    spaces have other axes; it belongs to training and is in no checkpoint. A student with
    embeddings of the teacher's length may do without, P the identity. Cosines, because
    teachers of this kind are compared by them; so the length of the student's embeddings stays
    free.

    The projection's weights are drawn from PyTorch's generator, which the caller seeds.

    Args:
        dim: Length of the student's embeddings, D.
        teacher_dim: Of the teacher's, D_t.
        config: Says the weights of the two terms.
    """

    def __init__(self, dim: int, teacher_dim: int, config: DistillationConfig) -> None:
        super().__init__()
        self.dim, self.teacher_dim = dim, teacher_dim
        self.similarity_weight = config.similarity_weight
        self.embedding_weight = config.embedding_weight
        if not config.projection and dim != teacher_dim:
            raise TeacherError(
                f"expected embeddings as long as the teacher's without a projection, "
                f"{teacher_dim}, got {dim}: set network.head"
            )
        self.projection: nn.Module = nn.Identity()
        if config.projection:
            self.projection = nn.Linear(dim, teacher_dim)

    def forward(self, frame_embeddings: Tensor, teacher: Tensor) -> DistillationTerms:
        """Compare a batch with what the teacher says of it.

        Args:
            frame_embeddings: The student's, (B, T, D).
            teacher: The teacher's of the same frames, (B, T, D_t).

        Returns:
            Scalars, float32 whatever the autocast.

        Raises:
            TeacherError: A shape is another one.
        """
        self._check(frame_embeddings, teacher)
        with torch.autocast(frame_embeddings.device.type, enabled=False):
            student = frame_embeddings.float().flatten(0, 1)  # (B*T, D)
            projected = _unit(self.projection(student))  # (B*T, D_t)
            student, target = _unit(student), _unit(teacher.float().flatten(0, 1))
            similarity = functional.mse_loss(student @ student.T, target @ target.T)
            embedding = 1 - (projected * target).sum(dim=1).mean()
            total = self.similarity_weight * similarity + self.embedding_weight * embedding
        return DistillationTerms(total, similarity.detach(), embedding.detach())

    def _check(self, frame_embeddings: Tensor, teacher: Tensor) -> None:
        if frame_embeddings.ndim != 3 or frame_embeddings.shape[2] != self.dim:
            raise TeacherError(
                f"expected frame embeddings (B, T, {self.dim}), got {tuple(frame_embeddings.shape)}"
            )
        expected = (*frame_embeddings.shape[:2], self.teacher_dim)
        if tuple(teacher.shape) != expected:
            raise TeacherError(
                f"expected the teacher's embeddings {expected}, got {tuple(teacher.shape)}"
            )


def _unit(embeddings: Tensor) -> Tensor:
    # Not the customary 1e-12: a frame without features would get a gradient of that order.
    return functional.normalize(embeddings, dim=1, eps=TINY)
