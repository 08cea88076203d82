"""What memory knows of each row besides its vector: enough to filter and to group."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from index.gallery import Filters
from index.ranking import Rows
from index.rows import to_microseconds

_NONE = -1
_UNKNOWN = -2
_FEW_NAMES = 8
_NO_TIME = np.iinfo(np.int64).min
_ROW = np.dtype(
    [
        ("key", np.int64),
        ("start", np.int64),
        ("identity", np.int32),
        ("camera", np.int32),
        ("alive", np.bool_),
    ],
    align=True,
)


class Columns:
    """One entry a row, in order of keys. An entry's place is its *slot*.

    Slots are what FAISS knows rows by. A removed row keeps its slot, dead, until `compact`, so the
    other rows keep theirs. Names are held as numbers. Not thread-safe.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(64, dtype=_ROW)
        self._used = 0
        self._alive = 0
        self._identities = _Names()
        self._cameras = _Names()

    @property
    def alive(self) -> int:
        """How many rows there are."""
        return self._alive

    @property
    def dead(self) -> int:
        """How many slots have lost their row."""
        return self._used - self._alive

    @property
    def keys(self) -> Rows:
        """The key of each slot, (N,) int64, ascending."""
        keys: Rows = self._rows["key"]
        return keys

    def append(
        self,
        keys: Sequence[int],
        identities: Iterable[str | None],
        cameras: Iterable[str | None],
        start_times: Iterable[int | None],
    ) -> Rows:
        """Add rows whose keys are greater than all before; returns their slots, (n,) int64."""
        start, end = self._used, self._used + len(keys)
        if end > len(self._buffer):
            larger = np.empty(max(end, 2 * len(self._buffer)), dtype=_ROW)
            larger[:start] = self._rows
            self._buffer = larger
        new = self._buffer[start:end]
        new["key"] = keys
        new["identity"] = self._identities.take(identities)
        new["camera"] = self._cameras.take(cameras)
        new["start"] = [_NO_TIME if time is None else time for time in start_times]
        new["alive"] = True
        self._used = end
        self._alive += len(keys)
        return np.arange(start, end, dtype=np.int64)

    def slot(self, key: int) -> int:
        """Where the row with a key is.

        Raises:
            KeyError: There is no such row.
        """
        slot = int(np.searchsorted(self.keys, key))
        if slot == self._used or self._rows[slot]["key"] != key or not self._rows[slot]["alive"]:
            raise KeyError(key)
        return slot

    def living(self, keys: Sequence[int]) -> Rows:
        """Where the rows with keys are, (n,) int64, in their order.

        Raises:
            KeyError: One of them is not there.
        """
        wanted = np.array(keys, dtype=np.int64)
        slots: Rows = np.searchsorted(self.keys, wanted)
        if (slots == self._used).any():
            raise KeyError("expected keys of rows, got one beyond the last")
        rows = self._rows[slots]
        if not (rows["alive"] & (rows["key"] == wanted)).all():
            raise KeyError("expected keys of rows, got one that no row has")
        return slots

    def slots(self, keys: Sequence[int]) -> Rows:
        """Where rows with keys are, (n,) int64; keys that no row has are left out."""
        found: Rows = np.searchsorted(self.keys, np.array(keys, dtype=np.int64))
        found = found[found < self._used]
        return found[np.isin(self.keys[found], keys)]

    def update(
        self, slot: int, identity: str | None, camera: str | None, start_time: int | None
    ) -> None:
        """Replace what is known of a row."""
        row = self._rows[slot]
        before = row["identity"].copy(), row["camera"].copy()
        [row["identity"]], [row["camera"]] = (
            self._identities.take([identity]),
            self._cameras.take([camera]),
        )
        self._identities.release(before[0])
        self._cameras.release(before[1])
        row["start"] = _NO_TIME if start_time is None else start_time

    def name(self, slots: Rows, identity: str | None) -> None:
        """Replace whom rows show.

        Args:
            slots: (n,) int64.
            identity: Who it is, or None.
        """
        before = self._rows["identity"][slots]
        self._rows["identity"][slots] = self._identities.take([identity] * len(slots))
        self._identities.release(before)

    def bury(self, slots: Rows) -> None:
        """Take rows away; their slots stay, dead.

        Args:
            slots: (n,) int64, each once.
        """
        self._rows["alive"][slots] = False
        self._alive -= len(slots)
        self._identities.release(self._rows["identity"][slots])
        self._cameras.release(self._rows["camera"][slots])

    def compact(self) -> None:
        """Close the gaps that dead slots leave; the others move up in order."""
        kept = self._rows[self._rows["alive"]]
        self._buffer = kept
        self._used = len(kept)

    def agree(
        self,
        slots: Rows,
        identities: Iterable[str | None],
        cameras: Iterable[str | None],
        start_times: Iterable[int | None],
    ) -> bool:
        """Whether this is what is known of rows; as many of each as there are slots."""
        rows = self._rows[slots]
        expected = (
            ("identity", [self._identities.known(identity) for identity in identities]),
            ("camera", [self._cameras.known(camera) for camera in cameras]),
            ("start", [_NO_TIME if time is None else time for time in start_times]),
        )
        return all(rows[name].tolist() == values for name, values in expected)

    def mask(self, filters: Filters) -> NDArray[np.bool_]:
        """Which slots hold a row that passes.

        Args:
            filters: All but ``exclude_tracklets``, whose names are not kept here.

        Returns:
            (N,) bool.
        """
        rows = self._rows
        mask: NDArray[np.bool_] = rows["alive"].copy()
        if filters.identities is not None:
            mask &= _among(rows["identity"], self._identities, filters.identities)
        if filters.unnamed:
            mask &= rows["identity"] == _NONE
        if filters.cameras is not None:
            mask &= _among(rows["camera"], self._cameras, filters.cameras)
        if filters.exclude_cameras:
            mask &= ~_among(rows["camera"], self._cameras, filters.exclude_cameras)
        if filters.since is not None:
            mask &= rows["start"] >= to_microseconds(filters.since)
        if filters.until is not None:
            mask &= rows["start"] <= to_microseconds(filters.until)
            mask &= rows["start"] != _NO_TIME
        return mask

    def groups(self, slots: Rows) -> Rows:
        """A number for who each row shows, (n,) int64; rows without an identity have their own."""
        identities = self._rows["identity"][slots].astype(np.int64)
        return np.where(identities == _NONE, -1 - slots, identities)

    def identities(self) -> int:
        """How many distinct identities there are."""
        rows = self._rows
        named = rows["identity"][rows["alive"] & (rows["identity"] != _NONE)]
        return int(np.count_nonzero(np.bincount(named)))

    def unnamed(self) -> int:
        """How many rows have no identity."""
        return int(np.count_nonzero(self._rows["alive"] & (self._rows["identity"] == _NONE)))

    @property
    def _rows(self) -> NDArray[np.void]:
        return self._buffer[: self._used]


class _Names:
    """Names as numbers: each as long as a row has it, so that what was erased is nowhere named.

    A number is not used twice: dead slots keep theirs.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._rows = np.zeros(64, dtype=np.int64)  # how many have it, by number
        self.made = 0
        """How many numbers there ever were."""

    def take(self, names: Iterable[str | None]) -> NDArray[np.int32]:
        """The numbers of the names of rows that come, (n,) int32."""
        taken = np.array([self._code(name) for name in names], dtype=np.int32)
        np.add.at(self._rows, taken[taken != _NONE], 1)
        return taken

    def release(self, taken: NDArray[np.int32]) -> None:
        """Forget the names that no row has any more, after some have lost theirs."""
        lost = taken[taken != _NONE]
        np.subtract.at(self._rows, lost, 1)
        for code in set(lost[self._rows[lost] == 0].tolist()):
            del self.codes[self._names.pop(code)]

    def known(self, name: str | None) -> int:
        """The number of a name, or one that no row has."""
        return _NONE if name is None else self.codes.get(name, _UNKNOWN)

    def _code(self, name: str | None) -> int:
        if name is None:
            return _NONE
        code = self.codes.setdefault(name, self.made)
        if code == self.made:
            self._names[code] = name
            self.made += 1
            if self.made > len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        return code


def _among(column: NDArray[np.int32], known: _Names, names: Iterable[str]) -> NDArray[np.bool_]:
    chosen = [known.codes[name] for name in names if name in known.codes]
    if len(chosen) <= _FEW_NAMES:  # twenty times as fast as `numpy.isin`
        mask = np.zeros(len(column), dtype=np.bool_)
        for code in chosen:
            mask |= column == code
        return mask
    is_chosen = np.zeros(known.made + 1, dtype=np.bool_)  # the last is for `_NONE`
    is_chosen[chosen] = True
    among: NDArray[np.bool_] = is_chosen[column]
    return among
