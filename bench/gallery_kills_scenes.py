"""What a killed command finds, what it is to do, and what may be there afterwards.

A scene is one command on one stock of files: galleries as a service that was killed leaves them,
with write-ahead logs and traces of what was erased, snapshots and exports of before the erasures,
a ledger of after them. It knows two outcomes, as before and as done; there is no third.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from bench.gallery_truth import CALIBRATION, CAMERAS, MODEL, NEVER, START, MismatchError
from index.embedded import EmbeddedGallery
from index.exporting import export_gallery
from index.gallery import Enrolment, Filters, NotFoundError, TrackletRecord
from index.guest import write_calibration
from index.importing import import_gallery
from index.ledger import read_ledger, write_ledger
from index.restore import REPLACED_NAME, restore
from index.saved import FILE_NAME as INDEX_NAME
from index.snapshot import snapshot
from index.store import FILE_NAME, LOCK_NAME
from model.embedder import TrackletEmbedding
from model.frames import Clip, Preprocessing
from service.audit import DIRECTORY as AUDIT_NAME
from service.cli import main
from service.reembedding import reembed

DIMENSION = 64
INDEX = "HNSW8"  # a kind that is saved
_NEXT_MODEL = "trsa-next"
_TELLING_BYTES = 48  # of a vector, by which it is found in files
_EARLY, _LATE = range(120), range(120, 150)  # numbers of those enrolled before the snapshot, after
_ERASED_NAME = "p1"
_ERASED_ID = "t5"
_STRIP_BYTES = 24_000  # enough in all for SQLite to write before it commits
_ERASED_AT = START + timedelta(hours=1)
_FAR = 1000
_ALL_EARLY = frozenset(f"t{number}" for number in _EARLY)
ERASED = frozenset({_ERASED_ID, *(f"t{number}" for number in _EARLY if number % 9 == 1)})
_OF_EARLY = _ALL_EARLY - ERASED  # of whom an old snapshot may bring back
_NOW = _OF_EARLY | {f"t{number}" for number in _LATE}
GALLERY, TARGET = "gallery", "made"


class State(NamedTuple):
    """What a gallery holds.

    Args:
        model: Of its embeddings.
        tracklets: Record, embedding, strip and kept frames, by id.
        banned: The ids, of all that these scenes know, that its ledger bans.
        threshold: Of its calibration.
    """

    model: str | None
    tracklets: dict[str, tuple[Any, ...]]
    banned: frozenset[str]
    threshold: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is after a command: the gallery, and what the command made beside it."""

    gallery: State | None
    target: State | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """A command to be killed.

    Args:
        name: Of the command, and on what.
        stock: What lies there before, by the name that it gets there; see `Stock`.
        leaves: The ids of those who are in the gallery when it is done.
        work: Does it, in a folder; returns its exit status.
        again: Does it once more, where it has not been done.
        is_repeatable: Whether it may be given again, as it is, where it has been done.
        target: What kind of thing it makes; None where it changes the gallery alone.
        argv: Of the command, in a folder; None for what is no command of its own.
    """

    name: str
    stock: dict[str, str]
    leaves: frozenset[str]
    work: Callable[[Path], int]
    again: Callable[[Path], int]
    is_repeatable: bool = True
    target: str | None = None
    argv: Callable[[Path], list[str]] | None = None


class _NextModel:
    """An embedder that costs nothing."""

    model = _NEXT_MODEL
    dim = DIMENSION
    preprocessing = Preprocessing()

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def warm_up(self) -> None:
        """Nothing to do."""

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """What the first pixels of each are."""
        del with_attention
        return [
            TrackletEmbedding(clip.ravel()[:DIMENSION].astype(np.float32) + 0.5) for clip in clips
        ]


def everybody() -> dict[str, Enrolment]:
    """All that these scenes enrol, by id; the same each time."""
    rng = np.random.default_rng(0)
    return {f"t{number}": _enrolment(number, rng) for number in (*_EARLY, *_LATE)}


def _enrolment(number: int, rng: np.random.Generator) -> Enrolment:
    record = TrackletRecord(
        tracklet_id=f"t{number}",
        identity=None if number % 9 == 8 else f"p{number % 9}",
        camera=CAMERAS[number % len(CAMERAS)],
        metadata={"number": number},
        frames_received=1,
        frames_used=1,
        model=MODEL,
        created_at=START + timedelta(seconds=number, hours=2 * (number in _LATE)),
        content=f"{number:064x}",
        quality={"frames": 1},
    )
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8)).save(picture, "JPEG")
    strip = b"\xff\xd8\xff" + rng.bytes(_STRIP_BYTES)
    vector = rng.standard_normal(DIMENSION).astype(np.float32)
    return Enrolment(record, vector, strip, (picture.getvalue(),))


class Stock:
    """Files that scenes begin with, made once.

    - `early`: a gallery, closed, with a saved index, before anybody was erased.
    - `live`: it later: some were erased, others came, and its service was killed before it could
      remove the traces.
    - `old.passerby`, `old-export`: of the first. `new-export`, `ledger.json`: of the second.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        known = everybody()
        with EmbeddedGallery(folder / "early", index=INDEX, clock=lambda: _ERASED_AT) as gallery:
            gallery.add([known[f"t{number}"] for number in _EARLY])
            gallery.set_calibration(CALIBRATION)
        snapshot(folder / "early", folder / "old.passerby")
        export_gallery(folder / "early", folder / "old-export", strips=True)
        self._live_on(known)
        export_gallery(folder / "live", folder / "new-export", strips=True)
        write_ledger(folder / "live", folder / "ledger.json")

    def _live_on(self, known: dict[str, Enrolment]) -> None:
        shutil.copytree(self.folder / "early", self.folder / "running")
        gallery = EmbeddedGallery(self.folder / "running", index=INDEX, clock=lambda: _ERASED_AT)
        with _forgetting_nothing(gallery):
            gallery.remove_identity(_ERASED_NAME)
            gallery.remove(_ERASED_ID)
            gallery.add([known[f"t{number}"] for number in _LATE])
            shutil.copytree(self.folder / "running", self.folder / "live")
        gallery.close()
        shutil.rmtree(self.folder / "running")
        if not (self.folder / "live" / f"{FILE_NAME}-wal").stat().st_size:
            raise MismatchError("expected a write-ahead log, got none")

    def lay(self, scene: Scene, folder: Path) -> None:
        """Put a scene's files into a new folder."""
        folder.mkdir()
        for name, source in scene.stock.items():
            if (self.folder / source).is_dir():
                shutil.copytree(self.folder / source, folder / name)
            else:
                shutil.copy(self.folder / source, folder / name)


@contextlib.contextmanager
def _forgetting_nothing(gallery: EmbeddedGallery) -> Iterator[None]:
    """Have a gallery leave the traces of what it erases in its files."""
    store: Any = gallery._store  # nothing else leaves them for sure
    forget = store.forget
    store.forget = lambda **_: None
    try:
        yield
    finally:
        store.forget = forget


def _passerby(given: Callable[[Path], list[str]], folder: Path) -> int:
    """Run the command, as it runs when somebody gives it; returns its status."""
    sys.argv = ["passerby", *given(folder)]
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def _command(
    name: str, stock: dict[str, str], leaves: frozenset[str], *given: str, **more: Any
) -> Scene:
    """A scene of `passerby`; of what is given, what begins with @ is a name in the folder."""
    again = more.pop("again", given)

    def argv(words: Sequence[str], folder: Path) -> list[str]:
        return [str(folder / word[1:]) if word.startswith("@") else word for word in words]

    first = partial(argv, given)
    return Scene(
        name,
        stock,
        leaves,
        partial(_passerby, first),
        partial(_passerby, partial(argv, again)),
        argv=first,
        **more,
    )


def _called(name: str, stock: dict[str, str], work: Callable[[Path], object]) -> Scene:
    """A scene of what is no command of its own, or needs more than files."""

    def done(folder: Path) -> int:
        work(folder)
        return 0

    return Scene(name, stock, _ALL_EARLY, done, done)


def _reembed(folder: Path) -> None:
    if not reembed(folder / GALLERY, _NextModel(), Console(file=io.StringIO())):
        raise MismatchError("expected the gallery to be free, got one in use")


def _accept(folder: Path) -> None:
    with EmbeddedGallery(folder / GALLERY, index=INDEX) as gallery:
        gallery.assign([f"t{number}" for number in _EARLY if number % 9 == 8], "p99")


def _calibrate(folder: Path) -> None:
    write_calibration(folder / GALLERY, replace(CALIBRATION, threshold=2.0))


_DIR = ("--data-dir", f"@{GALLERY}")
_LIVE, _EARLIER = {GALLERY: "live"}, {GALLERY: "early"}
_OLD = {"old": "old.passerby", "ledger.json": "ledger.json"}
_RESTORE = ("restore", "@old", *_DIR, "--any-model")
_SCENES: tuple[Scene, ...] = (
    _command("restore with a ledger, where nothing was", _OLD, _OF_EARLY, *_RESTORE,
             "--ledger", "@ledger.json", is_repeatable=False),
    _command("restore over a gallery in use before", {**_OLD, **_LIVE}, _OF_EARLY,
             *_RESTORE, "--replace"),
    _command("restore over a gallery with a saved index", {**_OLD, **_EARLIER}, _OF_EARLY,
             *_RESTORE, "--replace", "--ledger", "@ledger.json"),
    _command("import where nothing was", {"given": "new-export"}, _NOW,
             "import-gallery", "@given", *_DIR),
    _command("import that adds and erases", {"given": "new-export", **_EARLIER}, _NOW,
             "import-gallery", "@given", *_DIR),
    _command("import of who was erased", {"given": "old-export", **_LIVE}, _NOW,
             "import-gallery", "@given", *_DIR),
    _command("export", _LIVE, _NOW, "export-gallery", f"@{TARGET}", *_DIR, "--strips",
             target="export", is_repeatable=False),
    _command("snapshot", _LIVE, _NOW, "snapshot", f"@{TARGET}", *_DIR,
             target="snapshot", is_repeatable=False),
    _command("snapshot over another", {TARGET: "old.passerby", **_LIVE}, _NOW,
             "snapshot", f"@{TARGET}", *_DIR, "--overwrite", target="snapshot"),
    _command("ledger", _LIVE, _NOW, "ledger", f"@{TARGET}", *_DIR, target="ledger"),
    _command("erase-tracklet", _EARLIER, _ALL_EARLY - {"t7"}, "erase-tracklet", "t7", *_DIR,
             is_repeatable=False),
    _called("reembed", _EARLIER, _reembed),
    _called("accept", _EARLIER, _accept),
    _called("calibrate", _EARLIER, _calibrate),
)  # fmt: skip


def scenes() -> tuple[Scene, ...]:
    """All that is killed."""
    return _SCENES


def look(scene: Scene, folder: Path) -> Outcome:
    """What is in a scene's folder; it is opened, so it should be a copy.

    Raises:
        MismatchError: A file holds somebody who is not in what it is of.
        GalleryError: Something cannot be opened.
    """
    found = Outcome(_gallery_in(folder / GALLERY), _target_in(scene, folder))
    for aside in (folder / GALLERY).glob(f"{REPLACED_NAME}*"):
        if not (aside / FILE_NAME).is_file():
            raise MismatchError(f"expected a gallery that was put aside whole, got {aside.name}")
    return found


def _gallery_in(directory: Path) -> State | None:
    """What a gallery holds; None where there is none, or an empty one without a past."""
    if not (directory / FILE_NAME).exists():
        return None
    with EmbeddedGallery(directory, index=INDEX) as gallery:
        state = _read(gallery)
        _check_search(gallery, state)
        gallery.expire(NEVER)  # nobody is due: it only removes traces
    _check_traces([one for one in directory.iterdir() if one.is_file()], state)
    unfinished = {one.name for one in directory.iterdir() if "restoring" in one.name}
    if unfinished:
        raise MismatchError(f"expected nothing of a killed restore, got {unfinished}")
    return state if state.tracklets or state.banned else None


def check_right(scene: Scene, done: Outcome) -> None:
    """Return where a scene that nobody disturbed came out right, by what was drawn for it.

    Raises:
        MismatchError: Somebody is missing, came back, or is forgotten to have been erased.
    """
    found = frozenset(done.gallery.tracklets if done.gallery else ())
    if found != scene.leaves:
        raise MismatchError(f"{scene.name}: expected others, got {sorted(found ^ scene.leaves)}")
    is_later = not {"live", "ledger.json", "new-export"}.isdisjoint(scene.stock.values())
    for state in (done.gallery, done.target):
        if state is not None and is_later and not state.banned >= ERASED:
            raise MismatchError(f"{scene.name}: expected {len(ERASED)} in the ledger, got fewer")
    target = done.target
    if target is not None and target.tracklets and target.tracklets.keys() != scene.leaves:
        raise MismatchError(f"{scene.name}: expected {TARGET} to hold them, got others")


def read_aside(directory: Path) -> State:
    """What a gallery holds that was put aside; traces may be in it."""
    with EmbeddedGallery(directory, index=INDEX) as gallery:
        return _read(gallery)


def _read(gallery: EmbeddedGallery) -> State:
    records = gallery.list(Filters(), limit=_FAR).records
    ledger, calibration = gallery.erasures(), gallery.calibration()
    known = everybody()
    return State(
        gallery.model,
        {
            one.tracklet_id: (
                one,
                gallery.embedding(one.tracklet_id).tobytes(),
                _kept(gallery.strip, one.tracklet_id),
                _kept(gallery.frames, one.tracklet_id),
            )
            for one in records
        },
        frozenset(name for name, each in known.items() if ledger.bans(each.record)),
        None if calibration is None else calibration.threshold,
    )


def _kept(ask: Callable[[str], Any], tracklet_id: str) -> Any:
    try:
        return ask(tracklet_id)
    except NotFoundError:
        return None


def _check_search(gallery: EmbeddedGallery, state: State) -> None:
    """FAISS has to hold what the store does."""
    if not state.tracklets or state.model is None:
        return
    query = np.zeros(DIMENSION, np.float32)
    found = gallery.search(query, model=state.model, top_k=_FAR, group_by="tracklet")
    got = {match.record.tracklet_id for match in found.matches}
    if got != state.tracklets.keys() or found.searched != len(state.tracklets):
        raise MismatchError(f"expected {len(state.tracklets)} tracklets in answers, got {len(got)}")


def _check_traces(paths: Sequence[Path], state: State | None) -> None:
    """Look in files for embeddings of those who are not in what they are of."""
    held = frozenset(state.tracklets) if state else frozenset()
    gone = [each for name, each in everybody().items() if name not in held]
    for path in paths:
        content = path.read_bytes()
        needles = (each.embedding.tobytes()[:_TELLING_BYTES] for each in gone)
        if found := sum(needle in content for needle in needles):
            raise MismatchError(f"expected no trace of others, got {found} in {path.name}")


def _target_in(scene: Scene, folder: Path) -> State | None:
    """What a snapshot, an export or a ledger holds; None where there is none."""
    target, opened = folder / TARGET, folder / "opened"
    if scene.target is None or not os.path.lexists(target):
        return None
    if scene.target == "ledger":
        ledger = read_ledger(target)
        known = everybody().items()
        return State(None, {}, frozenset(n for n, each in known if ledger.bans(each.record)), None)
    if scene.target == "snapshot":
        restore(target, opened)
    else:
        import_gallery(target, opened)
    with EmbeddedGallery(opened, index=INDEX) as gallery:
        state = _read(gallery)
    _check_traces([one for one in (target, *target.rglob("*")) if one.is_file()], state)
    return state


def check_leftovers(scene: Scene, folder: Path, *, aside: int) -> None:
    """Return where nothing is left of a command that was killed and then given again.

    Args:
        scene: Whose.
        folder: Where.
        aside: How many galleries may have been put aside.

    Raises:
        MismatchError: Something is.
    """
    expected = {*scene.stock, GALLERY} | ({TARGET} if scene.target else set())
    found = {one.name for one in folder.iterdir()}
    if found != expected:
        raise MismatchError(f"expected {sorted(expected)}, got {sorted(found)}")
    directory = folder / GALLERY
    known = {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", LOCK_NAME, INDEX_NAME, AUDIT_NAME}
    others = {one.name for one in directory.iterdir()} - known
    replaced = {name for name in others if name.startswith(REPLACED_NAME)}
    if others != replaced or len(replaced) > aside:
        raise MismatchError(f"expected {aside} galleries aside, got {sorted(others)}")
