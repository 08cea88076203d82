"""What an upload is made of and may hold: plain, for processes that know no settings."""

from dataclasses import dataclass
from typing import Protocol, Self

FILE_FIELDS = ("frames", "archive", "video")


class FrameLimits(Protocol):
    """What decoding needs to know of `service.settings.LimitSettings`, where each is described."""

    @property
    def frames(self) -> int:
        """Frames of one tracklet."""

    @property
    def file_bytes(self) -> int:
        """Bytes of one file."""

    @property
    def request_bytes(self) -> int:
        """Bytes of a zip unpacked."""

    @property
    def frame_pixels(self) -> int:
        """Pixels of one frame."""

    @property
    def side_pixels(self) -> int:
        """Shortest side of a frame, pixels, at least."""


@dataclass(frozen=True, slots=True)
class PlainLimits:
    """The same, ready to travel to another process."""

    frames: int
    file_bytes: int
    request_bytes: int
    frame_pixels: int
    side_pixels: int

    @classmethod
    def of(cls, limits: FrameLimits) -> Self:
        """Copy them from the settings."""
        return cls(
            frames=limits.frames,
            file_bytes=limits.file_bytes,
            request_bytes=limits.request_bytes,
            frame_pixels=limits.frame_pixels,
            side_pixels=limits.side_pixels,
        )
