"""API keys: who may do how much. The data directory has their salted hashes, nobody has more."""

import asyncio
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import SecretStr

from index.files import create, open_regular, sync
from service.errors import KeysError

log = logging.getLogger(__name__)
FILE_NAME = "keys.json"
LOCK_NAME = "keys.lock"
# What every key that we make begins with, so that a scanner for leaked secrets can know it.
PREFIX = "passerby_"
Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""
LABEL_PATTERN = r"^[A-Za-z0-9_.:@-]{1,64}$"
LONGEST_DAYS = 36500.0
# A second after a change of the file a running service knows it.
FOLLOW_S = 1.0
_SECRET_BYTES = 32
_SALT_BYTES = 16
_VERSION = 1
_GREATEST_FILE_BYTES = 16 << 20
_State = Literal["open", "expired", "revoked"]


def includes(role: Role, needed: Role) -> bool:
    """Whether a role may do what another one may."""
    return ROLES.index(role) >= ROLES.index(needed)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept: nobody can make the key from it.

    Args:
        key_id: Names it for ever, unlike its label, which another one may have afterwards.
        label: Whose it is, as the log and the audit trail say.
        role: What it opens.
        created_at: When it was made, UTC.
        expires_at: From when on it opens nothing, or None.
        revoked_at: The same, by hand.
        salt: 16 random bytes.
        digest: See `digest_of`, 32 bytes.
    """

    key_id: str
    label: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    salt: bytes
    digest: bytes

    def state(self, now: datetime) -> _State:
        """Whether it opens what its role may, or why not."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "open"


def digest_of(salt: bytes, hashed: bytes) -> bytes:
    """What is kept of a key, 32 bytes.

    A fast hash: a key that we make has 256 random bits, which nobody can try one by one, so a slow
    one would protect nothing and cost every request its time.

    Args:
        salt: The key's.
        hashed: SHA-256 of the key. However long a header is, it is read once, not for each key.
    """
    return hashlib.blake2b(hashed, salt=salt, digest_size=32).digest()


def _key_of(
    key_id: str, secret: bytes, role: Role, label: str, expires_at: datetime | None = None
) -> Key:
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = digest_of(salt, hashlib.sha256(secret).digest())
    return Key(key_id, label, role, datetime.now(UTC), expires_at, None, salt, digest)


def read_keys(directory: Path) -> tuple[Key, ...]:
    """The keys of a data directory, in the order in which they were made; none without a file.

    Raises:
        KeysError: The file cannot be read, or is not one of ours.
    """
    try:
        with open_regular(directory / FILE_NAME) as file:
            content = file.read(_GREATEST_FILE_BYTES + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise KeysError(f"cannot read {FILE_NAME}: {error.strerror or error}") from error
    try:
        return _parse(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # What exactly is wrong with it is not repeated: a hash is nothing for a log.
        message = (
            f"expected keys of version {_VERSION} in {FILE_NAME}, got a damaged file; put a copy "
            "in its place, or take it away and make new keys"
        )
        raise KeysError(message) from error


def _parse(content: bytes) -> tuple[Key, ...]:
    found = json.loads(content.decode())
    if found["version"] != _VERSION:
        raise ValueError("another version")
    return tuple(_read_key(one) for one in found["keys"])


def _read_key(entry: Mapping[str, Any]) -> Key:
    roles: dict[str, Role] = {role: role for role in ROLES}
    salt, digest = bytes.fromhex(entry["salt"]), bytes.fromhex(entry["digest"])
    if len(salt) != _SALT_BYTES or len(digest) != 32:
        raise ValueError("a hash of another kind")
    created_at = _time(entry["created_at"])
    if created_at is None:
        raise ValueError("a key without a beginning")
    return Key(
        key_id=str(entry["id"]),
        label=str(entry["label"]),
        role=roles[entry["role"]],
        created_at=created_at,
        expires_at=_time(entry["expires_at"]),
        revoked_at=_time(entry["revoked_at"]),
        salt=salt,
        digest=digest,
    )


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time without an offset")
    return time


def describe(key: Key) -> dict[str, str | None]:
    """What everybody may know of a key, by name."""
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "id": key.key_id,
        "label": key.label,
        "role": key.role,
        **{name: None if time is None else time.isoformat() for name, time in times.items()},
    }


def _say_nothing(_: Key) -> None:
    """For those whose keys no audit trail tells of."""


def create_key(
    directory: Path,
    role: Role,
    label: str,
    expires_days: float | None = None,
    *,
    tell: Callable[[Key], None] = _say_nothing,
) -> tuple[Key, str]:
    """Make a key.

    Args:
        directory: The data directory; made if missing.
        role: What it opens.
        label: Whose it is; no other key that opens may have it.
        expires_days: For how long it opens; None for ever.
        tell: Gets the key once nothing is wrong with it, before it opens anything.

    Returns:
        What is kept, and the key itself, which nobody can tell a second time.

    Raises:
        KeysError: The label is none or is taken, or the file cannot be read or written.
    """
    if not re.fullmatch(LABEL_PATTERN, label) or label.startswith(PREFIX):
        # Not repeated: it may be a key.
        raise KeysError("expected a label of 1 to 64 letters, digits and _ . : @ -, got another")
    if expires_days is not None and not 0 < expires_days <= LONGEST_DAYS:
        raise KeysError(f"expected days in (0, {LONGEST_DAYS:g}], got {expires_days:g}")
    now = datetime.now(UTC)
    expires_at = None if expires_days is None else now + timedelta(days=expires_days)
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    with _changing(directory) as keys:
        if any(one.label == label and one.state(now) == "open" for one in keys):
            raise KeysError(f"expected a label without a key, got {label}; revoke that key first")
        key = _key_of(secrets.token_hex(4), secret.encode(), role, label, expires_at)
        tell(key)
        keys.append(key)
    return key, secret


def revoke_key(directory: Path, name: str, *, tell: Callable[[Key], None] = _say_nothing) -> Key:
    """Have a key open nothing any more.

    Args:
        directory: The data directory.
        name: Id of a key, or the label of one that is not revoked yet.
        tell: Gets the key that it is, before it is revoked.

    Returns:
        What is kept of it: the audit trail goes on speaking of it.

    Raises:
        KeysError: There is no such key, or the file cannot be read or written.
    """
    with _changing(directory) as keys:
        for position, key in enumerate(keys):
            if key.revoked_at is None and name in (key.key_id, key.label):
                tell(key)
                keys[position] = revoked = replace(key, revoked_at=datetime.now(UTC))
                return revoked
        # Not repeated: somebody may have written the key itself.
        raise KeysError("expected the id or the label of a key that is not revoked, got another")


@contextmanager
def _changing(directory: Path) -> Iterator[list[Key]]:
    """Change the keys of a data directory: all at once, and one command after the other."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(directory / LOCK_NAME, flags, 0o600)
    except OSError as error:
        raise KeysError(f"cannot change {FILE_NAME}: {error.strerror or error}") from error
    try:
        give_to_owner(lock, directory)
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_keys(directory))
        yield keys
        _write_keys(directory, keys)
    finally:
        os.close(lock)


def _write_keys(directory: Path, keys: Sequence[Key]) -> None:
    """Write all keys, whole or not at all."""
    entries = [describe(one) | {"salt": one.salt.hex(), "digest": one.digest.hex()} for one in keys]
    made = directory / f".{FILE_NAME}.making"
    try:
        made.unlink(missing_ok=True)  # of somebody who was killed; the lock is ours
        with create(made) as file:
            file.write(json.dumps({"version": _VERSION, "keys": entries}, indent=1).encode())
            file.flush()
            give_to_owner(file.fileno(), directory)
            os.fsync(file.fileno())
        made.replace(directory / FILE_NAME)
        sync(directory)
    except OSError as error:
        raise KeysError(f"cannot write {FILE_NAME}: {error.strerror or error}") from error


def give_to_owner(file: int, directory: Path) -> None:
    """Give a file to the owner of its directory, where root made it for a service that is not root.

    Raises:
        OSError: It cannot be done.
    """
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(file, owner.st_uid, owner.st_gid)


def _has_open_key(keys: Sequence[Key]) -> bool:
    now = datetime.now(UTC)
    return any(one.state(now) == "open" for one in keys)


class _Seen(NamedTuple):
    """By what one version of a file is told from another."""

    inode: int
    changed_ns: int
    size: int


class KeyRing:
    """The keys of a service: those of its settings, and those of a file that it follows.

    Once there is a key, whatever its state, the service is closed to everybody else, and stays so
    until it is started without any: neither the last revocation nor a lost file opens it. A file
    that lists none counts as one that did: only a person can have emptied it. The log says so.

    Args:
        directory: With the file of keys; None where only settings count.
        given: Keys of the settings: of an admin, or of the role in front, like ``read:KEY``.

    Raises:
        KeysError: The file cannot be read.
    """

    def __init__(self, directory: Path | None = None, given: Sequence[SecretStr] = ()) -> None:
        self._directory = directory
        self._given = tuple(
            _given_key(number, one.get_secret_value()) for number, one in enumerate(given, start=1)
        )
        self._keys = self._given
        self._seen: _Seen | None = None
        self._is_closed = False
        self.refresh()

    @property
    def is_closed(self) -> bool:
        """Whether a key is needed."""
        return self._is_closed

    def refresh(self) -> None:
        """Read the file, where it has changed.

        Raises:
            KeysError: It cannot be read, or is gone; what was known goes on counting.
        """
        if self._directory is not None:
            seen = _look(self._directory / FILE_NAME)
            if seen is None and self._seen is not None:
                raise KeysError(f"expected {FILE_NAME} where it was, got none")
            if seen != self._seen:
                self._keys = (*self._given, *read_keys(self._directory))
                self._seen = seen
                if not _has_open_key(self._keys):
                    log.warning(
                        "nobody can use this service: %s has no key that opens; make one with "
                        "`passerby keys create --role admin --label NAME`",
                        FILE_NAME,
                    )
        self._is_closed |= self._seen is not None or len(self._keys) > 0

    def find(self, secret: bytes) -> Key | None:
        """The key that somebody shows, in whatever state it is; None where there is none like it.

        All are compared, each in constant time: how long it takes says nothing.
        """
        hashed = hashlib.sha256(secret).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest_of(key.salt, hashed), key.digest):
                found = key
        return found

    async def follow(self, every_s: float = FOLLOW_S) -> None:
        """Read what changes, again and again; ends by being cancelled, or where nothing can."""
        told = ""
        while self._directory is not None:
            await asyncio.sleep(every_s)
            try:
                await asyncio.to_thread(self.refresh)
            except KeysError as error:
                if str(error) != told:  # once, not every second
                    log.error("the keys stay as they were: %s", error)
                told = str(error)
            else:
                told = ""


def _given_key(number: int, text: str) -> Key:
    role: Role = "admin"
    for one in ROLES:
        if text.startswith(f"{one}:"):
            role, text = one, text.removeprefix(f"{one}:")
            break
    name = f"settings-{number}"
    if not text:
        raise KeysError(f"expected a key after its role in the settings, got none in {name}")
    return _key_of(name, text.encode(), role, name)


def _look(path: Path) -> _Seen | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeysError(f"cannot read {path.name}: {error.strerror or error}") from error
    return _Seen(found.st_ino, found.st_mtime_ns, found.st_size)
