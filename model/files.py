"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".aside-"
"""How the folders begin in which files are written."""


@contextmanager
def written_aside(path: Path, *, suffix: str | None = None) -> Iterator[Path]:
    """Yield a path to write to; when the block ends without an error, the file takes its name.

    What stood under the name before survives any failure, a full disk and a kill included, and
    nothing else is left behind. Missing parent folders are made.

    Args:
        path: The name; what it stood for is replaced.
        suffix: Of the file while it is written, for writers that go by it; that of ``path`` where
            None.

    Raises:
        OSError: It cannot be written; what the block raises goes on as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=ASIDE) as folder:
        draft = Path(folder) / (path.name if suffix is None else f"draft{suffix}")
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~_umask())  # some writers write for their owner alone
        draft.replace(path)


def reason(error: Exception) -> str:
    """What went wrong, without the paths that an OSError repeats."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error).partition("\n")[0]  # PyTorch appends a stack of its own


def _umask() -> int:
    current = os.umask(0o022)  # the only way to read it is to set it
    os.umask(current)
    return current
