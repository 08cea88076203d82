"""Erasing a tracklet from a gallery that cannot be opened because of it."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from index.gallery import GalleryUnavailableError, TrackletRecord
from index.store import FILE_NAME, Store


def erase_stored(
    data_dir: Path,
    tracklet_id: str,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> TrackletRecord:
    """Erase a tracklet as `index.gallery.Gallery.remove` does, without looking at any embedding.

    It is for a tracklet whose embedding was damaged on the disk: a gallery does not open with it.
    The ledger has it afterwards, so no older snapshot brings it back.

    Args:
        data_dir: The gallery's data directory; nobody has it open.
        tracklet_id: Which.
        clock: What the time is, aware: for the ledger.

    Returns:
        What was known of it.

    Raises:
        NotFoundError: No tracklet has this id.
        GalleryUnavailableError: There is no gallery, or it cannot be used, or is open elsewhere.
        DamagedGalleryError: More is damaged than embeddings.
        StorageFullError: The disk is full.
    """
    if not (data_dir / FILE_NAME).is_file():  # else one would be made
        raise GalleryUnavailableError(f"expected a gallery in {data_dir}, got no {FILE_NAME}")
    store = Store(data_dir)
    try:
        with store.transaction() as transaction:
            stored = transaction.get(tracklet_id)
            transaction.erase({stored.key: tracklet_id}, at=clock())
            transaction.commit()
        store.forget(at_once=True)
    finally:
        store.close()
    return stored.record
