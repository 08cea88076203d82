"""Which rows pass a filter, against asking each row."""

import numpy as np
import pytest

from index.columns import Columns
from index.gallery import Filters

ROWS = 400


@pytest.fixture
def columns() -> Columns:
    """Row i shows identity i % 41 at camera i % 23; every seventh has neither."""
    made = Columns()
    identities = [None if row % 7 == 0 else f"p{row % 41}" for row in range(ROWS)]
    cameras = [None if row % 7 == 0 else f"c{row % 23}" for row in range(ROWS)]
    made.append(range(1, ROWS + 1), identities, cameras, [None] * ROWS)
    return made


@pytest.mark.parametrize("chosen", [0, 1, 8, 9, 20])
def test_few_names_and_many_are_found_alike(columns: Columns, chosen: int) -> None:
    numbers = set(range(chosen))
    names = frozenset(f"c{number}" for number in numbers) | {"nowhere"}
    has_camera = np.arange(ROWS) % 7 != 0
    at = np.array([row % 23 in numbers for row in range(ROWS)]) & has_camera

    assert columns.mask(Filters(cameras=names)).tolist() == at.tolist()
    assert columns.mask(Filters(exclude_cameras=names)).tolist() == (~at).tolist()


@pytest.mark.parametrize("chosen", [1, 30])
def test_many_identities_are_found_like_few(columns: Columns, chosen: int) -> None:
    names = frozenset(f"p{number}" for number in range(chosen))
    expected = [row % 7 != 0 and row % 41 < chosen for row in range(ROWS)]

    assert columns.mask(Filters(identities=names)).tolist() == expected
