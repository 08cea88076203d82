"""Identities as SQL sees them: what tracklets of one name have in common."""

import json
import sqlite3

from index.gallery import IdentitySummary, NotFoundError

# From the index on identity and camera alone, in its order.
_SUMMARY = (
    "SELECT identity, count(*), json_group_array(DISTINCT camera) FILTER (WHERE camera IS NOT NULL)"
    " FROM tracklets"
)


def summary(connection: sqlite3.Connection, name: str) -> IdentitySummary:
    """What is known of an identity.

    Raises:
        NotFoundError: No tracklet shows it.
    """
    query = f"{_SUMMARY} WHERE identity = ? GROUP BY identity"
    row = connection.execute(query, (name,)).fetchone()
    if row is None:
        raise NotFoundError("no tracklet shows this identity")
    return _read(row)


def summaries(
    connection: sqlite3.Connection, *, after: str | None, limit: int
) -> list[IdentitySummary]:
    """What is known of at most ``limit`` identities, by name, beginning after one."""
    place = "identity IS NOT NULL" if after is None else "identity > ?"
    query = f"{_SUMMARY} WHERE {place} GROUP BY identity ORDER BY identity LIMIT ?"
    values = (limit,) if after is None else (after, limit)
    return [_read(row) for row in connection.execute(query, values).fetchall()]


def exists(connection: sqlite3.Connection, name: str) -> bool:
    """Whether any tracklet shows an identity."""
    query = "SELECT 1 FROM tracklets WHERE identity = ? LIMIT 1"
    return connection.execute(query, (name,)).fetchone() is not None


def _read(row: tuple[str, int, str]) -> IdentitySummary:
    return IdentitySummary(row[0], row[1], tuple(sorted(json.loads(row[2]))))
