"""Changes of many threads in one transaction: whoever waits at the same time waits once.

The disk takes as long to make a hundred changes durable as to make one. So while one thread waits
for it, the changes of others gather, and the next of them commits them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from index.schema import translated
from index.sharing import SharedCalls
from index.transaction import Transaction

Asked = TypeVar("Asked")
Done = TypeVar("Done")
# There are never so many threads. What they ask for is in memory before it comes here.
_MOST_TOGETHER = 1024


@dataclass(eq=False, slots=True)
class Change(Generic[Asked, Done]):
    """What one thread asks for, and what becomes of it.

    Args:
        asked: What.
        done: What was done in the store, once it was.
        refusal: Why it was not.
        is_settled: Whether it has happened, durably.
        is_followed: Whether its thread is to look after what comes after such changes.
    """

    asked: Asked
    done: Done | None = None
    refusal: Exception | None = None
    is_settled: bool = False
    is_followed: bool = False

    def result(self) -> Done:
        """What was done.

        Raises:
            Exception: Why it was not; whatever `attempted` met.
        """
        if self.refusal is not None:
            raise self.refusal
        return self.done  # type: ignore[return-value]  # there, where no refusal is


class GroupCommit(Generic[Asked, Done]):
    """Lets threads that wait at the same time share a transaction, see `index.sharing.SharedCalls`.

    Args:
        make: Makes changes, in their order: refuses some, commits the others with `commit`. It runs
            in the thread of one of them, and nobody else's meanwhile. What it raises is raised to
            all whose changes it got, for then none has happened.
    """

    def __init__(self, make: Callable[[Sequence[Change[Asked, Done]]], None]) -> None:
        self._make = make
        self._shared = SharedCalls(self._call, at_once=1, most=_MOST_TOGETHER)

    def ask(self, asked: Asked) -> Change[Asked, Done]:
        """Have something changed; returns what became of it."""
        return self._shared.ask(None, Change(asked))

    def _call(self, changes: Sequence[Change[Asked, Done]]) -> Sequence[Change[Asked, Done]]:
        # Others have happened, where the thread was interrupted that made them.
        if left := [each for each in changes if not each.is_settled]:
            self._make(left)
        return changes


def attempted(
    changes: Sequence[Change[Asked, Done]],
    transaction: Transaction,
    write: Callable[[Transaction, Asked], Done],
) -> list[Change[Asked, Done]]:
    """Write changes, each for itself; returns those that were not refused.

    Args:
        changes: In their order.
        transaction: That they become part of.
        write: Changes the store as one of them asks, or raises; then nothing is left of it.

    Raises:
        StorageFullError: The disk is full, and SQLite has given up the transaction.
        GalleryUnavailableError: It has given it up for another reason.
    """
    made = []
    for change in changes:
        change.refusal = None
        try:
            with translated("write the gallery"), transaction.part():
                change.done = write(transaction, change.asked)
        except Exception as error:
            if not transaction.is_open:
                raise
            change.refusal = error  # raised in its own thread
        else:
            made.append(change)
    return made


def commit(transaction: Transaction, changes: Sequence[Change[Asked, Done]]) -> None:
    """Commit changes, and settle them; also where an interrupt comes just then.

    Raises:
        StorageFullError: The disk is full; nothing has happened.
        GalleryUnavailableError: The store cannot be written; likewise.
    """
    try:
        transaction.commit()
    finally:
        if transaction.is_committed:
            for change in changes:
                change.is_settled = True
