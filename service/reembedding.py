"""The command that embeds a gallery anew by another model, from kept frames."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from index.succession import (
    InUseError,
    NextEmbedding,
    Pending,
    SuccessionError,
    keep,
    pending,
    standing,
    take_over,
)
from model.frames import Clip, Preprocessing, prepare_frame
from service.progress import counting
from service.worker import Embedder

_AT_ONCE = 16


def reembed(data_dir: Path, embedder: Embedder, console: Console) -> bool:
    """Embed what is not embedded yet by a model, and let it take over where nobody is in the way.

    It goes on where it was interrupted. A service may have the gallery open meanwhile and answers
    with the old embeddings; then taking over has to wait until it has stopped.

    Args:
        data_dir: Of the gallery.
        embedder: Of the next model.
        console: For progress, and what is to be done next.

    Returns:
        Whether the gallery is of the next model now.

    Raises:
        SuccessionError: Frames are missing.
        GalleryError: The gallery cannot be read or written.
    """
    found = standing(data_dir, embedder.model)
    if found.model == embedder.model:
        console.print(f"the gallery is of the model {embedder.model} already")
        return True
    if found.without_frames:
        raise SuccessionError(
            f"expected kept frames of all {found.tracklets} tracklets, got "
            f"{found.without_frames} without: PASSERBY_KEEP_FRAMES was off when they were "
            "enrolled. Enrol those again, or erase them"
        )
    _embed_all(data_dir, embedder, console)
    try:
        count = take_over(data_dir, embedder.model)
    except InUseError:
        console.print(
            "everything is embedded. Now stop the service, give this command once more (it embeds "
            "what has come meanwhile), and start the service with the new weights"
        )
        return False
    console.print(
        f"{count} tracklets are of the model {embedder.model} now. Calibrate anew: distances are "
        "others (passerby calibrate)"
    )
    return True


def _embed_all(data_dir: Path, embedder: Embedder, console: Console) -> None:
    """Embed until nothing is left to embed, also of what comes meanwhile."""
    with counting(console) as progress:
        bar = progress.add_task("embedding", total=None)
        while True:
            found = standing(data_dir, embedder.model)
            progress.update(bar, completed=found.made, total=found.tracklets)
            batch = pending(data_dir, embedder.model, most=_AT_ONCE)
            if not batch:
                return
            keep(data_dir, embedder.model, embed_batch(batch, embedder))


def embed_batch(batch: Sequence[Pending], embedder: Embedder) -> list[NextEmbedding]:
    """Embed kept frames as the service would have, had it this model."""
    clips = [read_frames(one.frames, embedder.preprocessing) for one in batch]
    return [
        NextEmbedding(one.key, made.embedding, made.frame_distance)
        for one, made in zip(batch, embedder.embed(clips), strict=True)
    ]


def read_frames(files: Sequence[bytes], preprocessing: Preprocessing) -> Clip:
    """Decode kept frames, (T, height, width, 3) uint8: they were checked when they came."""
    frames = []
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            frames.append(prepare_frame(image, preprocessing))
    return np.stack(frames)
