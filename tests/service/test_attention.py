"""Maps on the contract's grid."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.attention import to_contract_grid


def test_a_map_of_the_contracts_size_stays_as_it_is() -> None:
    maps = np.random.default_rng(0).random((3, 16, 8)).astype(np.float32)

    assert to_contract_grid(maps) == pytest.approx(maps)


def test_a_cell_of_half_the_size_becomes_four_quarters_of_itself() -> None:
    """The bundled weights take frames of 128x64 pixels, which have 8x4 cells."""
    maps = np.random.default_rng(0).random((2, 8, 4)).astype(np.float32)

    assert to_contract_grid(maps) == pytest.approx(maps.repeat(2, 1).repeat(2, 2) / 4)


@pytest.mark.parametrize("size", [(1, 1), (4, 2), (12, 6), (24, 12), (16, 16), (7, 5)])
def test_a_map_keeps_its_sum_and_where_it_looks(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).random((3, *size)).astype(np.float32)
    maps /= maps.sum(axis=(1, 2), keepdims=True)

    spread = to_contract_grid(maps)

    assert spread.shape == (3, 16, 8)
    assert spread.sum(axis=(1, 2)) == pytest.approx(np.ones(3))
    # As near as cells of the contract's size can say.
    assert centre(spread) == pytest.approx(centre(maps), abs=0.02)


def centre(maps: NDArray[Any]) -> NDArray[np.float64]:
    """(T, 2): where the weight of each map lies, shares of height and width."""
    rows = (np.arange(maps.shape[1]) + 0.5) / maps.shape[1]
    columns = (np.arange(maps.shape[2]) + 0.5) / maps.shape[2]
    return np.stack([maps.sum(axis=2) @ rows, maps.sum(axis=1) @ columns], axis=1)
