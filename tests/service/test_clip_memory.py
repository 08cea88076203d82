"""Places in shared memory: lent once at a time, and given back once."""

import os

import numpy as np
import pytest

from service import clip_memory
from service.clip_memory import ClipMemory, open_places, stack_into

PLACE = 12  # bytes


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ClipMemory:
    """Two places."""
    monkeypatch.setattr(clip_memory, "MEMORY_BYTES", 2 * PLACE + 1)
    return ClipMemory(PLACE)


def test_no_place_is_lent_twice_and_a_full_memory_lends_none(memory: ClipMemory) -> None:
    one, other = memory.lend(), memory.lend()

    assert one is not None
    assert other is not None
    assert one.number != other.number
    assert memory.lend() is None


def test_the_place_that_was_given_back_last_is_lent_first(memory: ClipMemory) -> None:
    """Its pages are there, and likely in the processor's cache."""
    places = [memory.lend(), memory.lend()]
    for place in places:
        assert place is not None
        place.give_back()

    again = memory.lend()

    assert again is not None
    assert places[1] is not None
    assert again.number == places[1].number


def test_a_place_is_given_back_once(memory: ClipMemory) -> None:
    place = memory.lend()
    assert place is not None
    place.give_back()
    place.give_back()

    assert memory.lend() is not None
    assert memory.lend() is not None
    assert memory.lend() is None


def test_what_another_process_wrote_is_read_and_holds_its_place_until_the_last_view_goes(
    memory: ClipMemory,
) -> None:
    places = open_places(os.dup(memory.fileno()), PLACE)
    frames = [np.full((2, 1, 3), level, dtype=np.uint8) for level in (7, 9)]
    first, second = memory.lend(), memory.lend()
    assert first is not None
    assert second is not None

    stacked = stack_into(places[second.number])(frames)
    read = second.read(PLACE).reshape(2, 2, 1, 3)
    second.give_back()  # does nothing: whoever reads has it

    assert np.may_share_memory(stacked, places)
    assert np.array_equal(read, np.stack(frames))
    view = read[1:]
    del read
    assert memory.lend() is None
    del view
    again = memory.lend()
    assert again is not None
    assert again.number == second.number


def test_frames_without_room_in_a_place_are_stacked_elsewhere(memory: ClipMemory) -> None:
    places = open_places(os.dup(memory.fileno()), PLACE)
    frames = [np.ones((2, 1, 3), dtype=np.uint8)] * 3

    stacked = stack_into(places[0])(frames)

    assert np.array_equal(stacked, np.stack(frames))
    assert not places.any()


def test_more_than_a_place_holds_is_not_read(memory: ClipMemory) -> None:
    place = memory.lend()
    assert place is not None

    with pytest.raises(ValueError, match="at most 12 bytes"):
        place.read(PLACE + 1)

    place.give_back()


def test_clips_larger_than_the_memory_have_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_memory, "MEMORY_BYTES", PLACE - 1)

    assert ClipMemory(PLACE).lend() is None


def test_a_memory_that_is_forgotten_leaves_no_descriptor() -> None:
    memory = ClipMemory(PLACE)
    place = memory.lend()
    assert place is not None
    descriptor = memory.fileno()
    content = place.read(PLACE)

    del memory, place

    assert not content.any()  # still there
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
