"""What the tests of galleries share: a maker of enrolments, and an empty gallery."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.gallery import Enrolment, TrackletRecord

Enrol = Callable[..., Enrolment]


def make_enrolment(
    tracklet_id: str,
    vector: Sequence[float],
    *,
    strip: bytes | None = None,
    frames: Sequence[bytes] = (),
    **fields: Any,
) -> Enrolment:
    """An enrolment with what a test does not care for filled in."""
    known: dict[str, Any] = {
        "frames_received": 40,
        "frames_used": 15,
        "model": "trsa-test",
        "created_at": datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC),
        "content": "0" * 64,
    }
    record = TrackletRecord(tracklet_id=tracklet_id, **(known | fields))
    return Enrolment(record, np.array(vector, dtype=np.float32), strip, frames)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """So small an index is done before FAISS's threads have met, above all on a busy machine."""
    faiss.omp_set_num_threads(1)


@pytest.fixture
def enrol() -> Enrol:
    """The maker of enrolments."""
    return make_enrolment


@pytest.fixture(scope="session")
def fast_disk() -> Path | None:
    """A memory disk, where a commit waits for nothing; None where there is none."""
    shared_memory = Path("/dev/shm")  # noqa: S108
    return shared_memory if shared_memory.is_dir() else None


@pytest.fixture
def directory(fast_disk: Path | None) -> Iterator[Path]:
    """Where the gallery of a test is."""
    with tempfile.TemporaryDirectory(dir=fast_disk) as parent:
        yield Path(parent) / "gallery"


@pytest.fixture
def gallery(directory: Path) -> Iterator[EmbeddedGallery]:
    """An empty gallery with the default index."""
    with EmbeddedGallery(directory) as opened:
        yield opened
