"""Attention as the contract tells it: on one grid, whatever size the network's own maps have."""

import numpy as np
from numpy.typing import NDArray

# What a frame of 256x128 pixels has, the paper's size; one of 128x64 has 8x4 cells.
ROWS, COLUMNS = 16, 8


def to_contract_grid(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spread each map over the cells of the contract's grid by the area that they share.

    Args:
        maps: (T, h, w), each sums to 1.

    Returns:
        (T, 16, 8), each sums to what it did; maps of that size stay as they are.
    """
    rows, columns = _shares(maps.shape[1], ROWS), _shares(maps.shape[2], COLUMNS)
    spread: NDArray[np.float64] = rows @ maps.astype(np.float64) @ columns.T
    return spread


def _shares(cells: int, wanted: int) -> NDArray[np.float64]:
    """(wanted, cells): which share of each cell lies in each of the wanted ones along one side."""
    ends = np.arange(1, cells + 1) / cells
    wanted_ends = np.arange(1, wanted + 1)[:, None] / wanted
    overlap = np.minimum(ends, wanted_ends) - np.maximum(ends - 1 / cells, wanted_ends - 1 / wanted)
    shares: NDArray[np.float64] = np.maximum(overlap, 0) * cells
    return shares
