"""What another process may write while somebody has the gallery open: little, and at once."""

from contextlib import closing
from pathlib import Path

from index.calibration import Calibration
from index.properties import replace_calibration
from index.schema import open_guest, translated
from index.store import FILE_NAME


def write_calibration(directory: Path, calibration: Calibration | None) -> None:
    """Put a calibration in the place of a gallery's last one, durably; None forgets that.

    Whoever has the gallery open reads it with the next call of `index.gallery.Gallery.calibration`.

    Args:
        directory: Where the gallery's files are.
        calibration: Of the gallery's model.

    Raises:
        ModelMismatchError: It is of another model than the gallery.
        DamagedGalleryError: The file is not a gallery that this version can read.
        GalleryUnavailableError: There is no gallery, or it cannot be written, or it was written by
            an older version and not yet opened by this one.
        StorageFullError: The disk is full.
    """
    with (
        closing(open_guest(directory / FILE_NAME)) as connection,
        translated("write the gallery"),
    ):
        connection.execute("BEGIN IMMEDIATE")
        replace_calibration(connection, calibration)
        connection.execute("COMMIT")
