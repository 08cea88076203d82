"""Drawn sets with a name: what is hard in each, and how large it is.

Each preset but `full` turns on one difficulty of `easy`, so that what a part of the network does
for it can be read from two results.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from model.datasets.occluders import OCCLUDER_KINDS
from model.datasets.synthetic import SyntheticSet

Preset = Literal["easy", "clutter", "occluded", "blur", "full"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

Size = Literal["tiny", "small", "gpu"]
SIZES: tuple[Size, ...] = get_args(Size)

_EASY: Mapping[str, Any] = {
    "occluded_share": 0.0,
    "occluders": OCCLUDER_KINDS,
    "lingers": True,
}
PRESET_VALUES: Mapping[Preset, Mapping[str, Any]] = {
    "easy": _EASY,
    "clutter": {**_EASY, "clutter": 1.0},
    "occluded": {**_EASY, "occluded_share": 0.75},
    "blur": {
        **_EASY,
        "degraded_share": 0.4,
        "lowest_resolution": 0.4,
        "jitter": 1.6,
        "bad_crop_share": 0.05,
    },
    "full": {
        **_EASY,
        "occluded_share": 0.5,
        "clutter": 0.6,
        "degraded_share": 0.3,
        "lowest_resolution": 0.4,
        "jitter": 1.6,
        "bad_crop_share": 0.05,
        "foreign_share": 0.05,
        "frames_min": 5,
        "frames_max": 200,
    },
}
"""What differs from ``SyntheticSet``'s own values."""

SIZE_VALUES: Mapping[Size, Mapping[str, Any]] = {
    "tiny": {"identities": 8, "height": 64, "width": 32, "frames_min": 5, "frames_max": 12},
    "small": {"identities": 350, "height": 64, "width": 32},
    "gpu": {"identities": 300, "height": 256, "width": 128},
}
"""Likewise: for unit tests, for a CPU (150 train and 200 test, or halves), and for a GPU."""


def preset_set(preset: Preset | None, size: Size | None = None, **values: Any) -> SyntheticSet:
    """Return a set by names, with some of its values given.

    Args:
        preset: What is hard; ``SyntheticSet()`` where None.
        size: How large it is; else as ``SyntheticSet()``. It goes over the preset.
        values: Of ``SyntheticSet``; they go over both, None meaning not given.

    Raises:
        ValueError: A value is out of its range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    named = {**(PRESET_VALUES[preset] if preset else {}), **(SIZE_VALUES[size] if size else {})}
    return replace(SyntheticSet(), **{**named, **given})
