"""Memory that a decoder fills and its parent reads, so that no clip has to travel.

A clip of 15 frames of 256x128 pixels is 1.5 MB, which a socket would copy twice.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from model.frames import Clip

# Of a decoder, at most; pages that were never used take none. Clips beyond it are sent.
MEMORY_BYTES = 32 * 1024 * 1024


class ClipMemory:
    """Places for clips, of which a process is lent one at a time.

    It belongs to one decoder alone: a process that a picture has taken over sees what it was sent,
    and nothing else. What was read stays readable when nobody knows the memory any more.

    Args:
        place_bytes: Of the largest clip that fits, >= 1.

    Raises:
        OSError: The kernel has none, or no descriptor is left.
    """

    def __init__(self, place_bytes: int) -> None:
        self.place_bytes = place_bytes
        places = MEMORY_BYTES // place_bytes
        # In memory alone, and gone with the processes that have it open.
        self._descriptor = os.memfd_create("clips")
        weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, max(1, places) * place_bytes)
        self.content = mmap.mmap(self._descriptor, 0)
        # The last one that was given back is the next to be lent: its pages are there.
        self.free = list(reversed(range(places)))

    def fileno(self) -> int:
        """For the process that fills it."""
        return self._descriptor

    def lend(self) -> "Place | None":
        """A place to be filled; None while all are taken."""
        return Place(self, self.free.pop()) if self.free else None


class Place:
    """Where one clip goes; given back once, by who asked for it or with what was read.

    Args:
        memory: That it is in.
        number: Which of its places.
    """

    def __init__(self, memory: ClipMemory, number: int) -> None:
        self.number = number
        self._memory = memory
        self._is_lent = True

    def give_back(self) -> None:
        """Give it back, unless it was read: nobody writes to it any more."""
        if self._is_lent:
            self._is_lent = False
            self._memory.free.append(self.number)

    def read(self, length: int) -> NDArray[np.uint8]:
        """What was written, without a copy; with its last reference the place is given back.

        Args:
            length: Bytes.

        Raises:
            ValueError: That is more than it has.
        """
        size = self._memory.place_bytes
        if length > size:
            raise ValueError(f"expected at most {size} bytes in a place, got {length}")
        content = np.frombuffer(self._memory.content, np.uint8, length, self.number * size)
        weakref.finalize(content, self._memory.free.append, self.number).atexit = False
        self._is_lent = False
        return content


def open_places(descriptor: int, place_bytes: int) -> NDArray[np.uint8]:
    """In the other process: (places, place_bytes)."""
    places = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8).reshape(-1, place_bytes)
    os.close(descriptor)
    return places


def stack_into(place: NDArray[np.uint8]) -> Callable[[Sequence[Clip]], Clip]:
    """As `numpy.stack`, with a place for what comes out, where it fits."""

    def stack(frames: Sequence[Clip]) -> Clip:
        length = sum(frame.nbytes for frame in frames)
        if length > len(place):
            return np.stack(frames)
        return np.stack(frames, out=place[:length].reshape(len(frames), *frames[0].shape))

    return stack
