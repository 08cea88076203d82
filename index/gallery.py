"""The contract of a gallery: its records, filters, matches, errors and protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from index.erasures import Erasures

if TYPE_CHECKING:  # it imports this module
    from index.calibration import Calibration

Embeddings = NDArray[np.float32]
GroupBy = Literal["identity", "tracklet"]


class GalleryError(Exception):
    """Base of everything a gallery refuses or fails at."""


class NotFoundError(GalleryError):
    """Raised when no tracklet has the id, or no identity the name, that was asked for."""


class DuplicateTrackletError(GalleryError):
    """Raised when an id is taken, or appears twice in one call."""


class DuplicateIdentityError(GalleryError):
    """Raised when an identity would be given a name that another one has."""


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
        expires_at: When it is to be erased, timezone-aware UTC, or None. It is there until
            `Gallery.expire` is called after that time.
        quality: What the caller found of its frames' quality, a JSON object, or None.
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
    expires_at: datetime | None = None
    quality: Mapping[str, Any] | None = None


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
class IdentitySummary:
    """What is known of an identity: what its tracklets have in common.

    Args:
        identity: Its name.
        tracklets: How many show it, >= 1: an identity without tracklets does not exist.
        cameras: Where it was seen, sorted; tracklets without a camera add none.
    """

    identity: str
    tracklets: int
    cameras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IdentityPage:
    """One page of the identities, in the order of their names.

    Args:
        items: At most ``limit`` identities.
        next_cursor: Pass it to get the next page; None on the last one.
    """

    items: tuple[IdentitySummary, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Erased:
    """What went with an identity.

    Args:
        identity: Its name.
        tracklet_ids: Its tracklets, in the order of enrolment.
    """

    identity: str
    tracklet_ids: tuple[str, ...]


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
        frames: The used frames as image files in temporal order, where they are kept for another
            model; else none.
    """

    record: TrackletRecord
    embedding: Embeddings
    strip: bytes | None = None
    frames: Sequence[bytes] = ()


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

    def frames(self, tracklet_id: str) -> tuple[bytes, ...]:
        """The kept frames of a tracklet as image files, in temporal order.

        Raises:
            NotFoundError: No tracklet has this id, or none were kept for it.
        """

    def update(self, tracklet_id: str, changes: Mapping[str, Any]) -> TrackletRecord:
        """Change a record durably and return it as it is now.

        Args:
            tracklet_id: Which.
            changes: New values by field name: identity, camera, start_time, end_time, metadata,
                expires_at. The caller has validated them; metadata replaces the old object.

        Raises:
            NotFoundError: No tracklet has this id.
            ValueError: A field that cannot be changed.
            StorageFullError: The disk is full.
        """

    def remove(self, tracklet_id: str) -> TrackletRecord:
        """Erase a tracklet with its embedding, strip and frames, durably; returns what it was.

        Raises:
            NotFoundError: No tracklet has this id.
            StorageFullError: The disk is full.
        """

    def identities(self, *, limit: int, cursor: str | None = None) -> IdentityPage:
        """One page of the identities, in the order of their names.

        Raises:
            InvalidCursorError: ``cursor`` was not given by ``identities``.
        """

    def identity(self, name: str) -> IdentitySummary:
        """What is known of an identity.

        Raises:
            NotFoundError: No tracklet shows it.
        """

    def rename_identity(self, name: str, to: str) -> IdentitySummary:
        """Give an identity another name durably; to its own name changes nothing.

        Raises:
            NotFoundError: No tracklet shows it.
            DuplicateIdentityError: There is one called ``to``; `merge_identity` joins the two.
            StorageFullError: The disk is full.
        """

    def merge_identity(self, name: str, into: str) -> IdentitySummary:
        """Make all tracklets of one identity those of another durably; returns the other.

        Raises:
            NotFoundError: No tracklet shows one of them.
            ValueError: They are the same.
            StorageFullError: The disk is full.
        """

    def assign(self, tracklet_ids: Sequence[str], identity: str | None) -> int:
        """Say durably whom tracklets show: of all of them, or of none if any id is unknown.

        Returns:
            Of how many something else was said before.

        Raises:
            NotFoundError: An id is unknown.
            StorageFullError: The disk is full.
        """

    def remove_identity(self, name: str) -> Erased:
        """Erase an identity with all its tracklets, durably: all of them at once.

        Raises:
            NotFoundError: No tracklet shows it.
            StorageFullError: The disk is full.
        """

    def expire(self, now: datetime, retention: timedelta | None = None) -> tuple[str, ...]:
        """Erase durably what is to be erased by now; to be called again and again.

        Until then a tracklet is listed, found and given, though its time has passed: the gallery is
        as exact as the calls are frequent. Many are erased little by little, and what fails halfway
        is done by the next call.

        Args:
            now: Timezone-aware. Erases what has an ``expires_at`` at or before it.
            retention: Erases also what was enrolled so long ago or longer.

        Returns:
            The ids of what was erased. Where a part of it was, and then something failed, those of
            that part: the next call tells what fails.

        Raises:
            StorageFullError: The disk is full.
        """

    def calibration(self) -> "Calibration | None":
        """The calibration as it is now, whoever has set it; None where none is of its model."""

    def set_calibration(self, calibration: "Calibration | None") -> None:
        """Keep a calibration durably in the place of the last one; None forgets it.

        Raises:
            ModelMismatchError: It is of another model than the gallery.
            StorageFullError: The disk is full.
        """

    def erasures(self) -> Erasures:
        """The ledger of all that was ever erased, here or by ledgers that were applied."""

    def apply_erasures(self, erasures: Erasures) -> tuple[str, ...]:
        """Add a ledger to the gallery's own, and erase durably what it bans, all at once.

        Entries that the gallery has already are passed over: what is in it has outlived them.

        Returns:
            The ids of what was erased.

        Raises:
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
