"""A teacher is read, named, run and refused."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.checkpoint import make_checkpoint
from model.embedder import Embedder
from model.errors import TeacherError
from model.frames import Preprocessing
from model.network import NetworkConfig, TrackletNet
from model.teacher import Channels, Runtime, load_teacher, teach_by_checkpoint
from tests.model.teaching import Small, say_directly

ROOT = Path(__file__).parents[2]


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


needs_onnx = pytest.mark.skipif(
    not installed("onnx", "onnxscript", "onnxruntime"), reason="needs the extra export"
)
needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="needs the extra openvino")


class WithCells(Small):
    """Makes a map and not a vector: (N, 5, 5, 4)."""

    def forward(self, crops: Tensor) -> Tensor:
        cells: Tensor = self.convolution(crops)
        return cells


class Root(Small):
    """Makes NaN of what is darker than grey."""

    def forward(self, crops: Tensor) -> Tensor:
        return (crops.mean(dim=(2, 3)) - 100).sqrt()


def write_onnx(
    network: nn.Module, path: Path, *, batch: int | None = None, size: tuple[int, ...] = (3, 40, 32)
) -> Path:
    """Export with a fixed batch, or one of any size."""
    dynamic = None if batch else ({0: torch.export.Dim("N", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's exporter warns of its own future
        program = torch.onnx.export(
            network.eval(),
            (torch.zeros(batch or 2, *size),),
            dynamo=True,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(Small(), tmp_path_factory.mktemp("teacher") / "small.onnx")


@pytest.fixture(scope="module")
def fixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(Small(), tmp_path_factory.mktemp("teacher") / "fixed.onnx", batch=4)


@pytest.fixture(scope="module")
def ir_file(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import openvino

    path = tmp_path_factory.mktemp("teacher") / "small.xml"
    openvino.save_model(openvino.Core().read_model(onnx_file), path, compress_to_fp16=False)
    return path


RUNTIMES = [
    pytest.param("onnx_file", "onnxruntime", marks=needs_onnx),
    pytest.param("fixed_file", "onnxruntime", marks=needs_onnx),
    pytest.param("onnx_file", "openvino", marks=[needs_onnx, needs_openvino]),
    pytest.param("fixed_file", "openvino", marks=[needs_onnx, needs_openvino]),
    pytest.param("ir_file", "auto", marks=[needs_onnx, needs_openvino]),
    pytest.param("ir_file", "torch", marks=[needs_onnx, needs_openvino]),
]


def crops(count: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 40, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(("file", "runtime"), RUNTIMES)
def test_a_teacher_embeds_each_crop_as_its_network_does(
    file: str, runtime: Runtime, request: pytest.FixtureRequest
) -> None:
    """Also 37 crops, which fill neither two runs of 16 nor nine of a fixed 4."""
    teacher = load_teacher(
        request.getfixturevalue(file), runtime=runtime, channels="rgb", scale=255.0
    )

    for count in (0, 1, 37):
        got = teacher.embed(crops(count))

        assert got.shape == (count, 5)
        assert got.dtype == np.float32
        assert got == pytest.approx(say_directly((crops(count) / 255).astype(np.float32)), abs=1e-5)
    assert teacher.dim == 5
    assert (teacher.preprocessing.height, teacher.preprocessing.width) == (40, 32)


@needs_onnx
def test_pixels_arrive_as_the_teacher_was_said_to_take_them(onnx_file: Path) -> None:
    """(pixel / scale - mean) / std with mean and std in RGB order, and only then BGR."""
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    teacher = load_teacher(onnx_file, channels="bgr", scale=255.0, mean=mean, std=std)

    got = teacher.embed(crops(3))

    pixels = ((crops(3) / 255 - mean) / std).astype(np.float32)
    assert got == pytest.approx(say_directly(pixels[..., ::-1]), abs=1e-5)
    assert got != pytest.approx(say_directly(pixels), abs=1e-2)


@needs_onnx
def test_a_teacher_is_named_after_its_content_and_how_it_takes_pixels(
    onnx_file: Path, fixed_file: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied.onnx"
    copied.write_bytes(onnx_file.read_bytes())
    name = load_teacher(onnx_file).fingerprint

    assert name.startswith("teacher-")
    assert load_teacher(copied).fingerprint == name
    assert load_teacher(fixed_file).fingerprint != name
    assert load_teacher(onnx_file, channels="rgb").fingerprint != name


@needs_onnx
@needs_openvino
def test_the_weights_beside_an_ir_are_part_of_its_name(ir_file: Path, tmp_path: Path) -> None:
    for suffix in (".xml", ".bin"):
        (tmp_path / f"other{suffix}").write_bytes(ir_file.with_suffix(suffix).read_bytes())
    other = tmp_path / "other.xml"
    assert load_teacher(other).fingerprint == load_teacher(ir_file).fingerprint
    with other.with_suffix(".bin").open("ab") as weights:
        weights.write(b"\0")

    assert load_teacher(other).fingerprint != load_teacher(ir_file).fingerprint


@pytest.mark.parametrize("name", ["teacher.onnx", "teacher.xml"])
def test_a_missing_teacher_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="got nothing at"):
        load_teacher(tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "runtime"),
    [
        pytest.param(".onnx", "onnxruntime", marks=needs_onnx),
        pytest.param(".onnx", "openvino", marks=needs_openvino),
        pytest.param(".xml", "openvino", marks=needs_openvino),
    ],
)
def test_a_damaged_teacher_is_an_error(suffix: str, runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(b"no network")
    path.with_suffix(".bin").write_bytes(b"")

    with pytest.raises(TeacherError, match="could not read"):
        load_teacher(path, runtime=runtime)


@needs_openvino
@needs_onnx
def test_an_ir_without_its_weights_is_an_error(ir_file: Path, tmp_path: Path) -> None:
    (tmp_path / "small.xml").write_bytes(ir_file.read_bytes())

    with pytest.raises(TeacherError, match=r"got nothing at .*small\.bin"):
        load_teacher(tmp_path / "small.xml")


@needs_onnx
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (3, 5, 40, 32),
            r"input \(N, 3, height, width\) of a fixed size, got \(None, 3, 5, 40, 32",
        ),
        ((4, 40, 32), r"input \(N, 3, height, width\)"),
        ((3, 16, 16), "expected an input of at least 32x32"),
    ],
)
def test_a_teacher_of_another_input_is_refused(
    size: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    class Mean(nn.Module):
        def forward(self, crops: Tensor) -> Tensor:
            return crops.flatten(1)[:, :6] + 1

    path = write_onnx(Mean(), tmp_path / "teacher.onnx", size=size)

    with pytest.raises(TeacherError, match=message):
        load_teacher(path)


@needs_onnx
def test_a_teacher_with_two_outputs_is_refused(tmp_path: Path) -> None:
    class Two(Small):
        def forward(self, crops: Tensor) -> Any:
            return super().forward(crops), crops.mean(dim=1)

    path = write_onnx(Two(), tmp_path / "teacher.onnx")

    with pytest.raises(TeacherError, match="one input and one output, got 1"):
        load_teacher(path)


@needs_onnx
def test_a_map_counts_as_one_long_embedding(tmp_path: Path) -> None:
    """Some networks give (N, D, 1, 1)."""
    assert load_teacher(write_onnx(WithCells(), tmp_path / "teacher.onnx")).dim == 5 * 5 * 4


@needs_onnx
def test_a_teacher_that_gives_nan_is_refused(tmp_path: Path) -> None:
    teacher = load_teacher(write_onnx(Root(), tmp_path / "teacher.onnx"))  # grey is well

    with pytest.raises(TeacherError, match="got NaN or infinity"):
        teacher.embed(np.zeros((1, 40, 32, 3), np.uint8))


@needs_onnx
@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 32, 40, 3), np.uint8), np.zeros((40, 32, 3), np.uint8), crops(1) / 255],
)
def test_crops_of_another_shape_are_refused(onnx_file: Path, wrong: Any) -> None:
    with pytest.raises(TeacherError, match="expected crops"):
        load_teacher(onnx_file).embed(wrong)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.teacher.find_spec", lambda _: None)
    (tmp_path / "a.onnx").write_bytes(b"")

    with pytest.raises(TeacherError, match=r"pip install 'passerby\[export\]'"):
        load_teacher(tmp_path / "a.onnx")


@needs_onnx
@needs_openvino
def test_pytorch_runs_what_openvino_would_and_is_the_same_teacher(
    ir_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_teacher(ir_file)
    monkeypatch.setattr("model.teacher.find_spec", lambda _: None)

    teacher = load_teacher(ir_file)

    assert teacher.network is not None
    assert expected.network is None
    assert teacher.fingerprint == expected.fingerprint
    assert teacher.embed(crops(5)) == pytest.approx(expected.embed(crops(5)), abs=1e-5)


def test_pytorch_reads_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")

    with pytest.raises(TeacherError, match=r"expected an \.xml file for PyTorch"):
        load_teacher(tmp_path / "a.onnx", runtime="torch")


@needs_onnx
@needs_openvino
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_tensors_are_taken_as_arrays_are(ir_file: Path, channels: Channels) -> None:
    teacher = load_teacher(
        ir_file, runtime="torch", channels=channels, scale=50.0, mean=(1, 2, 3), std=(0.5, 1, 2)
    )
    pixels = torch.from_numpy(crops(6)).permute(0, 3, 1, 2).float()

    with torch.inference_mode():
        made = teacher.embed_pixels(pixels)

    assert made.numpy() == pytest.approx(teacher.embed(crops(6)), abs=1e-5)


@needs_onnx
def test_tensors_are_for_pytorch_alone(onnx_file: Path) -> None:
    with pytest.raises(TeacherError, match="expected a teacher that PyTorch runs"):
        load_teacher(onnx_file).embed_pixels(torch.zeros(1, 3, 40, 32))


@needs_onnx
@needs_openvino
def test_signals_stay_safe_after_teachers_have_come_and_gone(onnx_file: Path) -> None:
    """OpenVINO moves the signal stack of the thread that runs it, and frees it with the network."""
    code = f"""
import gc, signal
import numpy as np
from model.teacher import load_teacher
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
first = load_teacher({str(onnx_file)!r}, runtime="openvino")
second = load_teacher({str(onnx_file)!r}, runtime="openvino")
size = first.preprocessing
for teacher in (first, second):
    teacher.embed(np.zeros((1, size.height, size.width, 3), np.uint8))
del teacher, first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGTERM)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )

    assert (answer.returncode, answer.stdout.split()) == (0, ["handled"]), answer.stderr


@needs_openvino
def test_an_onnx_teacher_runs_in_openvino_where_that_alone_is_installed(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise AssertionError("ONNX Runtime was asked for")

    monkeypatch.setattr(
        "model.teacher.find_spec", lambda name: None if name == "onnxruntime" else "a module"
    )
    monkeypatch.setattr("model.teacher._open_onnxruntime", refuse)

    assert load_teacher(onnx_file).dim == 5


def test_a_network_of_ours_teaches_what_it_embeds() -> None:
    """Each crop as a tracklet of one frame, through the checkpoint's own preprocessing."""
    size = Preprocessing(height=40, width=32, interpolation="bicubic")
    torch.manual_seed(0)
    checkpoint = make_checkpoint(TrackletNet(NetworkConfig(backbone="conv5", head=5)), size)

    teacher = teach_by_checkpoint(checkpoint)

    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    expected = [one.embedding for one in embedder.embed([crop[None] for crop in crops(20)])]
    assert teacher.embed(crops(20)) == pytest.approx(np.stack(expected), abs=1e-5)
    assert (teacher.dim, teacher.preprocessing) == (5, size)
    assert teacher.fingerprint == f"teacher-{checkpoint.fingerprint}"
