"""Changes of many threads at once share a transaction, and none pays for another's mistake."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.gallery import (
    DuplicateTrackletError,
    Filters,
    GalleryError,
    GalleryUnavailableError,
    InvalidEmbeddingError,
    ModelMismatchError,
    NotFoundError,
    StorageFullError,
)
from index.group_commit import GroupCommit
from index.transaction import Transaction
from tests.index.conftest import Enrol

PATIENCE_S = 60.0
ROOT = Path(__file__).parents[2]
Work = Callable[[], object]


class Held:
    """Once it is armed, holds the first commit until it is let go, so that others gather.

    Args:
        monkeypatch: Undoes it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed = False
        self.commits = 0  # since then
        self.at_the_disk, self.let_go = Event(), Event()
        self.instead: list[Callable[[Transaction], None]] = []  # of the next commits
        self._commit = Transaction.commit
        monkeypatch.setattr(Transaction, "commit", lambda transaction: self._hold(transaction))

    def _hold(self, transaction: Transaction) -> None:
        self.commits += self.armed
        if self.armed and self.commits == 1:
            self.at_the_disk.set()
            assert self.let_go.wait(PATIENCE_S)
        elif self.instead:
            self.instead.pop(0)(transaction)
            return
        self._commit(transaction)

    def really(self, transaction: Transaction) -> None:
        """Commit as if nothing held it."""
        self._commit(transaction)


class Caller(Thread):
    """Does something in a thread of its own; has the answer or the error when it has ended."""

    def __init__(self, work: Work) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._answer: object = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self._answer = error

    def answer(self) -> object:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self._answer


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.let_go.set()


def until(condition: Callable[[], bool]) -> None:
    pause = Event()
    for _ in range(100 * int(PATIENCE_S)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it has not come about")


def gather(held: Held, group: GroupCommit[Any, Any], first: Work, *others: Work) -> list[Caller]:
    """Have a call wait for the disk, others wait behind it in their order, and let all go."""
    shared = group._shared
    held.armed = True
    callers = [Caller(first)]
    assert held.at_the_disk.wait(PATIENCE_S)
    busy = 1 - shared._free
    for work in others:
        busy += 1
        callers.append(Caller(work))
        until(lambda count=busy: 1 - shared._free + len(shared._waiting) == count)  # type: ignore[misc]
    held.let_go.set()
    return callers


def found(gallery: EmbeddedGallery, dimension: int = 2) -> set[str]:
    """What the vectors hold; equal to what the store holds, and as many as the columns say."""
    query = np.zeros(dimension, np.float32)
    result = gallery.search(query, model="trsa-test", top_k=500, group_by="tracklet")
    names = {match.record.tracklet_id for match in result.matches}
    stored = [each.tracklet_id for each in gallery.list(Filters(), limit=1000).records]
    assert sorted(stored) == sorted(names)
    assert gallery.counts().tracklets == result.searched == len(names)
    alive = 0 if gallery._derived is None else gallery._derived.columns.alive
    assert alive == len(names)
    return names


def reopened(gallery: EmbeddedGallery, directory: Path) -> set[str]:
    gallery.close()
    with EmbeddedGallery(directory) as again:
        return found(again)


def adding(gallery: EmbeddedGallery, *enrolments: Any) -> Work:
    return partial(gallery.add, list(enrolments))


def test_those_that_wait_for_the_disk_meanwhile_share_the_next_commit(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    names = [f"t{number}" for number in range(6)]
    works = [adding(gallery, enrol(name, [n, 1])) for n, name in enumerate(names)]

    callers = gather(held, gallery._additions, *works)

    assert [each.answer() for each in callers] == [None] * 6
    assert held.commits == 2
    assert found(gallery) == set(names)
    assert [each.tracklet_id for each in gallery.list(Filters(), limit=9).records] == names
    assert reopened(gallery, directory) == set(names)


def test_an_id_that_is_taken_refuses_its_caller_alone(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    """By what is stored, by another one of the same group, and with all that its call brought."""
    callers = gather(
        held,
        gallery._additions,
        adding(gallery, enrol("a", [1, 2])),
        adding(gallery, enrol("b", [1, 2])),
        adding(gallery, enrol("c", [1, 2]), enrol("a", [3, 4])),
        adding(gallery, enrol("d", [1, 2]), enrol("b", [3, 4])),
        adding(gallery, enrol("e", [1, 2])),
    )

    answers = [each.answer() for each in callers]

    assert [type(each) for each in answers] == [
        type(None),
        type(None),
        DuplicateTrackletError,
        DuplicateTrackletError,
        type(None),
    ]
    assert str(answers[3]) == "already in the gallery: b"
    assert found(gallery) == {"a", "b", "e"}
    assert gallery.embedding("b").tolist() == [1, 2]
    assert reopened(gallery, directory) == {"a", "b", "e"}


def test_in_an_empty_gallery_the_first_of_a_group_says_the_model_and_the_size(
    gallery: EmbeddedGallery, enrol: Enrol, held: Held
) -> None:
    callers = gather(
        held,
        gallery._additions,
        partial(gallery.set_calibration, None),  # adds nothing
        adding(gallery, enrol("first", [1, 2])),
        adding(gallery, enrol("other model", [1, 2], model="trsa-other")),
        adding(gallery, enrol("other size", [1, 2, 3])),
        adding(gallery, enrol("last", [3, 4])),
    )

    answers = [each.answer() for each in callers]

    expected = [type(None), type(None), ModelMismatchError, InvalidEmbeddingError, type(None)]
    assert [type(each) for each in answers] == expected
    assert found(gallery) == {"first", "last"}


def refuse(_: Transaction) -> None:
    raise StorageFullError("cannot write the gallery: the disk is full")


def test_a_commit_that_fails_refuses_all_of_its_group_and_leaves_nothing(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    """Whoever would have been refused anyway does not learn of what is not there."""
    held.instead = [refuse]
    callers = gather(
        held,
        gallery._additions,
        adding(gallery, enrol("a", [1, 2], identity="p1")),
        adding(gallery, enrol("b", [1, 2], identity="p2", strip=b"jpeg")),
        adding(gallery, enrol("b", [1, 2])),
        adding(gallery, enrol("c", [1, 2], identity="p3")),
    )

    answers = [each.answer() for each in callers]

    assert answers[0] is None
    assert all(isinstance(each, StorageFullError) for each in answers[1:])
    assert found(gallery) == {"a"}
    assert gallery.counts().identities == 1
    for table in ("tracklets", "embeddings"):
        rows = gallery._store._writer.execute(f"SELECT count(*) FROM {table}")  # noqa: S608
        assert rows.fetchone() == (1,)
    assert gallery._store._writer.execute("SELECT count(*) FROM strips").fetchone() == (0,)
    gallery.add([enrol("b", [5, 6])])
    assert reopened(gallery, directory) == {"a", "b"}


def test_a_disk_that_is_full_in_the_middle_refuses_all_of_the_group_and_leaves_nothing(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    """SQLite gives up all of the transaction then, what others have added to it, too."""
    gallery._store._writer.execute("PRAGMA max_page_count = 40")
    large = [enrol(f"large{number}", [number, 1], strip=bytes(9000)) for number in range(30)]
    callers = gather(
        held,
        gallery._additions,
        adding(gallery, enrol("a", [1, 2])),
        adding(gallery, enrol("b", [1, 2])),
        adding(gallery, *large),
        adding(gallery, enrol("c", [1, 2])),
    )

    answers = [each.answer() for each in callers]

    assert answers[0] is None
    assert all(isinstance(each, StorageFullError) for each in answers[1:])
    assert found(gallery) == {"a"}
    gallery.add([enrol("b", [1, 2])])  # there is room for that
    gallery._store._writer.execute("PRAGMA max_page_count = 100000")
    gallery.add(large)
    assert len(reopened(gallery, directory)) == 32


def test_a_mistake_of_one_caller_does_not_touch_the_others(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    """It is met when the row is written, after another row of the same call."""
    wrong = enrol("wrong", [1, 2], metadata={"not JSON": object()})
    callers = gather(
        held,
        gallery._additions,
        adding(gallery, enrol("a", [1, 2])),
        adding(gallery, enrol("with it", [1, 2]), wrong),
        adding(gallery, enrol("b", [1, 2])),
    )

    answers = [each.answer() for each in callers]

    assert [type(each) for each in answers] == [type(None), TypeError, type(None)]
    assert found(gallery) == {"a", "b"}
    assert reopened(gallery, directory) == {"a", "b"}


@pytest.mark.parametrize("happened", [False, True])
def test_an_interrupt_of_the_one_that_commits_leaves_nobody_waiting_and_nothing_told_twice(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held, happened: bool
) -> None:
    """Before the commit the others' are added by the next; after it they are there, once."""

    def interrupted(transaction: Transaction) -> None:
        if happened:
            held.really(transaction)
        raise KeyboardInterrupt

    held.instead = [interrupted]
    names = ["a", "b", "c", "d"]

    callers = gather(
        held, gallery._additions, *(adding(gallery, enrol(name, [1, 2])) for name in names)
    )

    answers = [each.answer() for each in callers]
    assert [type(each) for each in answers] == [
        type(None),
        KeyboardInterrupt,
        type(None),
        type(None),
    ]
    assert found(gallery) == {"a", "c", "d"} | ({"b"} if happened else set())
    gallery.add([enrol("e", [1, 2])])
    assert reopened(gallery, directory) == {"a", "c", "d", "e"} | ({"b"} if happened else set())


def test_a_failure_of_the_one_that_leads_reaches_all_of_its_group_and_the_next_goes_on(
    gallery: EmbeddedGallery, enrol: Enrol, held: Held
) -> None:
    def fail(_: Transaction) -> None:
        raise RuntimeError("nobody knows")

    held.instead = [fail]

    callers = gather(
        held, gallery._additions, *(adding(gallery, enrol(name, [1, 2])) for name in "abc")
    )

    answers = [each.answer() for each in callers]
    assert [type(each) for each in answers] == [type(None), RuntimeError, RuntimeError]
    gallery.add([enrol("d", [1, 2])])
    assert found(gallery) == {"a", "d"}


def test_when_memory_fails_to_follow_a_group_all_of_it_is_found_all_the_same(
    gallery: EmbeddedGallery, enrol: Enrol, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    def commit_and_break(transaction: Transaction) -> None:
        held.really(transaction)
        assert gallery._derived is not None
        monkeypatch.setattr(gallery._derived.vectors, "add", fail)

    held.instead = [commit_and_break]

    callers = gather(
        held, gallery._additions, *(adding(gallery, enrol(name, [1, 2])) for name in "abc")
    )

    assert [each.answer() for each in callers] == [None] * 3
    assert found(gallery) == {"a", "b", "c"}


def test_searches_go_on_while_a_group_waits_for_the_disk(
    gallery: EmbeddedGallery, enrol: Enrol, held: Held
) -> None:
    looked: list[object] = []

    def look(transaction: Transaction) -> None:
        # Uncommitted: as it was, for everybody else.
        looked.append(Caller(partial(found, gallery)).answer())
        held.really(transaction)

    held.instead = [look]

    callers = gather(
        held, gallery._additions, *(adding(gallery, enrol(name, [1, 2])) for name in "abc")
    )

    assert [each.answer() for each in callers] == [None] * 3
    assert looked == [{"a"}]
    assert found(gallery) == {"a", "b", "c"}


def test_changes_of_records_share_a_commit_and_an_unknown_id_refuses_its_caller_alone(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    """Of two changes of one record both happen, the later one last."""
    gallery.add([enrol(name, [1, 2], identity="p1") for name in "abc"])
    callers = gather(
        held,
        gallery._updates,
        partial(gallery.update, "a", {"identity": "p2"}),
        partial(gallery.update, "b", {"identity": "p3", "camera": "c1"}),
        partial(gallery.update, "nobody", {"identity": "p4"}),
        partial(gallery.update, "b", {"identity": "p5"}),
        partial(gallery.update, "c", {"metadata": {"not JSON": object()}}),
    )

    answers = [each.answer() for each in callers]
    shown = [getattr(each, "identity", type(each)) for each in answers]
    assert shown == ["p2", "p3", NotFoundError, "p5", TypeError]
    assert held.commits == 2
    assert (gallery.get("b").identity, gallery.get("b").camera) == ("p5", "c1")
    for identity, count in (("p1", 1), ("p2", 1), ("p3", 0), ("p5", 1)):
        query, only = np.ones(2, np.float32), Filters(identities=frozenset({identity}))
        found_here = gallery.search(query, model="trsa-test", top_k=9, filters=only)
        assert found_here.searched == count
    assert reopened(gallery, directory) == {"a", "b", "c"}


def test_removals_share_a_commit_and_all_of_them_are_out_of_the_files(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    gallery.add([enrol(f"t{n}", [n, 1], camera=f"secret-{n}") for n in range(20)])
    callers = gather(
        held,
        gallery._removals,
        *(partial(gallery.remove, name) for name in ("t1", "t2", "t3", "t2", "t4")),
    )

    answers = [each.answer() for each in callers]
    shown = [getattr(each, "tracklet_id", type(each)) for each in answers]
    assert shown == ["t1", "t2", "t3", NotFoundError, "t4"]
    assert held.commits == 2
    assert found(gallery) == {f"t{n}" for n in range(20)} - {"t1", "t2", "t3", "t4"}
    content = b"".join(path.read_bytes() for path in directory.iterdir())
    assert not [n for n in range(1, 5) if b"secret-%d\0" % n in content.replace(b"secret-1", b"")]
    assert len(gallery.erasures().entries) == 4


def test_whoever_waits_when_a_gallery_is_closed_is_told(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol, held: Held
) -> None:
    held.armed = True
    first = Caller(adding(gallery, enrol("a", [1, 2])))
    assert held.at_the_disk.wait(PATIENCE_S)
    closer = Caller(gallery.close)
    others = [Caller(adding(gallery, enrol(name, [1, 2]))) for name in "bc"]
    held.let_go.set()

    answers = [each.answer() for each in (first, closer, *others)]

    assert answers[:2] == [None, None]
    stored = {"a"} | {
        name for name, answer in zip("bc", answers[2:], strict=True) if answer is None
    }
    assert all(isinstance(each, GalleryUnavailableError | None) for each in answers[2:])
    with EmbeddedGallery(directory) as again:
        assert found(again) == stored


def test_what_many_threads_are_told_is_what_is_there(directory: Path, enrol: Enrol) -> None:
    """Each adds, changes and removes at random among ids that they share."""
    told: list[list[tuple[str, str]]] = [[] for _ in range(8)]

    def play(gallery: EmbeddedGallery, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            name = f"t{rng.integers(40)}"
            try:
                if rng.random() < 0.6:
                    gallery.add([enrol(name, rng.integers(0, 9, 2).tolist())])
                    told[seed].append(("add", name))
                elif rng.random() < 0.5:
                    gallery.update(name, {"camera": f"c{seed}"})
                else:
                    gallery.remove(name)
                    told[seed].append(("remove", name))
            except (DuplicateTrackletError, NotFoundError):
                pass

    with EmbeddedGallery(directory) as gallery:
        players = [Caller(partial(play, gallery, seed)) for seed in range(8)]
        errors = [each.answer() for each in players]
        before = found(gallery)

    assert errors == [None] * 8
    times = {f"t{number}": 0 for number in range(40)}
    for kind, name in (one for each in told for one in each):
        times[name] += 1 if kind == "add" else -1
    assert {name for name, count in times.items() if count} == before
    assert set(times.values()) <= {0, 1}
    with EmbeddedGallery(directory) as gallery:
        assert found(gallery) == before


def test_whoever_reaches_the_number_to_train_at_is_alone_in_waiting_for_that(
    directory: Path, enrol: Enrol, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of its group are answered before."""
    monkeypatch.setattr("index.factories._LEAST_TRAINING_ROWS", 40)
    with EmbeddedGallery(directory, index="IVF1,Flat") as gallery:
        gallery.add([enrol(f"t{n}", [n, n * n]) for n in range(38)])
        training, trained = Event(), Event()
        rebuild = gallery._rebuild

        def slow() -> None:
            training.set()
            assert trained.wait(PATIENCE_S)
            rebuild()

        monkeypatch.setattr(gallery, "_rebuild", slow)

        callers = gather(
            held, gallery._additions, *(adding(gallery, enrol(name, [1, 2])) for name in "abc")
        )

        assert training.wait(PATIENCE_S)
        assert [callers[0].answer(), callers[2].answer()] == [None, None]
        assert callers[1].is_alive()
        trained.set()
        assert callers[1].answer() is None
        assert gallery._derived is not None
        assert gallery._derived.vectors.trained_on == 41


def test_errors_of_a_group_are_galleries_own(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery._store._writer.execute("PRAGMA query_only = ON")

    with pytest.raises(GalleryError, match="cannot write the gallery"):
        gallery.add([enrol("a", [1, 2])])

    gallery._store._writer.execute("PRAGMA query_only = OFF")
    gallery.add([enrol("a", [1, 2])])
    assert found(gallery) == {"a"}


KILLED = """
import itertools, os, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from index.embedded import EmbeddedGallery
from index.gallery import DuplicateTrackletError
from tests.index.conftest import make_enrolment
gallery = EmbeddedGallery(Path(sys.argv[1]))
life = gallery.counts().tracklets

def play(thread):
    for number in itertools.count():
        name = f"t{life}-{thread}-{number}"
        pair = [make_enrolment(f"{name}-{part}", [thread, number]) for part in "ab"]
        os.write(1, f"? {name}\\n".encode())
        gallery.add(pair)
        os.write(1, f"+ {name}\\n".encode())
        try:
            gallery.add([make_enrolment(f"{name}-c", [1, 1]), pair[0]])
        except DuplicateTrackletError:
            os.write(1, f"! {name}\\n".encode())
        if number % 3 == 2:
            gallery.remove(f"{name}-b")
            os.write(1, f"- {name}\\n".encode())

for thread in range(8):
    threading.Thread(target=play, args=[thread]).start()
"""


def test_a_kill_while_many_write_loses_nothing_that_any_of_them_was_told(directory: Path) -> None:
    """Three times over, at whatever the process was doing; what was refused is never there."""
    for lines in (150, 40, 300):
        command = [sys.executable, "-c", KILLED, str(directory), str(ROOT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = [process.stdout.readline() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            printed += [line for line in process.stdout.readlines() if line.endswith(os.linesep)]
        told = {sign: {line.split()[1] for line in printed if line[0] == sign} for sign in "?+!-"}

        with EmbeddedGallery(directory) as gallery:
            names = found(gallery)

        added = {f"{name}-{part}" for name in told["+"] for part in "ab"}
        removed = {f"{name}-b" for name in told["-"]}
        refused = {f"{name}-c" for name in told["?"]}
        removing = added - removed - names  # one for each thread, at most
        assert told["!"]
        assert len(removing) <= 8
        assert all(name.endswith("-b") for name in removing)
        assert not names & (removed | refused)
        for name in told["?"] - told["+"]:  # under way: both or neither
            assert len({f"{name}-a", f"{name}-b"} & names) in {0, 2}
