"""What SQLite leaves of erased rows in the unused parts of its pages, and how it is overwritten.

``secure_delete`` overwrites a row where it is erased. But when SQLite moves rows between the pages
of a B-tree, it does not overwrite the places that they leave; so something of a row that has moved
once may outlive it, in the gap between the list of a page's cells and the cells. About one row in
a hundred does. `VACUUM` removes such traces, and copies all vectors to do so.

Here the gaps are overwritten in the file itself. It means nothing to SQLite, and a crash on the way
leaves some gaps as they were. The layout of pages is that of https://www.sqlite.org/fileformat2.html
(1.6), which no version of SQLite 3 may change.
"""

import os
import sqlite3
import struct
from typing import NamedTuple

_FILE_HEADER_BYTES = 100  # before the first page's own header
_RESERVED_BYTES_AT = 20
_INTERIOR_INDEX, _INTERIOR_TABLE, _LEAF_INDEX, _LEAF_TABLE = 2, 5, 10, 13
# What a page and those below it may be.
_FAMILIES = (
    frozenset({_INTERIOR_INDEX, _LEAF_INDEX}),
    frozenset({_INTERIOR_TABLE, _LEAF_TABLE}),
)
_HEADER = struct.Struct(">BHHH")  # type, first free block, cells, where the cells begin


class UnknownLayoutError(Exception):
    """Raised when a file is not laid out as expected; nothing was written."""


class _Shape(NamedTuple):
    """How many pages a file has, how long each is, and how much of it is used."""

    pages: int
    page_bytes: int
    usable_bytes: int


class _Page(NamedTuple):
    kind: int
    gap: tuple[int, int]
    children: tuple[int, ...]


def scrub(connection: sqlite3.Connection, file: int) -> int:
    """Overwrite the gaps of all pages with zeros; returns how many were not so before.

    Args:
        connection: In a write transaction that has changed nothing, with an empty write-ahead log:
            so the file is all there is, and nobody changes it. Other connections may read.
        file: A descriptor of the same file, for reading and writing. Closing one in the process
            where the file is open makes the system forget SQLite's locks: close it last.

    Raises:
        UnknownLayoutError: A page is not what it should be; nothing was written.
        OSError: The file cannot be read or written.
    """
    [page_bytes] = connection.execute("PRAGMA page_size").fetchone()
    roots = connection.execute("SELECT rootpage FROM sqlite_master WHERE rootpage > 0").fetchall()
    [reserved] = os.pread(file, 1, _RESERVED_BYTES_AT)
    shape = _Shape(os.fstat(file).st_size // page_bytes, page_bytes, page_bytes - reserved)
    traces: list[tuple[int, int]] = []
    for root in (1, *(number for (number,) in roots)):
        traces += _traces(file, root, shape)
    for start, length in traces:
        os.pwrite(file, bytes(length), start)
    if traces:
        os.fsync(file)
    return len(traces)


def _traces(file: int, root: int, shape: _Shape) -> list[tuple[int, int]]:
    """Where gaps of a tree hold anything, as offsets in the file and lengths."""
    found, seen, waiting = [], 0, [root]
    family: frozenset[int] | None = None
    while waiting:
        number, seen = waiting.pop(), seen + 1
        if not 1 <= number <= shape.pages or seen > shape.pages:
            raise UnknownLayoutError(f"expected trees of {shape.pages} pages, got page {number}")
        place = (number - 1) * shape.page_bytes
        content = os.pread(file, shape.page_bytes, place)
        page = _read(content, _FILE_HEADER_BYTES if number == 1 else 0, shape.usable_bytes)
        family = family or next((one for one in _FAMILIES if page.kind in one), frozenset())
        if page.kind not in family:
            raise UnknownLayoutError(f"expected page {number} of a tree, got kind {page.kind}")
        start, end = page.gap
        if content.count(0, start, end) < end - start:
            found.append((place + start, end - start))
        waiting += page.children
    return found


def _read(content: bytes, header: int, usable_bytes: int) -> _Page:
    kind, _, cells, begin = _HEADER.unpack_from(content, header)
    is_interior = kind in {_INTERIOR_INDEX, _INTERIOR_TABLE}
    pointers = header + (12 if is_interior else 8)
    gap = (pointers + 2 * cells, begin or 65536)  # two bytes cannot say 65536
    if not gap[0] <= gap[1] <= usable_bytes:
        raise UnknownLayoutError(f"expected a page of a tree, got {cells} cells from {begin} on")
    if not is_interior:
        return _Page(kind, gap, ())
    last = struct.unpack_from(">I", content, header + 8)
    places = struct.unpack_from(f">{cells}H", content, pointers)
    if any(place > usable_bytes - 4 for place in places):
        raise UnknownLayoutError("expected cells within their page, got one beyond")
    others = (struct.unpack_from(">I", content, place)[0] for place in places)
    return _Page(kind, gap, (*others, *last))
