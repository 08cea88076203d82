"""The audit trail: who did what to whom, when and from where, in lines that are only appended.

A line is written before its answer leaves, so nobody hears what the trail does not know. A change
has a line more, written before the store is changed; what has only that one was cut off. Names are
in the trail as salted hashes (`index.erasures.digest`): `passerby audit` can tell whom they mean
while the gallery knows the name, and an erasure needs no change of what was written.

Several processes append: the service, and commands beside it. Whoever does holds the newest file's
lock, and whoever begins another file holds that of the one before. So a line goes to the newest
file, and what is not the newest is never written again.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from index.erasures import SALT_BYTES, Kind, digest
from index.files import create, open_regular, sync
from index.gallery import StorageFullError
from service.errors import AuditError, AuditUnavailableError
from service.keys import give_to_owner

log = logging.getLogger(__name__)
DIRECTORY = "audit"
SALT_NAME = "salt"
# Of the next file, until room is kept for it.
MAKING_NAME = ".audit-making"
FILE_PATTERN = re.compile(r"audit-(\d{8})\.jsonl")
MIB = 1 << 20
# At most: 40 KB.
IDS_A_LINE = 1000
# Seconds that an answer waits for its line. A disk that hangs must not keep it for ever.
WRITE_S = 10.0
# What a loss of power may take: the system writes lines to the disk this often.
SYNC_S = 1.0
# Kept free for lines to come, so that searches can go on, and be told of, when something else has
# filled the disk: some 3,000 lines.
RESERVE_BYTES = MIB
_KEEP_SIZE = 1  # of fallocate(2): the file does not seem longer
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# What one line says of whom, and as what the ledger of erasures would hash it.
NAMES: Mapping[str, Kind] = {
    "tracklet": "tracklet",
    "tracklets": "tracklet",
    "identity": "identity",
    "into": "identity",
    "best_tracklet": "tracklet",
    "best_identity": "identity",
}


class Pseudonyms:
    """Turns names into what the trail says instead, like ``#9f86d081884c7d659a2feaa0c55ad015``.

    No id of ours begins with a number sign.

    Args:
        salt: Of the trail, 32 random bytes.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def of(self, field: str, name: str) -> str:
        """What is said instead of a name.

        Args:
            field: One of `NAMES`.
            name: An id or an identity, or whatever a client sent in its place.
        """
        hashed = digest(self._salt, NAMES[field], name.encode("utf-8", "replace").decode())
        return f"#{hashed.hex()[:32]}"

    def hide(self, about: Mapping[str, object]) -> dict[str, object]:
        """The same fields, without names."""
        return {
            field: self._hidden(field, value) if field in NAMES else value
            for field, value in about.items()
            if value is not None
        }

    def _hidden(self, field: str, value: object) -> object:
        if isinstance(value, list | tuple):
            return [self.of(field, str(one)) for one in value]
        return self.of(field, str(value))


def files_of(directory: Path) -> list[Path]:
    """The files of a trail, oldest first."""
    return sorted(one for one in directory.iterdir() if FILE_PATTERN.fullmatch(one.name))


def read_salt(directory: Path) -> bytes:
    """The salt of a trail.

    Raises:
        AuditError: It cannot be read, or is none.
        FileNotFoundError: There is none.
    """
    try:
        with open_regular(directory / SALT_NAME) as file:
            salt = bytes.fromhex(file.read(1024).decode("ascii"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise AuditError(f"cannot read the audit trail's salt: {error}") from error
    if len(salt) != SALT_BYTES:
        raise AuditError(f"expected a salt of {SALT_BYTES} bytes, got {len(salt)}")
    return salt


def _settle_salt(directory: Path) -> bytes:
    """The salt, made where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return read_salt(directory)
    made = directory / f".{SALT_NAME}.{secrets.token_hex(8)}"
    with create(made) as file:
        file.write(secrets.token_bytes(SALT_BYTES).hex().encode())
        give_to_owner(file.fileno(), directory)
        file.flush()
        os.fsync(file.fileno())
    try:
        with contextlib.suppress(FileExistsError):  # of a command at the same time
            os.link(made, directory / SALT_NAME)
    finally:
        made.unlink()
    sync(directory)
    return read_salt(directory)


class Trail:
    """The files of a trail, open for appending; any thread may append, and any process.

    Args:
        directory: Of the trail alone; made if missing, for its owner only.
        file_bytes: From how many on another file is begun.
        files: How many are kept, the newest included; older ones are removed.
        is_guest: For a command, which only appends: how large files grow, how many are kept and
            what room is kept for them is the service's to say.

    Raises:
        AuditError: The trail cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        *,
        file_bytes: int = 64 * MIB,
        files: int = 16,
        is_guest: bool = False,
    ) -> None:
        self._directory = directory
        self._is_guest = is_guest
        self._file_bytes = file_bytes
        self._files = files
        self._reserve_bytes = min(RESERVE_BYTES, file_bytes)
        self._reserved_to = 0
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="auditor")
        self._is_dirty = False
        self._failing_since: datetime | None = None
        try:
            for one in (directory.parent, directory):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            _give_directory(directory)
            self.pseudonyms = Pseudonyms(_settle_salt(directory))
            self._number, self._file = self._open_newest()
            if not is_guest:
                self._reserve(self._file)
        except OSError as error:
            message = f"cannot open the audit trail: {error.strerror or error}"
            raise AuditError(message) from error

    def append(self, line: Mapping[str, object]) -> None:
        """Write one line, whole or not at all.

        Args:
            line: Its fields; those of `NAMES` have plain names, and are hashed here.

        Raises:
            StorageFullError: The disk is full.
            AuditUnavailableError: It cannot be written for another reason.
        """
        try:
            self._resume()
            self._write(line)
        except (StorageFullError, AuditUnavailableError) as error:
            if self._failing_since is None and not self._is_guest:  # once, not for each request
                log.error("%s; what it would have to tell of is refused", error)
                self._failing_since = datetime.now(UTC)
            raise

    def _resume(self) -> None:
        """Tell of the gap that ends here, if there was one."""
        since = self._failing_since
        if since is not None:
            self._write({"action": "resume-trail", "since": _stamp(since)})
            self._failing_since = None
            log.warning("the audit trail can be written again")

    def _write(self, line: Mapping[str, object]) -> None:
        fields = {"time": _stamp(datetime.now(UTC)), **self.pseudonyms.hide(line)}
        content = json.dumps(fields, default=str).encode() + b"\n"
        with _told(), self._lock:
            self._append(content)

    def _append(self, content: bytes) -> None:
        with self._newest() as size:
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                # Somebody was killed, or power was lost, in the middle of a line.
                content = b"\n" + content
            self._write_whole(content, size)
            self._is_dirty = True
            if self._is_guest:
                return
            if size + len(content) >= self._file_bytes:
                self._rotate()
            elif size + len(content) > self._reserved_to - self._reserve_bytes // 2:
                self._reserve(self._file)

    def _write_whole(self, content: bytes, size: int) -> None:
        written = 0
        try:
            while written < len(content):
                written += os.write(self._file, content[written:])
        except OSError:
            if written:
                os.ftruncate(self._file, size)
                self._reserved_to = 0  # that went, too
            raise

    @contextmanager
    def _newest(self) -> Iterator[int]:
        """Hold the newest file against other processes; gives its size.

        Raises:
            AuditUnavailableError: It has been removed, or the trail is closed.
        """
        while True:
            if self._file < 0:
                raise AuditUnavailableError("the audit trail is closed")
            held = self._file
            fcntl.flock(held, fcntl.LOCK_EX)
            try:
                found = os.fstat(held)
                if not self._is_followed(found):
                    yield found.st_size
                    return
                _give_back(held)
            finally:
                # In words: a sync may have the same file open, and would go on holding the lock.
                fcntl.flock(held, fcntl.LOCK_UN)
                if held != self._file:
                    os.close(held)
            self._go_on()

    def _is_followed(self, found: os.stat_result) -> bool:
        """Whether another process has begun another file.

        Raises:
            AuditUnavailableError: The file was removed, and there is no newer one.
        """
        if os.path.lexists(_path(self._directory, self._number + 1)):
            return True
        if found.st_nlink:
            return False
        # Several files on, this one may be among those that are too old.
        if (known := files_of(self._directory)) and _number(known[-1]) > self._number:
            return True
        raise AuditUnavailableError(
            "the file of the audit trail was removed; restart the service to begin another"
        )

    def _go_on(self) -> None:
        """Leave a file for the newest one; it is not held."""
        number, following = self._open_newest()
        left, self._file, self._number = self._file, following, number
        self._reserved_to = 0
        try:
            os.fsync(left)  # of what we wrote, which `sync` would look for in the newest
        finally:
            os.close(left)

    def _reserve(self, file: int) -> bool:
        """Take room for lines to come; False where there is none. Not every system can do that."""
        size = os.fstat(file).st_size
        self._reserved_to = size + self._reserve_bytes
        return reserve(file, size, self._reserve_bytes) not in _FULL

    def _rotate(self) -> None:
        """Begin another file; a disk without room for it leaves the old one in use.

        The old one is held, and is closed by who holds it.
        """
        try:
            os.fsync(self._file)
            following = self._begin_next()
        except OSError as error:
            log.warning("another audit file cannot be begun: %s", error.strerror)
            return
        _give_back(self._file)
        self._file = following
        self._number += 1
        for old in files_of(self._directory)[: -self._files]:
            old.unlink(missing_ok=True)
            log.info("the oldest audit file was removed", extra={"audit_file": old.name})

    def _begin_next(self) -> int:
        """Make the next file, with its room: others go on in it as soon as it has its name."""
        making = self._directory / MAKING_NAME
        making.unlink(missing_ok=True)  # of somebody who was killed; the lock is ours
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(making, flags, 0o600)
        try:
            give_to_owner(file, self._directory)
            if not self._reserve(file):
                raise OSError(errno.ENOSPC, "the disk is full")
            making.rename(_path(self._directory, self._number + 1))
            sync(self._directory)
        except OSError:
            os.close(file)
            making.unlink(missing_ok=True)
            raise
        return file

    def _open_newest(self) -> tuple[int, int]:
        """The number and the descriptor of the newest file, made where there is none."""
        while True:
            known = files_of(self._directory)
            number = _number(known[-1]) if known else 1
            flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            with contextlib.suppress(FileNotFoundError):  # it was the oldest, too, meanwhile
                path = _path(self._directory, number)
                file = os.open(path, flags if known else flags | os.O_CREAT, 0o600)
                break
        try:
            give_to_owner(file, self._directory)
            sync(self._directory)
        except OSError:
            os.close(file)
            raise
        return number, file

    async def write(self, line: Mapping[str, object]) -> None:
        """The same, off the event loop.

        Raises:
            StorageFullError: The disk is full.
            AuditUnavailableError: It cannot be written, or not in time; it may be there later.
        """
        append = partial(copy_context().run, self.append, line)  # its log lines name the request
        writing = asyncio.get_running_loop().run_in_executor(self._writer, append)
        try:
            async with asyncio.timeout(WRITE_S):
                await asyncio.shield(writing)
        except TimeoutError as error:
            writing.add_done_callback(_note_seen)
            raise AuditUnavailableError(
                f"expected the audit trail to be written within {WRITE_S:g} s, it took longer"
            ) from error

    def write_later(self, line: Mapping[str, object]) -> None:
        """The same for somebody who cannot wait; where it fails, the log has it."""
        with contextlib.suppress(RuntimeError):  # at the end of the process
            self._writer.submit(copy_context().run, self.append, line)

    def check(self) -> None:
        """Return where the trail can be written, and its file is still where it was.

        Where it could not last time, it is tried with a line that says since when.

        Raises:
            StorageFullError: The disk is full.
            AuditUnavailableError: It cannot be written for another reason.
        """
        self._resume()
        with _told(), self._lock:
            if self._file >= 0:
                with self._newest():
                    pass

    def sync(self) -> None:
        """Bring what was written to the disk.

        Raises:
            StorageFullError: The disk is full.
            AuditUnavailableError: It cannot be done.
        """
        with _told():
            with self._lock:
                if not self._is_dirty or self._file < 0:
                    return
                self._is_dirty = False
                file = os.dup(self._file)
            try:
                os.fsync(file)  # whoever appends does not wait for it
            finally:
                os.close(file)

    async def follow(self, every_s: float = SYNC_S) -> None:
        """Bring what was written to the disk, again and again; ends by being cancelled."""
        is_failing = False
        while True:
            await asyncio.sleep(every_s)
            try:
                await asyncio.to_thread(self.sync)
            except (StorageFullError, AuditUnavailableError) as error:
                if not is_failing:
                    log.error("what was written may not be on the disk: %s", error)
                is_failing = True
            else:
                is_failing = False

    def close(self) -> None:
        """Write what waits, and close; a disk that hangs is waited for 2 s."""
        with contextlib.suppress(RuntimeError, TimeoutError):  # the former where it is closed
            self._writer.submit(self._close).result(2)
        self._writer.shutdown(wait=False)

    def _close(self) -> None:
        with contextlib.suppress(StorageFullError, AuditUnavailableError):
            self.sync()
        with self._lock:
            file, self._file = self._file, -1
            if file >= 0:
                os.close(file)


@contextmanager
def _told() -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("cannot write the audit trail: the disk is full") from error
        raise AuditUnavailableError(
            f"cannot write the audit trail: {error.strerror or error}"
        ) from error


def _note_seen(writing: "asyncio.Future[None]") -> None:
    if not writing.cancelled():
        writing.exception()


def _give_directory(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_to_owner(opened, directory.parent)
    finally:
        os.close(opened)


def reserve(file: int, size: int, more_bytes: int) -> int:
    """Take room behind the end of a file, which stays where it is.

    Args:
        file: Descriptor.
        size: Of the file.
        more_bytes: How much room.

    Returns:
        0, or the system's number of what is in the way; ENOSYS where systems have no such thing.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return errno.ENOSYS
    done = allocate(file, _KEEP_SIZE, ctypes.c_int64(size), ctypes.c_int64(more_bytes))
    return 0 if done == 0 else ctypes.get_errno()


def _give_back(file: int) -> None:
    """Give back the room that is kept for lines in a file which gets none any more; held."""
    with contextlib.suppress(OSError):  # it does no harm where it stays
        os.ftruncate(file, os.fstat(file).st_size)


def _path(directory: Path, number: int) -> Path:
    return directory / f"audit-{number:08}.jsonl"


def _number(path: Path) -> int:
    found = FILE_PATTERN.fullmatch(path.name)
    return 1 if found is None else int(found[1])


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
