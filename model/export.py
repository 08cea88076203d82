"""A network as one file for other runtimes: ONNX, or a program of `torch.export`.

A file is kept only if, loaded again, it embeds as the network does. `docs/export.md` shows how such
files are used.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from model.checkpoint import Checkpoint
from model.errors import ExportError
from model.files import reason, written_aside
from model.frames import Preprocessing
from model.network import TrackletNet
from model.quantised import QuantisedBackbone

ExportFormat = Literal["onnx", "torch"]
FORMAT = "passerby-export-1"
SUFFIXES: Mapping[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2"}
# Name of the description inside a .pt2 file; an ONNX file has metadata of its own.
DESCRIPTION = "passerby.json"
# Largest difference that is let pass, see `relative_difference`. A right file is off by some 1e-6.
TOLERANCE = 1e-4
# Batch and frames of the clips that a file is checked with: one and several of each, and none that
# the network is traced with.
CHECKED_SHAPES = ((1, 1), (1, 4), (3, 1), (2, 5))
_TRACED_SHAPE = (2, 3)

# What runs an exported file: clips and mask in, embeddings out.
Run = Callable[[Tensor, Tensor], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written, and how well it agrees with the network.

    Args:
        path: Of the file.
        file_format: What it is.
        difference: Largest relative difference that was found, see `relative_difference`.
        shapes: (B, T) of the clips that it was checked with.
    """

    path: Path
    file_format: ExportFormat
    difference: float
    shapes: tuple[tuple[int, int], ...] = CHECKED_SHAPES


class _Served(nn.Module):
    """The network as it serves: a mask is given every time, attention is not returned."""

    def __init__(self, network: TrackletNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor, mask: Tensor) -> Tensor:
        embeddings: Tensor = self.network(clips, mask)
        return embeddings


def choose_format(path: Path, file_format: ExportFormat | None = None) -> ExportFormat:
    """What a file is to be: as asked for, or as its name ends.

    Raises:
        ExportError: Neither says it.
    """
    if file_format is not None:
        if file_format not in get_args(ExportFormat):
            raise ExportError(f"expected a format {get_args(ExportFormat)}, got {file_format!r}")
        return file_format
    for name, suffix in SUFFIXES.items():
        if path.suffix.lower() == suffix:
            return name
    raise ExportError(
        f"expected a file that ends in {' or '.join(SUFFIXES.values())}, or a format; got {path}"
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an exported file says of itself, as a JSON object."""
    return {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "network": asdict(checkpoint.network.config),
        "preprocessing": asdict(checkpoint.preprocessing),
    }


def relative_difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference of two batches of embeddings, relative to the largest value.

        max |ours - theirs| / max |theirs|

    Returns:
        A number >= 0; infinity where shapes differ or something is not finite.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    largest = np.abs(theirs).max()
    difference = np.abs(ours.astype(np.float64) - theirs).max()
    return float(difference / largest) if largest > 0 else float(difference > 0)


def export_checkpoint(
    checkpoint: Checkpoint, path: Path, file_format: ExportFormat | None = None
) -> Exported:
    """Write a network for another runtime; the file appears checked and whole, or not at all.

    It takes ``clips`` (B, T, 3, height, width) float32, normalised by `model.frames`, and ``mask``
    (B, T) bool, True where a frame exists, at least once in each row. It gives ``embeddings``
    (B, D) float32. B and T may be any number from 1.

    Args:
        checkpoint: What to write.
        path: The file, replaced where it exists.
        file_format: "onnx", or "torch" for a program of `torch.export`; None decides by the name.

    Raises:
        ExportError: The format is unknown, an extra is missing, the network cannot be converted,
            the file does not embed as the network does, or it cannot be written.
    """
    file_format = choose_format(path, file_format)
    if isinstance(checkpoint.network.backbone, QuantisedBackbone):
        raise ExportError("expected a checkpoint in float to export, got one in 8 bits")
    _require_runtime(file_format)
    write = _write_onnx if file_format == "onnx" else _write_torch
    load = _load_onnx if file_format == "onnx" else _load_torch
    try:
        if path.is_dir():
            raise ExportError(f"expected a file to write, got the folder {path}")
        # Under a suffix of its kind whatever the name asked for: loaders go by it.
        with written_aside(path, suffix=SUFFIXES[file_format]) as draft:
            write(checkpoint, draft)
            difference = _check(load(draft), checkpoint, path)
    except (OSError, RuntimeError) as error:  # the latter is PyTorch's way to say it
        raise ExportError(f"could not write {path}: {reason(error)}") from error
    return Exported(path, file_format, difference)


def _require_runtime(file_format: ExportFormat) -> None:
    needed = ("onnx", "onnxscript", "onnxruntime") if file_format == "onnx" else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ExportError(
            f"expected {', '.join(missing)} to write and check ONNX, got none: "
            "pip install 'passerby[export]'"
        )


def _any_size() -> tuple[dict[int, torch.export.Dim], dict[int, torch.export.Dim]]:
    """What may be any number from 1: the same two sizes of clips and of mask."""
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("T", min=1)}
    return sizes, sizes


def _trace(checkpoint: Checkpoint) -> ExportedProgram:
    clips, mask = _make_clips(_TRACED_SHAPE, checkpoint.preprocessing)
    program = torch.export.export(
        _Served(checkpoint.network).eval(), (clips, mask), dynamic_shapes=_any_size()
    )
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def _write_onnx(checkpoint: Checkpoint, draft: Path) -> None:
    with warnings.catch_warnings():
        # PyTorch warns that one name stands for the same size of both inputs, which is the point,
        # and of what its own releases will change. What comes of it is checked, not trusted.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                _trace(checkpoint),
                dynamo=True,
                input_names=["clips", "mask"],
                output_names=["embeddings"],
                dynamic_shapes=_any_size(),  # already traced so: here it names them B and T
                verbose=False,
            )
        except Exception as error:  # converters raise whatever their passes raise
            raise ExportError(f"could not convert the network to ONNX: {error}") from error
    if program is None:
        raise ExportError("could not convert the network to ONNX: expected a program, got none")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where PyTorch notes from which lines of code a node comes
    program.model.graph.metadata_props.clear()
    program.model.metadata_props.clear()
    for name, value in describe(checkpoint).items():  # ONNX knows text alone
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(draft, external_data=False)


def _write_torch(checkpoint: Checkpoint, draft: Path) -> None:
    try:
        program = _trace(checkpoint)
    except Exception as error:  # tracing raises whatever the traced code and its passes raise
        raise ExportError(f"could not trace the network: {error}") from error
    torch.export.save(
        program, draft, extra_files={DESCRIPTION: json.dumps(describe(checkpoint), indent=1)}
    )


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise ExportError(f"expected a file that ONNX Runtime reads: {error}") from error

    def run(clips: Tensor, mask: Tensor) -> NDArray[np.float32]:
        feed = {"clips": clips.numpy(), "mask": mask.numpy()}
        embeddings: NDArray[np.float32] = session.run(["embeddings"], feed)[0]
        return embeddings

    return run


def _load_torch(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(clips: Tensor, mask: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            embeddings: Tensor = program(clips, mask)
        return embeddings.numpy()

    return run


def _check(run: Run, checkpoint: Checkpoint, path: Path) -> float:
    """Compare a file with the network.

    Returns:
        The largest relative difference.

    Raises:
        ExportError: It is above `TOLERANCE`, or the file does not take what it should.
    """
    largest = 0.0
    for shape in CHECKED_SHAPES:
        clips, mask = _make_clips(shape, checkpoint.preprocessing)
        with torch.inference_mode():
            expected: NDArray[np.float32] = checkpoint.network(clips, mask).numpy()
        try:
            got = run(clips, mask)
        except Exception as error:  # runtimes share no base class of errors
            raise ExportError(
                f"{path} not written: expected it to take {shape[0]} tracklets of {shape[1]} "
                f"frames, got {error}"
            ) from error
        largest = max(largest, relative_difference(got, expected))
    if largest > TOLERANCE:
        raise ExportError(
            f"{path} not written: expected embeddings as the network's within {TOLERANCE:g}, "
            f"got a difference of {largest:.2g}"
        )
    return largest


def _make_clips(shape: tuple[int, int], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Seeded noise in the range of normalised pixels, the last frames of odd tracklets padded.

    Returns:
        Clips (B, T, 3, height, width) float32 and mask (B, T) bool; padding holds NaN, so that a
        file that so much as multiplies it by zero is found out.
    """
    generator = torch.Generator().manual_seed(0)
    size = (3, preprocessing.height, preprocessing.width)
    clips = torch.randn(*shape, *size, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1::2, 1 + shape[1] // 2 :] = False
    clips[~mask] = torch.nan
    return clips, mask
