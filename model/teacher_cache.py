"""What a teacher says of a data set, asked once and kept on disk.

The teacher sees each frame as it lies there, and other looks of it where a recipe wants them;
training then reads its embeddings and never runs it.
"""

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model.errors import TeacherError
from model.files import reason, written_aside
from model.frames import Clip, read_frame
from model.teacher import TINY, Embeddings, Teacher
from model.views import plan_view, render_view

Progress = Callable[[int, int], None]

CACHE_FORMAT = "passerby-teacher-cache-1"
# Another number wherever `model.views` draws other views.
VIEWS_FORMAT = 4
# Frames between two writes of a caching pass: what an interruption costs, some seconds on a CPU.
CHUNK_FRAMES = 512


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
        self._looks = Looks(frames, cameras)

    def __len__(self) -> int:
        return len(self._looks.frames)

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
            return np.asarray(self._embeddings[0, self._looks.row(frames)], np.float32)
        rows = [self._looks.row(path) for path in frames]
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
        return self._looks.show(self._looks.row(frame), view, read)


class Looks:
    """The frames that a teacher sees, and what other looks of them are made of.

    Args:
        frames: N image files, each once.
        cameras: Which camera each is of; of one camera where None.

    Attributes:
        frames: As they were given.
        cameras: The numbers of frames, camera by camera.
    """

    def __init__(self, frames: Sequence[Path], cameras: Mapping[Path, str] | None) -> None:
        self.frames = list(frames)
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, frame in enumerate(self.frames):
            numbers["" if cameras is None else cameras[frame]].append(number)
        self.cameras = [numbers[camera] for camera in sorted(numbers)]
        self._rows = {path: row for row, path in enumerate(self.frames)}

    def row(self, frame: Path) -> int:
        """The number of a frame.

        Raises:
            TeacherError: It is none of them.
        """
        try:
            return self._rows[frame]
        except KeyError as error:
            raise TeacherError(
                f"expected one of the {len(self.frames)} frames that the teacher has seen, "
                f"got {frame}"
            ) from error

    def show(self, row: int, view: int, read: Callable[[Path], Clip]) -> Clip:
        """A look of frame number ``row``, of the size that ``read`` gives frames in."""
        crop = read(self.frames[row])
        if view == 0:
            return crop
        plan = plan_view(row, view, self.cameras)
        return render_view(plan, crop, lambda number: read(self.frames[number]))


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
        views: How many looks of each frame the teacher sees, see
            `model.distillation.DistillationConfig`. The others borrow from all the frames that are
            given: give those of one training half alone. More of them later cost only the new ones.
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
    looks: Looks
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
    looks = Looks(ordered, cameras)
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
