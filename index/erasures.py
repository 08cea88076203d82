"""The ledger of erasures: what an old backup must not bring back, without saying what it was.

An entry is a salted hash of a tracklet's id, or of an identity's name, and the time of the erasure.
Whoever holds the ledger can tell whether an id that they already know was erased; nobody can read
ids or names from it. (Who guesses a name can confirm it: the salts are in the ledger.)
"""

import hmac
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol, get_args

Kind = Literal["tracklet", "identity"]
SALT_BYTES = 32
_VERSION = 1
_EVER = datetime.min.replace(tzinfo=UTC)


def digest(salt: bytes, kind: Kind, name: str) -> bytes:
    """What a ledger keeps of a tracklet's id or an identity's name, 32 bytes.

    Args:
        salt: Secret to nobody who has the ledger, but another one in each gallery.
        kind: What ``name`` names.
        name: The id or the name.
    """
    return hmac.digest(salt, f"{kind}:{name}".encode(), "sha256")


class Erasable(Protocol):
    """What has to be known of a tracklet to judge it; a `index.gallery.TrackletRecord` is one."""

    @property
    def tracklet_id(self) -> str:
        """Its id."""

    @property
    def identity(self) -> str | None:
        """Who it shows, or None."""

    @property
    def created_at(self) -> datetime:
        """When it was enrolled, timezone-aware."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """One entry: something was erased.

    Args:
        digest: See `digest`.
        kind: Whether it was a tracklet, or an identity with all its tracklets.
        erased_at: When, timezone-aware UTC.
        salt: That ``digest`` was made with.
    """

    digest: bytes
    kind: Kind
    erased_at: datetime
    salt: bytes


@dataclass(frozen=True)
class Erasures:
    """A ledger, or a part of one.

    Args:
        entries: In no order; of one digest and kind the latest counts.
    """

    entries: tuple[Erasure, ...] = ()

    def bans(self, tracklet: Erasable) -> bool:
        """Whether a tracklet was erased after it was enrolled, by its id or with its identity.

        What was enrolled again after the erasure is not banned. A tracklet that was there before an
        identity was erased, and is given that name afterwards, is.
        """
        names: dict[Kind, str | None] = {
            "tracklet": tracklet.tracklet_id,
            "identity": tracklet.identity,
        }
        return any(
            erased_at is not None and erased_at >= tracklet.created_at
            for salt, times in self._times.items()
            for kind, name in names.items()
            if name is not None
            for erased_at in [times.get((digest(salt, kind, name), kind))]
        )

    def without(self, known: "Erasures") -> "Erasures":
        """The entries that are not in another ledger, or only with an earlier time."""
        times = {(one.digest, one.kind): one.erased_at for one in known.entries}
        return Erasures(
            tuple(
                one
                for one in self.entries
                if times.get((one.digest, one.kind), _EVER) < one.erased_at
            )
        )

    def to_json(self) -> str:
        """The ledger as text, for `from_json`."""
        entries = [
            {
                "digest": one.digest.hex(),
                "kind": one.kind,
                "erased_at": one.erased_at.isoformat(),
                "salt": one.salt.hex(),
            }
            for one in self.entries
        ]
        return json.dumps(
            {"version": _VERSION, "erasures": entries, "checksum": _checksum_of(entries)}
        )

    @classmethod
    def from_json(cls, text: str) -> "Erasures":
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is anything else, or not as it was written.
        """
        try:
            found = json.loads(text)
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']!r}")
            # Those of older versions have none.
            if "checksum" in found and found["checksum"] != _checksum_of(found["erasures"]):
                raise ValueError("another checksum than it says: it is damaged")
            return cls(tuple(_read(one) for one in found["erasures"]))
        except (ValueError, KeyError, TypeError) as error:
            message = f"expected a ledger of erasures of version {_VERSION}, got {error!r}"
            raise ValueError(message) from error

    @cached_property
    def _times(self) -> Mapping[bytes, Mapping[tuple[bytes, Kind], datetime]]:
        """By salt, the latest erasure of each digest and kind."""
        times: dict[bytes, dict[tuple[bytes, Kind], datetime]] = defaultdict(dict)
        for one in self.entries:
            known = times[one.salt].get((one.digest, one.kind), one.erased_at)
            times[one.salt][one.digest, one.kind] = max(known, one.erased_at)
        return times


def _checksum_of(entries: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of entries as compact JSON with sorted keys."""
    text = json.dumps(entries, separators=(",", ":"), sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _read(entry: Mapping[str, str]) -> Erasure:
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    erased_at = datetime.fromisoformat(entry["erased_at"])
    if erased_at.tzinfo is None:
        raise ValueError("a time without an offset")
    salt = bytes.fromhex(entry["salt"])
    return Erasure(bytes.fromhex(entry["digest"]), kinds[entry["kind"]], erased_at, salt)
