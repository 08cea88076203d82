"""A teacher is asked once, and what it says of frames and of their looks is remembered."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.datasets.folder import read_folder
from model.errors import InvalidFramesError, TeacherError
from model.frames import choose_frames, read_frame
from model.teacher import Engine, PixelRange, Teacher, load_teacher
from model.teacher_cache import TeacherEmbeddings, cache_embeddings
from tests.model.teaching import say_directly

SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[3] / "shared"))
WARD = SHARED / "data" / "ward"
RETAIL = SHARED / "weights" / "person-reidentification-retail-0277.xml"


class CountingTeacher(Teacher):
    """The small teacher without a runtime, counting the crops it is asked about."""

    def __init__(self, *, fail_after: int | None = None, name: str = "teacher-0") -> None:
        self.asked, self.fail_after = 0, None
        pixels = PixelRange("rgb", 255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        super().__init__(Engine(self._say, (None, 3, 40, 32)), pixels, name)
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
    monkeypatch.setattr("model.teacher_cache.CHUNK_FRAMES", 4)


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


@pytest.mark.dataset
@pytest.mark.skipif(
    not (WARD.is_dir() and RETAIL.is_file() and find_spec("openvino")),
    reason=f"needs OpenVINO, and WARD and a teacher in {SHARED}",
)
def test_a_real_teacher_knows_real_people_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten people, two cameras, four frames each."""
    monkeypatch.setattr("model.teacher_cache.CHUNK_FRAMES", 32)
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
