"""What an evaluation keeps on disk, so that an interrupted one goes on: embeddings and results."""

import json
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import EvaluationError
from model.files import reason, written_aside

Vectors = NDArray[np.float32]
SAVE_EVERY_S = 60.0


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then takes the name; what was there survives a failure.

    Raises:
        EvaluationError: It cannot be written.
    """
    try:
        with written_aside(path) as draft:
            yield draft
    except OSError as error:
        raise EvaluationError(
            f"could not write {path}: {reason(error)}; the same command goes on from whatever was "
            "written before"
        ) from error


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before any work; it is not made yet.

    Raises:
        EvaluationError: A file stands in its place or above it, or no file can be made there.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        # Asking for permission would not do: a disk may be mounted for reading alone.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise EvaluationError(
            f"expected a folder that can be written, got {folder}: {there}: {reason(error)}"
        ) from error


def write_json(path: Path, values: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        EvaluationError: It cannot be written.
    """
    text = json.dumps(values, indent=indent, allow_nan=False)
    with write_aside(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read what `write_json` wrote; None where there is nothing, or nothing of that kind."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


class EmbeddingCache:
    """Embeddings of one data set under one checkpoint and one choice of frames.

    They are saved now and then while they come in, so that an interruption costs a minute at most.

    Args:
        path: An .npz file, read without unpickling anything; a damaged one counts as none.
        save_every_s: Seconds between saves.
    """

    def __init__(self, path: Path, *, save_every_s: float = SAVE_EVERY_S) -> None:
        self.path = path
        self._save_every_s = save_every_s
        self._saved_at = time.monotonic()
        self._changed = False
        self.embeddings: dict[str, Vectors] = self._load()

    def add(self, name: str, embedding: Vectors) -> None:
        """Take an embedding, (D,) float32, and save if it is time.

        Raises:
            EvaluationError: The file cannot be written.
        """
        self.embeddings[name] = embedding
        self._changed = True
        if time.monotonic() - self._saved_at > self._save_every_s:
            self.save()

    def save(self) -> None:
        """Write what has come in.

        Raises:
            EvaluationError: The file cannot be written.
        """
        if not self._changed:
            return
        # As bytes: file names need not be text, and NumPy's text drops trailing zeros.
        names = [os.fsencode(name) for name in self.embeddings]
        lengths = np.array([len(name) for name in names], np.int64)
        letters = np.frombuffer(b"".join(names), np.uint8)
        vectors = np.stack(list(self.embeddings.values()))
        with write_aside(self.path) as draft, draft.open("wb") as file:
            np.savez(file, lengths=lengths, names=letters, embeddings=vectors)
        self._changed = False
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Vectors]:
        try:
            # Opened here, because NumPy leaves a damaged file open.
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                lengths, letters, vectors = file["lengths"], file["names"], file["embeddings"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}
        ends = np.cumsum(lengths)
        if len(lengths) != len(vectors) or letters.size != lengths.sum():
            return {}
        text = letters.tobytes()
        names = [os.fsdecode(text[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
        return dict(zip(names, vectors, strict=True))
