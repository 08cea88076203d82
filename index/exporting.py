"""Exporting: a stored gallery as a folder that others can read, while a service goes on."""

import importlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from index.calibration import Calibration
from index.checksums import check_kept, checksum_of
from index.exchange import (
    EMBEDDINGS_NAME,
    ERASURES_NAME,
    MANIFEST_NAME,
    PARQUET_NAME,
    STRIPS_NAME,
    TRACKLETS_NAME,
    ExchangeError,
    ExportManifest,
    FileSum,
    to_line,
)
from index.files import (
    CHUNK_BYTES,
    Hashed,
    Progress,
    create,
    no_progress,
    open_regular,
    sync,
    told,
)
from index.gallery import DamagedGalleryError, Embeddings, TrackletRecord
from index.leftovers import making
from index.properties import read_property
from index.reading import reading
from index.recognition import NEWEST, Facts, facts_of, require_newest
from index.rows import STORED, check_embeddings, to_stored
from index.transaction import read_erasures
from index.vector_storage import to_matrix

Format = Literal["npy", "parquet"]
_ROWS_AT_ONCE = 1000
_VECTOR = np.dtype("<f4")


class _Part(NamedTuple):
    """Some rows that follow one another: n records, (n, D) float32, n film strips."""

    records: Sequence[TrackletRecord]
    embeddings: Embeddings
    strips: Sequence[bytes | None]


class _Content(NamedTuple):
    """What is exported: what there is, and how to read it."""

    connection: sqlite3.Connection
    facts: Facts
    strips: bool

    def parts(self, progress: Progress) -> Iterator[_Part]:
        """All rows by key, some at a time."""
        strip = "strips.jpeg" if self.strips else "NULL"
        rows = self.connection.execute(
            f"SELECT {STORED}, {strip}, vector "  # noqa: S608
            "FROM tracklets JOIN embeddings USING (key) LEFT JOIN strips USING (key) ORDER BY key"
        )
        done = 0
        while part := rows.fetchmany(_ROWS_AT_ONCE):
            check_embeddings(part)
            if self.strips:
                _check_strips(part)
            yield _Part(
                [to_stored(row, DamagedGalleryError).record for row in part],
                to_matrix([row[-1] for row in part]),
                [row[-2] for row in part],
            )
            done += len(part)
            progress("exporting", done, self.facts.tracklets)
        if done != self.facts.tracklets:
            message = f"expected embeddings of {self.facts.tracklets} tracklets, got {done}"
            raise DamagedGalleryError(message)


def export_gallery(
    data_dir: Path,
    folder: Path,
    *,
    file_format: Format = "npy",
    strips: bool = False,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    progress: Progress = no_progress,
) -> ExportManifest:
    """Write a stored gallery, as it is at one moment, for other programs; see `index.exchange`.

    A service may have it open, and goes on. The folder is there whole, or not at all.

    Args:
        data_dir: The gallery's data directory.
        folder: What to make; an empty one may be there.
        file_format: "parquet" writes records and embeddings into one Parquet file, which takes
            pyarrow to write and is not for importing.
        strips: Whether to export the film strips, which are pictures of people.
        clock: What the time is, aware.
        progress: See `index.files.Progress`.

    Raises:
        ExchangeError: ``folder`` holds something or cannot be written, or there is no pyarrow.
        StorageFullError: Its disk is full.
        GalleryUnavailableError: There is no gallery, or it cannot be read, or an older version
            wrote it.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    folder = folder.absolute()
    write = _write_parquet if file_format == "parquet" else _write_npy
    if file_format == "parquet":
        _pyarrow()
    _check_free(folder)
    with (
        making(folder, ExchangeError) as work,
        told(f"write the export {folder.name}", ExchangeError),
        reading(data_dir) as connection,
    ):
        require_newest(connection)
        made = work / "export"
        made.mkdir(mode=0o700)
        created_at = clock()
        facts = facts_of(connection, NEWEST)
        content = _Content(connection, facts, strips)
        files = write(made, content, progress)
        ledger = read_erasures(connection).to_json().encode()
        files[ERASURES_NAME] = _write(made / ERASURES_NAME, [ledger])
        manifest = ExportManifest(
            created_at=created_at,
            passerby_version=version("passerby"),
            model=facts.model,
            dimension=facts.dimension,
            tracklets=facts.tracklets,
            strips=strips,
            calibration=_calibration(connection),
            files=files,
        )
        _write(made / MANIFEST_NAME, [manifest.to_json().encode()])
        sync(made)
        _put_in_place(made, folder)
    return manifest


def _check_strips(part: Sequence[tuple[Any, ...]]) -> None:
    checksum = STORED.split(", ").index("strip_checksum")
    for row in part:
        found = checksum_of(row[1], row[-2])
        check_kept(row[1], row[checksum], found, "film strip", DamagedGalleryError)


def _check_free(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise ExchangeError(f"expected a directory {folder.parent}, got none")
    is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not is_empty:
        raise ExchangeError(f"expected a new or an empty folder, got one with content: {folder}")


def _put_in_place(made: Path, folder: Path) -> None:
    _check_free(folder)
    made.rename(folder)  # also refuses to replace what is not empty
    sync(folder.parent)


def _calibration(connection: sqlite3.Connection) -> dict[str, Any] | None:
    text = read_property(connection, "calibration")
    if text is None:
        return None
    Calibration.from_json(text)  # so that nobody exports what nobody can import
    found: dict[str, Any] = json.loads(text)
    return found


def _write(path: Path, contents: Sequence[bytes]) -> FileSum:
    with create(path) as file:
        hashed = Hashed(file)
        for content in contents:
            hashed.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(hashed.count, hashed.hex)


def _write_npy(folder: Path, content: _Content, progress: Progress) -> dict[str, FileSum]:
    if content.strips:
        (folder / STRIPS_NAME).mkdir(mode=0o700)
    # Written part by part and not through a memory map: a full disk would kill the process there.
    with create(folder / EMBEDDINGS_NAME) as vectors, create(folder / TRACKLETS_NAME) as records:
        hashed_vectors, hashed_records = Hashed(vectors), Hashed(records)
        shape = (content.facts.tracklets, content.facts.dimension or 0)
        header = {"descr": _VECTOR.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(hashed_vectors, header)
        number = 0
        for part in content.parts(progress):
            hashed_vectors.write(part.embeddings.astype(_VECTOR, copy=False).tobytes())
            for record, strip in zip(part.records, part.strips, strict=True):
                strip_sha256 = None if strip is None else sha256(strip).hexdigest()
                hashed_records.write(to_line(record, strip_sha256))
                if strip is not None:
                    with create(folder / STRIPS_NAME / f"{number}.jpg") as file:
                        file.write(strip)
                number += 1
        for made in (vectors, records):
            made.flush()
            os.fsync(made.fileno())
    if content.strips:
        sync(folder / STRIPS_NAME)
    return {
        EMBEDDINGS_NAME: FileSum(hashed_vectors.count, hashed_vectors.hex),
        TRACKLETS_NAME: FileSum(hashed_records.count, hashed_records.hex),
    }


def _write_parquet(folder: Path, content: _Content, progress: Progress) -> dict[str, FileSum]:
    arrow, parquet = _pyarrow()
    schema = _schema(arrow, content.facts.dimension or 0)
    path = folder / PARQUET_NAME
    with create(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for part in content.parts(progress):
            writer.write_table(_table(arrow, schema, part))
    with open_regular(path) as file:
        hashed = Hashed(file)
        while hashed.read(CHUNK_BYTES):
            pass
    sync(path)
    return {PARQUET_NAME: FileSum(hashed.count, hashed.hex)}


def _pyarrow() -> tuple[Any, Any]:
    try:  # not a dependency of ours: it weighs more than what it does here
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        message = "expected pyarrow for Parquet, got none: pip install pyarrow, or export as npy"
        raise ExchangeError(message) from error


def _schema(arrow: Any, dimension: int) -> Any:
    text, number, time = arrow.string(), arrow.int64(), arrow.timestamp("us", tz="UTC")
    kinds = {
        "tracklet_id": text,
        "identity": text,
        "camera": text,
        "start_time": time,
        "end_time": time,
        "metadata": text,
        "frames_received": number,
        "frames_used": number,
        "model": text,
        "created_at": time,
        "content": text,
        "expires_at": time,
        "quality": text,
        "strip": arrow.binary(),
        "embedding": arrow.list_(arrow.float32(), dimension),
    }
    return arrow.schema(list(kinds.items()))


def _table(arrow: Any, schema: Any, part: _Part) -> Any:
    columns: dict[str, Any] = {
        name: [getattr(record, name) for record in part.records] for name in schema.names[:-2]
    }
    columns["metadata"] = [json.dumps(dict(one)) for one in columns["metadata"]]
    columns["quality"] = [None if o is None else json.dumps(dict(o)) for o in columns["quality"]]
    columns["strip"] = part.strips
    kind = schema.field("embedding").type
    columns["embedding"] = arrow.FixedSizeListArray.from_arrays(part.embeddings.ravel(), type=kind)
    return arrow.table(columns, schema=schema)
