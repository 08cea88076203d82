"""A teacher beside its student: it is asked about what the student is shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.errors import TeacherError
from model.frames import Clip
from model.live_teacher import LiveTeacher
from model.teacher import Engine, PixelRange, Teacher
from model.teacher_cache import TeacherEmbeddings
from tests.model.teaching import Small

PLAIN = PixelRange("bgr", 255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def run_small(crops: NDArray[np.float32]) -> NDArray[Any]:
    with torch.inference_mode():
        return np.asarray(Small()(torch.from_numpy(crops)).numpy())


def teacher(*, tensors: bool) -> Teacher:
    """The small teacher, of 40x32 pixels, in some runtime or in PyTorch."""

    class WithBuffer(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kind", torch.zeros(1))

    network = WithBuffer().eval() if tensors else None
    return Teacher(Engine(run_small, (None, 3, 40, 32), network), PLAIN, "teacher-0")


def live(asked: Teacher, views: int = 3) -> LiveTeacher:
    frames = [Path(f"{number}.png") for number in range(6)]
    return LiveTeacher(asked, frames, {path: path.stem[0] for path in frames}, views)


def clips(height: int = 40, width: int = 32) -> Clip:
    return np.random.default_rng(0).integers(0, 256, (2, 3, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("tensors", [False, True])
def test_a_live_teacher_says_what_a_teacher_says(tensors: bool) -> None:
    asked = teacher(tensors=tensors)

    made = live(asked).see(torch.from_numpy(clips()))

    wanted = teacher(tensors=False).embed(clips().reshape(6, 40, 32, 3))
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert made.shape == (2, 3, 5)
    assert made.dtype == torch.float32
    assert not made.requires_grad
    assert made.flatten(0, 1).numpy() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(("height", "width"), [(20, 16), (80, 64), (64, 32)])
def test_crops_of_another_size_are_resized_to_the_teachers(
    height: int, width: int, tensors: bool
) -> None:
    """A crop of one colour stays what it was."""
    colours = np.random.default_rng(1).integers(0, 256, (2, 3, 1, 1, 3), dtype=np.uint8)
    shown = np.broadcast_to(colours, (2, 3, height, width, 3)).copy()
    same = np.broadcast_to(colours, (2, 3, 40, 32, 3)).copy()
    asked = live(teacher(tensors=tensors))

    made = asked.see(torch.from_numpy(shown))

    assert made.numpy() == pytest.approx(asked.see(torch.from_numpy(same)).numpy(), abs=1e-3)


def test_looks_are_those_of_a_teacher_that_was_asked_before() -> None:
    """So a recipe may move from one to the other."""
    frames = [Path(f"{number}.png") for number in range(6)]
    cameras = {path: path.stem[0] for path in frames}
    cached = TeacherEmbeddings("teacher-0", frames, np.zeros((3, 6, 5), np.float16), cameras)
    pixels = dict(zip(frames, clips().reshape(6, 40, 32, 3), strict=True))
    read: Callable[[Path], Clip] = pixels.__getitem__

    for view in range(3):
        shown = live(teacher(tensors=False)).show(frames[4], view, read)
        assert np.array_equal(shown, cached.show(frames[4], view, read))


def test_a_frame_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(TeacherError, match="expected one of the 6 frames"):
        live(teacher(tensors=False)).show(Path("gone.png"), 0, lambda _: clips()[0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_teacher_on_a_gpu_says_each_time_what_it_says_on_the_cpu() -> None:
    """The second time it is replayed, and must not have kept anything of the first."""
    on_cpu, on_gpu = teacher(tensors=True), teacher(tensors=True)
    assert on_gpu.network is not None
    on_gpu.network.cuda()
    asked = live(on_gpu)
    first = torch.from_numpy(clips())

    told = [asked.see(shown.cuda()).cpu() for shown in (first, 255 - first, first[:1])]

    wanted = [live(on_cpu).see(shown) for shown in (first, 255 - first, first[:1])]
    for one, other in zip(told, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-3)
