"""What a command tells the audit trail: before it does something, and how that ended."""

import contextlib
import errno
import os
import pwd
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from index.gallery import GalleryError, StorageFullError
from index.store import FILE_NAME
from model.errors import ModelError
from service.audit import DIRECTORY, Trail
from service.client import ClientError
from service.errors import AuditError, AuditUnavailableError, ServiceError
from service.keys import FILE_NAME as KEYS_NAME
from service.settings import PREFIX, AuditSettings, InvalidSettingsError

Outcome = Literal["done", "waiting", "refused", "failed"]
# Says who acted, in a field of its own. No key's label has a space.
BY_COMMAND = "command of user"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_EXPECTED = (ClientError, GalleryError, InvalidSettingsError, ModelError, ServiceError)


def is_data_dir(directory: Path) -> bool:
    """Whether a directory has a gallery, keys or an audit trail of ours."""
    return any((directory / name).exists() for name in (FILE_NAME, KEYS_NAME, DIRECTORY))


class _Switch(BaseSettings):
    """The one part of the service's settings that commands share; flags of it they cannot know."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore")

    audit: AuditSettings = AuditSettings()


def _is_kept() -> bool:
    try:
        return _Switch().audit.enabled
    except (ValidationError, SettingsError) as error:
        raise InvalidSettingsError(
            f"expected {PREFIX}AUDIT__ENABLED and its like as the service has them, got others"
        ) from error


class Deed:
    """One act of a command.

    Args:
        data_dir: Whose trail tells of it; None for nobody's.
        action: What is done.
        about: What else is known of it, see `tell`.
    """

    def __init__(self, data_dir: Path | None, action: str, **about: object) -> None:
        self._directory = data_dir / DIRECTORY if data_dir is not None and _is_kept() else None
        self._action = action
        self._trail: Trail | None = None
        self._line = {"id": secrets.token_hex(8), "action": action, **_actor(), **about}
        self._outcome: Outcome = "done"

    def tell(self, *, outcome: Outcome = "done", **about: object) -> None:
        """Add to what is said of it.

        Args:
            outcome: How it ends, where it ends without an error.
            about: Fields of its line. Those of `service.audit.NAMES` are hashed; others must say
                nothing of a person.
        """
        self._outcome = outcome
        self._line |= about

    def begin(self) -> None:
        """Write that it is about to be done.

        Raises:
            AuditError: The trail cannot be written, so nothing must be done.
        """
        try:
            self._append({})
        except (AuditError, AuditUnavailableError, StorageFullError) as error:
            raise AuditError(f"{error}; nothing is done that it could not tell of") from error

    def end(self) -> None:
        """Write that it is done.

        Raises:
            AuditError: The trail cannot be written.
        """
        try:
            self._append({"outcome": self._outcome})
        except (AuditError, AuditUnavailableError, StorageFullError) as error:
            raise AuditError(
                f"{self._action} is done, but the audit trail cannot say so: {error}"
            ) from error

    def fail(self, error: BaseException) -> None:
        """Write that it was refused, or failed; where that cannot be written, it looks cut off.

        Args:
            error: Whose kind is told. Its words may name somebody.
        """
        is_full = isinstance(error, StorageFullError) or (
            isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
        )
        is_refusal = isinstance(error, _EXPECTED) and not is_full
        ended = {"outcome": "refused" if is_refusal else "failed", "error": type(error).__name__}
        with contextlib.suppress(AuditError, AuditUnavailableError, StorageFullError):
            self._append(ended)

    def close(self) -> None:
        """Close the trail."""
        if self._trail is not None:
            self._trail.close()

    def _append(self, ended: dict[str, str]) -> None:
        if self._directory is None:
            return
        if self._trail is None:
            self._trail = Trail(self._directory, is_guest=True)
        self._trail.append({**self._line, **ended})
        self._trail.sync()  # commands are rare: theirs need not wait for the next second


def _actor() -> dict[str, str | None]:
    """Who gave the command. Who came by sudo is told as sudo told it."""
    number = os.getuid()
    name = None
    with contextlib.suppress(KeyError):  # of nobody, as is usual in a container
        name = pwd.getpwuid(number).pw_name
    before = os.environ.get("SUDO_USER") if number == 0 else None
    return {"by": f"{BY_COMMAND} {number}", "user": name, "sudo_user": before}


@contextmanager
def telling(
    data_dir: Path | None, action: str, *, at_once: bool = True, **about: object
) -> Iterator[Deed]:
    """Have the audit trail of a data directory tell of what a block does.

    Where there is no data directory nothing is made for the trail's sake. If the block makes one,
    its trail begins with that.

    Args:
        data_dir: Of the gallery; None where there is none, and nothing is told.
        action: What is done.
        at_once: Whether it begins with the block; else with `Deed.begin`.
        about: See `Deed.tell`.

    Raises:
        AuditError: The trail cannot tell that it is about to be done, so nothing was done; or, what
            the message says, not that it was.
        InvalidSettingsError: A variable of the trail has a value that is not allowed.
    """
    deed = Deed(data_dir, action, **about)
    try:
        if at_once and _is_there(data_dir):
            deed.begin()
        try:
            yield deed
        except BaseException as error:
            if _is_there(data_dir):
                deed.fail(error)
            raise
        if _is_there(data_dir):
            deed.end()
    finally:
        deed.close()


def _is_there(data_dir: Path | None) -> bool:
    return data_dir is not None and is_data_dir(data_dir)
