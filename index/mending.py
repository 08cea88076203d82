"""Erasing a tracklet from a gallery that cannot be opened because of it."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from index.gallery import GalleryUnavailableError
from index.store import FILE_NAME, Store
from index.transaction import no_tracklet


def erase_stored(
    data_dir: Path,
    tracklet_id: str,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> str | None:
    """Erase a tracklet as `index.gallery.Gallery.remove` does, without looking at any embedding.

    It is for a tracklet whose embedding or record was damaged on the disk: a gallery does not open
    with it, or cannot show it.
    The ledger has it afterwards, so no older snapshot brings it back.

    Args:
        data_dir: The gallery's data directory; nobody has it open.
        tracklet_id: Which.
        clock: What the time is, aware: for the ledger.

    Returns:
        Whom it showed; None where that was not known.

    Raises:
        NotFoundError: No tracklet has this id.
        GalleryUnavailableError: There is no gallery, or it cannot be used, or is open elsewhere.
        DamagedGalleryError: More is damaged than embeddings and records.
        StorageFullError: The disk is full.
    """
    if not (data_dir / FILE_NAME).is_file():  # else one would be made
        raise GalleryUnavailableError(f"expected a gallery in {data_dir}, got no {FILE_NAME}")
    store = Store(data_dir)
    try:
        with store.transaction() as transaction:
            found = transaction.shown([tracklet_id])
            if not found:
                raise no_tracklet(tracklet_id)
            key, identity = found[tracklet_id]
            transaction.erase({key: tracklet_id}, at=clock())
            transaction.commit()
        store.forget(at_once=True)
    finally:
        store.close()
    return identity
