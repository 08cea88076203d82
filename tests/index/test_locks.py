"""The locks keep their promises."""

from pathlib import Path
from threading import Event, Thread

import pytest

from index.gallery import GalleryUnavailableError
from index.locks import DirectoryLock, ReadWriteLock

PATIENCE_S = 10.0


def test_readers_read_together() -> None:
    lock = ReadWriteLock()
    inside = Event()

    def read() -> None:
        with lock.reading():
            inside.set()

    with lock.reading():
        Thread(target=read).start()

        assert inside.wait(PATIENCE_S)


def test_a_waiting_writer_goes_before_readers_that_come_later() -> None:
    lock = ReadWriteLock()
    order: list[str] = []

    def write() -> None:
        with lock.writing():
            order.append("writer")

    def read() -> None:
        with lock.reading():
            order.append("reader")

    writer, reader = Thread(target=write), Thread(target=read)
    with lock.reading():
        writer.start()
        while not lock._waiting_writers:
            pass
        reader.start()
        reader.join(0.05)  # a reader that is let in would be done
        assert order == []
    writer.join(PATIENCE_S)
    reader.join(PATIENCE_S)

    assert order == ["writer", "reader"]


def test_a_writer_is_alone() -> None:
    lock = ReadWriteLock()
    total = 0

    def count() -> None:
        nonlocal total
        for _ in range(200):
            with lock.writing():
                before = total
                with_others = lock._readers
                total = before + 1 + with_others * 10_000

    def look() -> None:
        for _ in range(200):
            with lock.reading():
                assert not lock._writing

    threads = [Thread(target=each) for each in (count, count, count, look, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert total == 600


def test_a_failed_block_frees_the_lock() -> None:
    lock = ReadWriteLock()

    with pytest.raises(ValueError, match="inside"), lock.writing():
        raise ValueError("inside")
    with pytest.raises(ValueError, match="inside"), lock.reading():
        raise ValueError("inside")

    with lock.writing():
        assert lock._readers == 0


def test_a_directory_has_one_opener(tmp_path: Path) -> None:
    first = DirectoryLock(tmp_path / "lock")
    with pytest.raises(GalleryUnavailableError, match="already open"):
        DirectoryLock(tmp_path / "lock")

    first.release()

    DirectoryLock(tmp_path / "lock").release()
