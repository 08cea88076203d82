"""A long random walk through what a gallery can do, beside a dictionary that knows the answers."""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

import index.derived
import index.embedded
import index.factories
import index.store
from bench.gallery_truth import (
    CALIBRATION,
    MODEL,
    START,
    MismatchError,
    Operation,
    Refused,
    Shape,
    Truth,
    check_content,
    check_vectors,
    enrolments,
    query_of,
    to_filters,
)
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.restore import restore
from index.snapshot import snapshot
from index.store import FILE_NAME
from index.vector_storage import Storage

Progress = Callable[[int, Counter[str]], None]
_CHECKED_EVERY = 500


class Player:
    """Does operations to a real gallery.

    Args:
        directory: Its files; a snapshot comes beside.
        dimension: D.
        index: A FAISS factory string.
        storage: See `index.embedded.EmbeddedGallery`.
    """

    def __init__(
        self, directory: Path, dimension: int, index: str = "Flat", storage: Storage | None = None
    ) -> None:
        self.directory = directory
        self._dimension = dimension
        self._index = index
        self._storage = storage
        self._now = START
        self._saved = directory.with_name(f"{directory.name}.passerby")
        self.gallery = self.opened()

    def opened(self) -> EmbeddedGallery:
        """Open the gallery."""
        self.gallery = EmbeddedGallery(
            self.directory, index=self._index, storage=self._storage, clock=self.now
        )
        return self.gallery

    def now(self) -> datetime:
        """When the operation takes place that is under way."""
        return self._now

    def perform(self, operation: Operation) -> object:
        """Do it; returns what `bench.gallery_truth.Truth.apply` does."""
        self._now = operation.now
        done: Callable[[Operation], object] = getattr(self, f"_{operation.kind}")
        try:
            return done(operation)
        except Refused as error:
            return type(error)

    def _enrol(self, operation: Operation) -> object:
        self.gallery.add(enrolments(operation, self._dimension))
        return None

    def _patch(self, operation: Operation) -> object:
        return self.gallery.update(operation.how["id"], operation.how["changes"])

    def _remove(self, operation: Operation) -> object:
        return self.gallery.remove(operation.how["id"])

    def _assign(self, operation: Operation) -> object:
        return self.gallery.assign(operation.how["ids"], operation.how["identity"])

    def _merge(self, operation: Operation) -> object:
        return self.gallery.merge_identity(operation.how["name"], operation.how["into"])

    def _rename(self, operation: Operation) -> object:
        return self.gallery.rename_identity(operation.how["name"], operation.how["to"])

    def _remove_identity(self, operation: Operation) -> object:
        return self.gallery.remove_identity(operation.how["name"])

    def _expire(self, operation: Operation) -> object:
        keep_s = operation.how["keep_s"]
        retention = None if keep_s is None else timedelta(seconds=keep_s)
        return set(self.gallery.expire(operation.now, retention))

    def _calibrate(self, operation: Operation) -> object:
        threshold = operation.how["threshold"]
        made = None if threshold is None else replace(CALIBRATION, threshold=threshold)
        self.gallery.set_calibration(made)
        return None

    def _query(self, operation: Operation) -> object:
        how = operation.how
        found = self.gallery.search(
            query_of(how),
            model=MODEL,
            top_k=how["top_k"],
            group_by=how["group_by"],
            filters=to_filters(how["filters"]),
        )
        matches = [(match.record.tracklet_id, match.distance) for match in found.matches]
        return matches, found.searched, found.nearest

    def _restart(self, _: Operation) -> object:
        self.gallery.close()
        self.opened()
        return None

    def _snapshot(self, _: Operation) -> object:
        made = snapshot(self.directory, self._saved, overwrite=True, clock=self.now)
        return made.tracklets, made.identities

    def _restore(self, _: Operation) -> object:
        self.gallery.close()
        done = restore(self._saved, self.directory, replace=True, clock=self.now)
        if done.replaced is not None:
            rmtree(done.replaced)
        self.opened()
        return done.erased


@contextmanager
def small_limits(least_training_rows: int = 40) -> Iterator[None]:
    """Have a small gallery do what a large one does: train, save, close gaps, give back pages.

    And never measure few rows one by one, so that answers are FAISS's own.
    """
    changed: list[tuple[Any, str, object]] = [
        (index.factories, "_LEAST_TRAINING_ROWS", least_training_rows),
        (index.derived, "_FEW_ROWS", 0),
        (index.embedded, "_SAVING_PAUSE_S", 0.0),
        (index.store, "_FEW_FREE_PAGES", 4),
        (Derived, "is_sparse", property(lambda derived: derived.columns.dead > 8)),
    ]
    before = [getattr(owner, name) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


def check_file(directory: Path) -> None:
    """Return when SQLite finds nothing wrong with a gallery's file.

    Raises:
        MismatchError: It does.
    """
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        verdict = connection.execute("PRAGMA integrity_check").fetchall()
        orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
    if verdict != [("ok",)] or orphans:
        raise MismatchError(f"expected a sound file, got {verdict[:3]} and orphans {orphans[:3]}")


def walk(
    operations: int,
    *,
    seed: int,
    index: str = "Flat",
    storage: Storage | None = None,
    folder: Path | None = None,
    progress: Progress = lambda _done, _counts: None,
) -> Counter[str]:
    """Do random operations, compare every answer, and all content every now and then.

    Args:
        operations: How many.
        seed: Of everything.
        index: A FAISS factory string; one that looks at all rows, or answers may differ.
        storage: See `index.embedded.EmbeddedGallery`.
        folder: Where the gallery is for a while.
        progress: Gets how many are done, and how many of each kind.

    Returns:
        How many of each kind there were, and "refused" how many of them were refused.

    Raises:
        MismatchError: Something is not as it should be; says what, after which operation.
    """
    rng, counts, truth = np.random.default_rng(seed), Counter[str](), Truth(Shape())
    with tempfile.TemporaryDirectory(dir=folder) as parent, small_limits():
        player = Player(Path(parent) / "gallery", truth.shape.dimension, index, storage)
        operation = Operation("restart", 0, {})
        try:
            for number in range(1, operations + 1):
                operation = truth.draw(rng)
                expected = truth.apply(operation)
                got = player.perform(operation)
                if got != expected:
                    raise MismatchError(f"expected the answer {expected}, got {got}")
                counts[operation.kind] += 1
                counts["refused"] += isinstance(expected, type)
                is_whole = operation.kind in {"restart", "restore"} or number == operations
                if is_whole or number % _CHECKED_EVERY == 0:
                    check_content(player.gallery, truth)
                    check_vectors(player.gallery, truth)
                    check_file(player.directory)
                    progress(number, counts)
        except Exception as error:
            done = sum(counts.values()) - counts["refused"]
            message = f"seed {seed}, after {done} operations, {operation.to_line()[:500]}: {error}"
            raise MismatchError(message) from error
        finally:
            player.gallery.close()
    return counts
