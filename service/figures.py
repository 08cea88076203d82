"""Figures become files."""

from pathlib import Path
from typing import TYPE_CHECKING

from service.client import ClientError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure.

    Args:
        figure: What was drawn.
        path: Where to; the suffix decides its format.

    Raises:
        ClientError: It cannot be written.
    """
    # No version of matplotlib in the file; other formats do not know the word.
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None
    try:
        figure.savefig(path, dpi=120, metadata=metadata)
    except (OSError, ValueError) as error:  # the latter where the suffix names no format
        raise ClientError(f"could not write the picture {path}: {error}") from error
