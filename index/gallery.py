"""The contract of a gallery: its records, filters, matches, errors and protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]
GroupBy = Literal["identity", "tracklet"]


class GalleryError(Exception):
    """Base of everything a gallery refuses or fails at."""


class NotFoundError(GalleryError):
    """Raised when no tracklet has the id that was asked for."""


class DuplicateTrackletError(GalleryError):
    """Raised when an id is taken, or appears twice in one call."""


class InvalidEmbeddingError(GalleryError):
    """Raised when an embedding has the wrong shape, or holds NaN or infinity."""


class ModelMismatchError(GalleryError):
    """Raised when an embedding comes from another model than the gallery's."""


class InvalidCursorError(GalleryError):
    """Raised when a page cursor is not one that this gallery gave."""


class StorageFullError(GalleryError):
    """Raised when the disk has no room for a write; nothing was written."""


class GalleryUnavailableError(GalleryError):
    """Raised when the store cannot be reached, read or written, or is closed."""


class DamagedGalleryError(GalleryError):
    """Raised at opening when the files are not a gallery that this version can read."""


class InvalidIndexError(GalleryError):
    """Raised at opening when the FAISS factory string cannot make a usable Euclidean index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackletRecord:
    """What is known of a stored tracklet besides its embedding.

    Args:
        tracklet_id: Unique in the gallery.
        identity: Who it shows, or None while nobody has said.
        camera: Where it was seen, or None.
        start_time: When it began, timezone-aware UTC, or None.
        end_time: When it ended, timezone-aware UTC, or None.
        metadata: The caller's JSON object.
        frames_received: Frames in the upload.
        frames_used: Frames that the embedding was made of.
        model: Fingerprint of the checkpoint that made the embedding.
        created_at: When it was enrolled, timezone-aware UTC.
        content: SHA-256 (hex) of what was enrolled; equal content makes a repeated enrolment
        idempotent.
    """

    tracklet_id: str
    identity: str | None = None
    camera: str | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    frames_received: int
    frames_used: int
    model: str
    created_at: datetime
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which tracklets a listing or a search may see; the conditions are joined by AND.

    Args:
        identities: Only these identities; None means any, named or not.
        unnamed: Only tracklets without an identity.
        cameras: Only these cameras; None means any, known or not.
        exclude_cameras: Not these cameras; a tracklet without a camera stays.
        since: Only tracklets that start at or after this aware time.
        until: Only tracklets that start at or before this aware time.
        exclude_tracklets: Not these tracklets.

    A tracklet without ``start_time`` is left out as soon as ``since`` or ``until`` is given.
    """

    identities: frozenset[str] | None = None
    unnamed: bool = False
    cameras: frozenset[str] | None = None
    exclude_cameras: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None
    exclude_tracklets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Match:
    """One rank of an answer: the nearest tracklet of an identity, or a tracklet.

    Args:
        record: The stored tracklet.
        distance: Euclidean distance to the query, not squared, non-negative.
    """

    record: TrackletRecord
    distance: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to one search.

    Args:
        matches: Nearest first, ties by tracklet id; at most ``top_k``.
        searched: How many tracklets the filters let through.
        nearest: Distance of the nearest of them, before ``max_distance`` cut; None when none.
    """

    matches: tuple[Match, ...]
    searched: int
    nearest: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, in the order of enrolment.

    Args:
        records: At most ``limit`` records.
        next_cursor: Pass it to get the next page; None on the last one.
    """

    records: tuple[TrackletRecord, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Counts:
    """How much a gallery holds.

    Args:
        tracklets: All tracklets.
        identities: Distinct identities; tracklets without one are not counted.
    """

    tracklets: int
    identities: int


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One tracklet to add.

    Args:
        record: What is known of it.
        embedding: (D,) float32, finite.
        strip: A small film strip as JPEG bytes, or None where thumbnails are off.
    """

    record: TrackletRecord
    embedding: Embeddings
    strip: bytes | None = None


class Gallery(Protocol):
    """Stores tracklets and ranks them by Euclidean distance; any thread may call any method."""

    @property
    def model(self) -> str | None:
        """Fingerprint of the model whose embeddings it holds; None while it is empty."""

    def add(self, enrolments: Sequence[Enrolment]) -> None:
        """Add tracklets durably: all of them, or none if any is refused.

        When it returns they are on the disk and searchable. An empty gallery takes the model and
        the
        dimension of the first enrolment.

        Raises:
            InvalidEmbeddingError: An embedding is not a finite (D,) float32 vector of the
            gallery's D.
            ModelMismatchError: A record's model is not the gallery's, or two of them differ.
            DuplicateTrackletError: An id is taken, or appears twice in ``enrolments``.
            StorageFullError: The disk is full.
            GalleryUnavailableError: The store cannot be written.
        """

    def get(self, tracklet_id: str) -> TrackletRecord:
        """The record of a tracklet.

        Raises:
            NotFoundError: No tracklet has this id.
        """

    def embedding(self, tracklet_id: str) -> Embeddings:
        """The stored (D,) float32 embedding of a tracklet.

        Raises:
            NotFoundError: No tracklet has this id.
        """

    def strip(self, tracklet_id: str) -> bytes:
        """The stored film strip of a tracklet, JPEG bytes.

        Raises:
            NotFoundError: No tracklet has this id, or none was kept for it.
        """

    def update(self, tracklet_id: str, changes: Mapping[str, Any]) -> TrackletRecord:
        """Change a record durably and return it as it is now.

        Args:
            tracklet_id: Which.
            changes: New values by field name: identity, camera, start_time, end_time, metadata. The
                caller has validated them; metadata replaces the old object.

        Raises:
            NotFoundError: No tracklet has this id.
            ValueError: A field that cannot be changed.
            StorageFullError: The disk is full.
        """

    def remove(self, tracklet_id: str) -> TrackletRecord:
        """Erase a tracklet with its embedding and strip, durably; returns what it was.

        Raises:
            NotFoundError: No tracklet has this id.
            StorageFullError: The disk is full.
        """

    def list(self, filters: Filters, *, limit: int, cursor: str | None = None) -> Page:
        """One page of the records that pass the filters, in the order of enrolment.

        Raises:
            InvalidCursorError: ``cursor`` was not given by ``list``.
        """

    def search(
        self,
        embedding: Embeddings,
        *,
        model: str,
        top_k: int,
        group_by: GroupBy = "identity",
        filters: Filters | None = None,
        max_distance: float | None = None,
    ) -> SearchResult:
        """Rank what passes the filters by Euclidean distance to ``embedding``.

        Args:
            embedding: The query, (D,) float32, finite.
            model: Fingerprint of the model that made it.
            top_k: How many matches at most, >= 1.
            group_by: "identity" ranks identities by their nearest tracklet, where a tracklet
            without an
                identity is its own group; "tracklet" ranks tracklets.
            filters: Which tracklets take part; all where None.
            max_distance: Leave out matches farther than this.

        Raises:
            InvalidEmbeddingError: ``embedding`` is not a finite (D,) vector.
            ModelMismatchError: ``model`` is not the gallery's. An empty gallery answers any model.
        """

    def counts(self) -> Counts:
        """How much it holds now."""

    def check(self) -> None:
        """Return when the store can be reached, read and written.

        It is cheap enough to be asked every second, and waits for no search and no write of the
        gallery's own, only for the store itself. Messages name no path.

        Raises:
            StorageFullError: The disk is full; searches go on.
            GalleryUnavailableError: It cannot; the message says why.
        """

    def close(self) -> None:
        """Release the store. Calling it again does nothing."""
