"""What a process still knows of those who were erased: nothing, without waiting for a restart."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from index.embedded import EmbeddedGallery
from index.gallery import Filters
from tests.index.conftest import make_enrolment

_PLAIN = (str, bytes, int, float, type(None))
BACKWARDS = "ahtram-ohw"  # so that no constant of this file is taken for a trace


def holders(needle: str) -> list[str]:
    """Where live objects hold a text that contains one: types, and the names that lead there."""
    gc.collect()
    found, seen = [], set[int]()
    for each in gc.get_objects():
        for holder in _with_untracked(each, seen):
            held = gc.get_referents(holder)
            if issubclass(type(holder), dict):  # which does not tell of keys that are texts
                held += holder
            texts = [one for one in held if issubclass(type(one), str)]  # no property is asked
            if any(needle in one and one is not needle for one in texts):
                found.append(f"{type(holder).__name__} in {type(each).__qualname__}")
    return found


def _with_untracked(holder: Any, seen: set[int]) -> Iterator[Any]:
    """An object, and what it holds that the collector does not list, such as plain dictionaries."""
    yield holder
    for one in gc.get_referents(holder):
        if issubclass(type(one), _PLAIN) or gc.is_tracked(one) or id(one) in seen:
            continue
        seen.add(id(one))
        yield from _with_untracked(one, seen)


def lived(directory: Path, index: str) -> EmbeddedGallery:
    """A gallery that has enrolled, listed, found, renamed and filtered somebody."""
    name = BACKWARDS[::-1]
    gallery = EmbeddedGallery(directory, index=index)
    gallery.add(
        [
            make_enrolment(f"{name}-{row}", [row, 1, 2], identity=name, camera="c1")
            for row in range(3)
        ]
    )
    gallery.add([make_enrolment(f"t{row}", [row, 3, 4], identity="p1") for row in range(300)])
    query = gallery.embedding("t1")
    for filters in (Filters(identities=frozenset({name})), Filters(cameras=frozenset({name}))):
        gallery.search(query, model="trsa-test", top_k=3, filters=filters)
    gallery.search(
        query,
        model="trsa-test",
        top_k=3,
        filters=Filters(exclude_tracklets=frozenset({f"{name}-1"})),
    )
    gallery.identities(limit=10)
    gallery.list(Filters(), limit=10)
    gallery.update(f"{name}-0", {"metadata": {"name": name}})
    gallery.rename_identity(name, f"{name}-2")
    gallery.merge_identity(f"{name}-2", "p1")
    gallery.assign([f"{name}-{row}" for row in range(3)], name)
    return gallery


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_nothing_in_memory_names_who_was_erased(directory: Path, index: str) -> None:
    gallery = lived(directory, index)
    assert holders(BACKWARDS[::-1])  # the search would find it

    gallery.remove_identity(BACKWARDS[::-1])

    assert holders(BACKWARDS[::-1]) == []
    gallery.close()


def test_nothing_in_memory_names_whose_tracklets_were_erased_one_by_one(directory: Path) -> None:
    gallery = lived(directory, "Flat")

    for row in range(3):
        gallery.remove(f"{BACKWARDS[::-1]}-{row}")

    assert holders(BACKWARDS[::-1]) == []
    gallery.close()


def test_nothing_in_memory_keeps_a_name_that_somebody_lost(directory: Path) -> None:
    gallery = lived(directory, "Flat")

    gallery.rename_identity(BACKWARDS[::-1], "p99")

    assert [one for one in holders(BACKWARDS[::-1]) if "Columns" in one] == []
    gallery.close()
