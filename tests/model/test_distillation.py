"""A teacher is read, asked once, remembered, and pulled towards in two ways."""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model import distillation
from model.checkpoint import make_checkpoint
from model.datasets.folder import read_folder
from model.distillation import (
    DistillationConfig,
    DistillationLoss,
    Runtime,
    Teacher,
    TeacherEmbeddings,
    cache_embeddings,
    load_teacher,
    teach_by_checkpoint,
)
from model.embedder import Embedder
from model.errors import InvalidFramesError, TeacherError
from model.frames import Preprocessing, choose_frames, read_frame
from model.network import NetworkConfig, TrackletNet

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[3] / "shared"))
WARD = SHARED / "data" / "ward"
RETAIL = SHARED / "weights" / "person-reidentification-retail-0277.xml"


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


needs_onnx = pytest.mark.skipif(
    not installed("onnx", "onnxscript", "onnxruntime"), reason="needs the extra export"
)
needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="needs the extra openvino")


class Small(nn.Module):
    """A teacher that is quick: one convolution, D_t = 5. It knows its channels apart."""

    def __init__(self, dim: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, dim, 8, stride=8)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, crops: Tensor) -> Tensor:
        cells: Tensor = self.convolution(crops).tanh()
        return cells.mean(dim=(2, 3))


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
]


def crops(count: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 40, 32, 3), dtype=np.uint8)


def say_directly(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the small teacher makes of (N, 40, 32, 3) as it takes them."""
    with torch.inference_mode():
        return np.asarray(Small()(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)).numpy())


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


@pytest.mark.parametrize(("name", "extra"), [("a.onnx", "export"), ("a.xml", "openvino")])
def test_a_missing_extra_is_named(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "find_spec", lambda _: None)
    for suffix in (".bin", Path(name).suffix):
        (tmp_path / name).with_suffix(suffix).write_bytes(b"")

    with pytest.raises(TeacherError, match=rf"pip install 'passerby\[{extra}\]'"):
        load_teacher(tmp_path / name)


@needs_onnx
@needs_onnx
@needs_openvino
def test_signals_stay_safe_after_teachers_have_come_and_gone(onnx_file: Path) -> None:
    """OpenVINO moves the signal stack of the thread that runs it, and frees it with the network."""
    code = f"""
import gc, signal
import numpy as np
from model.distillation import load_teacher
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
        distillation, "find_spec", lambda name: None if name == "onnxruntime" else "a module"
    )
    monkeypatch.setattr(distillation, "_open_onnxruntime", refuse)

    assert load_teacher(onnx_file).dim == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher": "network.pth"}, "teacher: expected an .onnx file"),
        ({"channels": "grb"}, "channels: expected"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"mean": (0.0, 0.0)}, "mean: expected 3 numbers"),
        ({"mean": (0.0, 0.0, float("nan"))}, "mean: expected 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected 3 positive numbers"),
        ({"similarity_weight": -1.0}, "similarity_weight: expected 0 or more"),
        ({"embedding_weight": float("inf")}, "embedding_weight: expected 0 or more"),
        ({"similarity_weight": 0.0, "embedding_weight": 0.0}, "got 0 for both"),
        ({"cache": ""}, "cache: expected a folder"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**{"teacher": "network.onnx", **wrong})


# The cache.


class CountingTeacher(Teacher):
    """The small teacher without a runtime, counting the crops it is asked about."""

    def __init__(self, *, fail_after: int | None = None, name: str = "teacher-0") -> None:
        self.asked, self.fail_after = 0, None
        pixels = distillation._PixelRange("rgb", 255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        super().__init__(distillation._Engine(self._say, (None, 3, 40, 32)), pixels, name)
        self.asked, self.fail_after = 0, fail_after

    def _say(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.fail_after is not None and self.asked + len(batch) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(batch)
        return say_directly(batch.transpose(0, 2, 3, 1))


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    """Eleven frames of two tracklets, larger than the teacher takes them."""
    rng = np.random.default_rng(0)
    paths = []
    for name, count in (("a", 5), ("b", 6)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(count):
            paths.append(tmp_path / "set" / name / f"{number}.png")
            Image.fromarray(rng.integers(0, 256, (80, 50, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_FRAMES", 4)


def unit(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / lengths, dtype=np.float32)


def embed_directly(teacher: Teacher, frames: Sequence[Path]) -> NDArray[np.float32]:
    return unit(teacher.embed(np.stack([read_frame(one, teacher.preprocessing) for one in frames])))


def test_a_cache_holds_what_the_teacher_says_within_half_precision(
    frames: list[Path], tmp_path: Path
) -> None:
    teacher = CountingTeacher()
    expected = embed_directly(teacher, frames)

    made = cache_embeddings(teacher, frames, tmp_path / "cache")
    read = cache_embeddings(teacher, frames, tmp_path / "cache")

    for embeddings in (made, read):
        assert (len(embeddings), embeddings.dim) == (11, 5)
        assert embeddings.of(frames) == pytest.approx(expected, rel=2**-11, abs=1e-7)
        assert embeddings.of(frames).dtype == np.float32
        assert np.array_equal(embeddings.of(frames[3]), embeddings.of(frames)[3])
    assert np.array_equal(made.of(frames), read.of(frames))


def test_a_cache_is_found_again_whatever_the_order_and_repetitions(
    frames: list[Path], tmp_path: Path
) -> None:
    first, second = CountingTeacher(), CountingTeacher()
    cache_embeddings(first, frames, tmp_path / "cache")

    again = cache_embeddings(second, [*frames[::-1], frames[0]], tmp_path / "cache")

    assert (first.asked, second.asked) == (11, 0)
    assert again.of(frames) == pytest.approx(embed_directly(first, frames), abs=1e-3)


def test_a_data_set_that_is_moved_keeps_its_cache(frames: list[Path], tmp_path: Path) -> None:
    cache_embeddings(CountingTeacher(), frames, tmp_path / "cache")
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = [tmp_path / "moved" / path.relative_to(tmp_path / "set") for path in frames]
    teacher = CountingTeacher()

    cache_embeddings(teacher, moved, tmp_path / "cache")

    assert teacher.asked == 0


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


def test_views_are_embedded_as_they_are_shown(frames: list[Path], tmp_path: Path) -> None:
    """A student is shown the very look that the teacher saw; the first is the frame itself."""
    teacher = CountingTeacher()
    known = cache_embeddings(teacher, frames, tmp_path / "cache", views=3)

    def read(path: Path) -> NDArray[np.uint8]:
        return read_frame(path, teacher.preprocessing)

    for view in range(3):
        shown = np.stack([known.show(path, view, read) for path in frames])
        expected = unit(teacher.embed(shown))
        assert known.of(frames, [view] * len(frames)) == pytest.approx(expected, abs=1e-3)
    assert np.array_equal(known.of(frames), known.of(frames, [0] * len(frames)))
    assert np.array_equal(known.show(frames[0], 0, read), read(frames[0]))


def test_views_have_a_cache_of_their_own_that_is_found_again(
    frames: list[Path], tmp_path: Path
) -> None:
    teacher = CountingTeacher()
    single = cache_embeddings(teacher, frames, tmp_path)
    several = cache_embeddings(teacher, frames, tmp_path, views=2)
    asked = teacher.asked

    again = cache_embeddings(teacher, list(reversed(frames)), tmp_path, views=2)

    assert teacher.asked == asked == 2 * len(frames)  # the frames themselves once
    assert (single.views, several.views) == (1, 2)
    assert np.array_equal(
        again.of(frames, [1] * len(frames)), several.of(frames, [1] * len(frames))
    )


def test_looks_of_other_cameras_have_another_cache(frames: list[Path], tmp_path: Path) -> None:
    """What a look borrows from depends on which camera each frame is of; the frame itself not."""
    teacher = CountingTeacher()
    cameras = {path: path.parent.name for path in frames}
    one = cache_embeddings(teacher, frames, tmp_path, views=3)

    two = cache_embeddings(teacher, frames, tmp_path, views=3, cameras=cameras)

    assert teacher.asked == 5 * len(frames)
    twos = [2] * len(frames)
    assert not np.array_equal(one.of(frames, twos), two.of(frames, twos))
    assert np.array_equal(one.of(frames), two.of(frames))


@pytest.mark.parametrize("change", ["a frame more", "a frame of another size", "another teacher"])
def test_another_list_or_teacher_has_another_cache(
    change: str, frames: list[Path], tmp_path: Path
) -> None:
    cache_embeddings(CountingTeacher(), frames[:-1], tmp_path / "cache")
    teacher = CountingTeacher(name="teacher-1" if change == "another teacher" else "teacher-0")
    asked = frames if change == "a frame more" else frames[:-1]
    if change == "a frame of another size":
        Image.new("RGB", (10, 10)).save(frames[0])

    embeddings = cache_embeddings(teacher, asked, tmp_path / "cache")

    assert teacher.asked == len(asked)
    assert embeddings.of(asked) == pytest.approx(embed_directly(teacher, asked), abs=1e-3)


def test_an_interrupted_pass_goes_on_where_it_was(frames: list[Path], tmp_path: Path) -> None:
    """Interrupted in the third chunk of four frames: eight frames are kept."""
    with pytest.raises(KeyboardInterrupt):
        cache_embeddings(CountingTeacher(fail_after=9), frames, tmp_path / "cache")
    teacher, seen = CountingTeacher(), list[tuple[int, int]]()

    resumed = cache_embeddings(
        teacher, frames, tmp_path / "cache", lambda done, total: seen.append((done, total))
    )

    assert teacher.asked == 3
    assert seen == [(4, 11), (8, 11), (11, 11)]
    whole = cache_embeddings(CountingTeacher(), frames, tmp_path / "other")
    assert np.array_equal(resumed.of(frames), whole.of(frames))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_a_part_that_was_damaged_is_made_again(frames: list[Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache_embeddings(CountingTeacher(fail_after=9), frames, tmp_path / "cache")
    parts = sorted((tmp_path / "cache").glob("*.parts/*"))
    parts[0].write_bytes(parts[0].read_bytes()[:-3])
    teacher = CountingTeacher()

    resumed = cache_embeddings(teacher, frames, tmp_path / "cache")

    assert teacher.asked == 4 + 3
    assert resumed.of(frames) == pytest.approx(embed_directly(teacher, frames), abs=1e-3)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rename(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"teacher-0", b"teacher-9"))


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + np.float16("nan").tobytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "is damaged"), (rename, "expected a cache of"), (spoil, "expected finite")],
)
def test_a_cache_that_does_not_fit_is_refused(
    damage: Callable[[Path], None], message: str, frames: list[Path], tmp_path: Path
) -> None:
    cache_embeddings(CountingTeacher(), frames, tmp_path / "cache")
    [path] = (tmp_path / "cache").iterdir()
    damage(path)

    with pytest.raises(TeacherError, match=f"{message}.*remove it"):
        cache_embeddings(CountingTeacher(), frames, tmp_path / "cache")


def test_frames_that_are_none_are_refused(frames: list[Path], tmp_path: Path) -> None:
    teacher, cache = CountingTeacher(), tmp_path / "cache"
    with pytest.raises(TeacherError, match="got none"):
        cache_embeddings(teacher, [], cache)
    with pytest.raises(TeacherError, match=r"could not read .*gone\.png"):
        cache_embeddings(teacher, [tmp_path / "gone.png"], cache)
    frames[0].write_bytes(b"no image")
    with pytest.raises(InvalidFramesError, match=r"could not decode .*0\.png"):
        cache_embeddings(teacher, frames, cache)


def test_a_cache_that_cannot_be_written_is_an_error(frames: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(TeacherError, match="could not write"):
        cache_embeddings(CountingTeacher(), frames, tmp_path / "cache")


def test_a_frame_that_the_teacher_has_not_seen_is_an_error(
    frames: list[Path], tmp_path: Path
) -> None:
    embeddings = cache_embeddings(CountingTeacher(), frames[:-1], tmp_path / "cache")

    with pytest.raises(TeacherError, match=r"one of the 10 frames .*5\.png"):
        embeddings.of(frames)
    with pytest.raises(TeacherError, match=r"expected embeddings \(V >= 1, 11, D_t\)"):
        TeacherEmbeddings("teacher-0", frames, np.zeros((1, 10, 5), np.float16))


# The loss.


def make_loss(
    dim: int = 6, teacher_dim: int = 6, *, similarity: float = 1.0, embedding: float = 1.0
) -> DistillationLoss:
    config = DistillationConfig(
        "teacher.onnx", similarity_weight=similarity, embedding_weight=embedding
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DistillationLoss(dim, teacher_dim, config)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection_of(loss: DistillationLoss) -> nn.Linear:
    assert isinstance(loss.projection, nn.Linear)
    return loss.projection


def rotation(dim: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(drawn(dim, dim, seed=9))[0]
    return turned


def test_the_terms_are_those_of_a_slow_loop() -> None:
    loss = make_loss(6, 4)
    student, teacher = drawn(2, 3, 6), drawn(2, 3, 4, seed=1)
    s, t = student.flatten(0, 1).double().numpy(), teacher.flatten(0, 1).double().numpy()
    weight = projection_of(loss).weight.detach().double().numpy()
    bias = projection_of(loss).bias.detach().double().numpy()

    def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    squares = [(cosine(s[n], s[m]) - cosine(t[n], t[m])) ** 2 for n in range(6) for m in range(6)]
    angles = [1 - cosine(weight @ s[n] + bias, t[n]) for n in range(6)]
    terms = loss(student, teacher)

    assert terms.similarity.item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert terms.embedding.item() == pytest.approx(np.mean(angles), rel=1e-5)


def test_a_student_with_the_teachers_geometry_has_no_similarity_loss() -> None:
    """Turned, scaled and in more dimensions, angles are the same."""
    teacher = drawn(2, 3, 6)
    padded = torch.cat([7 * teacher @ rotation(6), torch.zeros(2, 3, 4)], dim=2)

    assert make_loss(10, 6)(padded, teacher).similarity.item() == pytest.approx(0, abs=1e-10)


def test_orthogonal_frames_against_equal_ones_cost_the_share_of_pairs() -> None:
    """Of N^2 pairs N are a frame with itself; each of the others is off by 1: here 12 of 16."""
    orthogonal, equal = torch.eye(4).view(2, 2, 4), torch.ones(2, 2, 6)

    assert make_loss(4, 6)(orthogonal, equal).similarity.item() == pytest.approx(12 / 16)


def test_the_length_of_embeddings_counts_on_neither_side() -> None:
    loss = make_loss()
    nn.init.zeros_(projection_of(loss).bias)
    student, teacher = drawn(2, 3, 6), drawn(2, 3, 6, seed=1)
    lengths = 0.1 + drawn(2, 3, 1, seed=2).abs()

    plain, scaled = loss(student, teacher), loss(lengths * student, 5 * teacher)

    assert scaled.similarity.item() == pytest.approx(plain.similarity.item(), rel=1e-5)
    assert scaled.embedding.item() == pytest.approx(plain.embedding.item(), rel=1e-5)


def test_a_projection_that_reproduces_the_teacher_has_no_embedding_loss() -> None:
    loss, student, turn = make_loss(), drawn(2, 3, 6), rotation(6)
    projection_of(loss).weight.data = turn.T.contiguous()
    nn.init.zeros_(projection_of(loss).bias)

    assert loss(student, 3 * student @ turn).embedding.item() == pytest.approx(0, abs=1e-6)
    assert loss(student, -student @ turn).embedding.item() == pytest.approx(2)


def test_the_total_is_the_weighted_sum_and_alone_has_a_graph() -> None:
    student, teacher = drawn(2, 3, 6).requires_grad_(), drawn(2, 3, 6, seed=1)

    terms = make_loss(similarity=0.5, embedding=3.0)(student, teacher)

    expected = 0.5 * terms.similarity.item() + 3 * terms.embedding.item()
    assert terms.total.item() == pytest.approx(expected)
    assert terms.total.requires_grad
    assert not terms.similarity.requires_grad
    assert not terms.embedding.requires_grad


@pytest.mark.parametrize("student", [torch.zeros(2, 3, 6), torch.ones(2, 3, 6), drawn(1, 1, 6)])
def test_gradients_are_finite_even_where_frames_are_equal_or_zero(student: Tensor) -> None:
    loss, student = make_loss(), student.clone().requires_grad_()

    loss(student, drawn(*student.shape, seed=1)).total.backward()

    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in loss.parameters())


def test_the_loss_is_float32_within_autocast() -> None:
    loss, student, teacher = make_loss(), drawn(2, 3, 6), drawn(2, 3, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss(student.bfloat16(), teacher)

    exact = loss(student.bfloat16().float(), teacher)

    assert rough.total.dtype == torch.float32
    assert rough.total.item() == exact.total.item()


def test_a_step_down_the_gradient_brings_the_student_nearer() -> None:
    loss, student = make_loss(), drawn(2, 3, 6).requires_grad_()
    teacher = drawn(2, 3, 6, seed=1)
    before = loss(student, teacher)
    before.total.backward()
    assert student.grad is not None

    after = loss(student - 0.1 * student.grad, teacher)

    assert after.total < before.total


def test_without_a_projection_the_student_stands_where_the_teacher_does() -> None:
    config = DistillationConfig("t.onnx", projection=False)
    loss = DistillationLoss(6, 6, config)
    said = drawn(2, 3, 6)

    assert list(loss.parameters()) == []
    assert loss(said, said).total.item() == pytest.approx(0, abs=1e-6)
    assert loss(said, -said).embedding.item() == pytest.approx(2)
    with pytest.raises(TeacherError, match=r"without a projection, 6, got 5: set network\.head"):
        DistillationLoss(5, 6, config)


def test_shapes_that_do_not_fit_are_refused() -> None:
    loss = make_loss(6, 4)
    for student, teacher in (
        (drawn(6, 6), drawn(6, 4)),
        (drawn(2, 3, 5), drawn(2, 3, 4)),
        (drawn(2, 3, 6), drawn(2, 3, 6)),
        (drawn(2, 3, 6), drawn(3, 2, 4)),
    ):
        with pytest.raises(TeacherError, match="expected"):
            loss(student, teacher)


# A real teacher.


@pytest.mark.dataset
@pytest.mark.skipif(
    not (WARD.is_dir() and RETAIL.is_file() and installed("openvino")),
    reason=f"needs OpenVINO, and WARD and a teacher in {SHARED}",
)
def test_a_real_teacher_knows_real_people_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten people, two cameras, four frames each."""
    monkeypatch.setattr(distillation, "CHUNK_FRAMES", 32)
    teacher = load_teacher(RETAIL, channels="bgr")
    tracklets = [one for one in read_folder(WARD) if one.camera in ("cam_1", "cam_2")][:20]
    frames = [[one.frames[i] for i in choose_frames(len(one.frames), 4)] for one in tracklets]

    embeddings = cache_embeddings(teacher, [one for paths in frames for one in paths], tmp_path)

    means = unit(np.stack([embeddings.of(paths).mean(axis=0) for paths in frames]))
    first = np.array([one.camera == "cam_1" for one in tracklets])
    cosines = means[first] @ means[~first].T
    same, others = np.diag(cosines), cosines[~np.eye(len(cosines), dtype=bool)]
    assert teacher.dim == 256
    assert len(cosines) == 10
    assert (cosines.argmax(axis=1) == np.arange(10)).mean() >= 0.9
    assert same.mean() > others.mean() + 0.3
