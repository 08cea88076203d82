"""The packing of weights: a shorter head keeps what distances there are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.bundle import read_stages, shorten_head
from model.checkpoint import Checkpoint, make_checkpoint
from model.embedder import Embedder
from model.frames import Preprocessing, read_frame
from model.network import NetworkConfig, TrackletNet
from model.runs import RunFolder

SIZE = Preprocessing(height=64, width=32)


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
        small.resize((32, 64)).save(path)
    return paths


def trained(rank: int) -> Checkpoint:
    """A head of 24 numbers that fill no more than ``rank`` dimensions."""
    torch.manual_seed(0)
    network = TrackletNet(NetworkConfig(backbone="conv5", head=24, unit=True))
    low = torch.randn(24, rank) @ torch.randn(rank, 256)
    network.load_state_dict(network.state_dict() | {"head.weight": low})
    return make_checkpoint(network, SIZE, {"steps": 3})


def distances(checkpoint: Checkpoint, frames: list[Path]) -> NDArray[np.float32]:
    clips = [read_frame(path, SIZE)[None] for path in frames]
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    made = np.stack([one.embedding for one in embedder.embed(clips)])
    return np.asarray(np.linalg.norm(made[:, None] - made[None], axis=2), np.float32)


def test_a_head_without_what_is_empty_keeps_every_distance(frames: list[Path]) -> None:
    before = trained(rank=6)

    after, kept = shorten_head(before, frames, dim=8)

    assert after.network.dim == 8
    assert kept == pytest.approx(1)
    assert distances(after, frames) == pytest.approx(distances(before, frames), abs=1e-4)
    packed = {"dim": 8, "of": 24, "squared_length_kept": 1.0}
    assert after.provenance == {**before.provenance, "packed": packed}


def test_what_is_left_out_is_told(frames: list[Path]) -> None:
    _, kept = shorten_head(trained(rank=20), frames, dim=2)

    assert 0.1 < kept < 0.999


def test_stages_follow_one_another_in_time(tmp_path: Path) -> None:
    for name, times in (("one", (10.0, 20.0)), ("two", (5.0, 7.0))):
        (tmp_path / name).mkdir()
        for step, time_s in enumerate(times):
            RunFolder(tmp_path / name).log({"step": step, "time_s": time_s, "loss": 0.123456789})

    rows = read_stages([tmp_path / "one", tmp_path / "two"])

    assert [(row["stage"], row["time_s"]) for row in rows] == [(1, 10), (1, 20), (2, 25), (2, 27)]
    assert rows[0]["loss"] == 0.12346
