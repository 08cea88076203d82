"""One file with weights, configuration, preprocessing and a fingerprint that is checked."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    Checkpoint,
    backbone_checkpoint,
    fingerprint,
    load_checkpoint,
    make_checkpoint,
    save_checkpoint,
    untrained_checkpoint,
)
from model.errors import CheckpointError
from model.frames import Preprocessing
from model.network import NetworkConfig, build_backbone


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return untrained_checkpoint(seed=0)


@pytest.fixture
def backbone_state() -> dict[str, torch.Tensor]:
    """A torchvision-named state dict with its classifier."""
    state = {name: tensor.clone() for name, tensor in build_backbone().state_dict().items()}
    return {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_a_saved_checkpoint_comes_back_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "net.safetensors"
    config = NetworkConfig(attention="l1", temperature=2.5, pool="mean")
    checkpoint.network.config = config
    other = make_checkpoint(checkpoint.network, Preprocessing(height=128), {"note": "a test"})

    saved = save_checkpoint(other, path)
    loaded = load_checkpoint(path)

    assert saved.fingerprint == loaded.fingerprint == other.fingerprint
    assert loaded.network.config == config
    assert loaded.preprocessing == Preprocessing(height=128)
    assert loaded.provenance == {"note": "a test"}
    weights = checkpoint.network.state_dict()
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    checkpoint.network.config = NetworkConfig()


def test_a_checkpoint_may_be_read_by_others_as_the_umask_says(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A container's user reads a file that another user made and mounted."""
    before = os.umask(0o022)
    try:
        save_checkpoint(checkpoint, tmp_path / "net.safetensors")
    finally:
        os.umask(before)

    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o644


def test_half_precision_halves_the_file_and_names_another_model(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole = save_checkpoint(checkpoint, tmp_path / "fp32.safetensors")
    half = save_checkpoint(checkpoint, tmp_path / "fp16.safetensors", precision="fp16")

    assert half.fingerprint != whole.fingerprint
    assert (tmp_path / "fp16.safetensors").stat().st_size < 48_000_000
    assert next(half.network.parameters()).dtype == torch.float32


def test_untrained_weights_follow_their_seed_and_leave_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()

    first, again, other = (untrained_checkpoint(seed).fingerprint for seed in (1, 1, 2))

    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_everything_that_shapes_an_embedding_changes_the_fingerprint(
    checkpoint: Checkpoint,
) -> None:
    base = make_checkpoint(checkpoint.network)
    names = {base.fingerprint}
    names.add(
        make_checkpoint(checkpoint.network, Preprocessing(interpolation="bicubic")).fingerprint
    )
    bias = checkpoint.network.backbone.get_parameter("bn1.bias")
    with torch.no_grad():
        bias[0] += 1
        names.add(make_checkpoint(checkpoint.network).fingerprint)
        bias[0] -= 1

    assert len(names) == 3
    assert make_checkpoint(checkpoint.network, provenance={"x": 1}).fingerprint in names
    assert base.fingerprint.startswith("trsa-")
    assert len(base.fingerprint) == len("trsa-") + 12


def test_what_came_later_names_a_model_only_where_it_is_used() -> None:
    """The literal is of the weights below before there was a head, a temporal or a unit."""
    state = {"backbone.conv1.weight": torch.arange(4.0)}

    def name(**config: Any) -> str:
        return fingerprint(state, NetworkConfig(**config), Preprocessing())

    assert name() == name(head=0, temporal="mean", unit=False) == "trsa-a13cff5b9c8d"
    assert len({name(), name(head=8), name(temporal="agreement"), name(unit=True)}) == 4


def test_a_head_a_pooling_and_unit_length_come_back_with_the_file(tmp_path: Path) -> None:
    config = NetworkConfig(backbone="conv5", head=8, temporal="agreement", unit=True)
    saved = save_checkpoint(untrained_checkpoint(0, config), tmp_path / "net.safetensors")

    loaded = load_checkpoint(tmp_path / "net.safetensors")

    assert loaded.network.config == config
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.network.dim == 8
    pixels = torch.randn(1, 3, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.network(pixels), saved.network(pixels))


def test_damage_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(checkpoint, path)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x01
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"damaged|NaN"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not weights at all"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        load_checkpoint(path)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing at"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_weights_without_a_header_are_sent_to_init(
    backbone_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(backbone_state, tmp_path / "resnet.safetensors")

    with pytest.raises(CheckpointError, match="passerby init"):
        load_checkpoint(tmp_path / "resnet.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_torchvision_state_dict_becomes_a_checkpoint(
    backbone_state: dict[str, torch.Tensor], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"resnet{suffix}"
    if suffix == ".pth":
        torch.save(backbone_state, path)
    else:
        save_file(backbone_state, path)

    checkpoint = backbone_checkpoint(path)

    for name, tensor in checkpoint.network.backbone.state_dict().items():
        assert torch.equal(tensor, backbone_state[name]), name
    assert checkpoint.provenance["backbone"] == path.name


def test_another_network_is_refused_by_name(
    backbone_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    del backbone_state["layer3.5.conv1.weight"]
    backbone_state["extra"] = torch.zeros(1)
    save_file(backbone_state, tmp_path / "net.safetensors")

    with pytest.raises(
        CheckpointError, match=r"layer3\.5\.conv1\.weight is missing.*extra is unknown"
    ):
        backbone_checkpoint(tmp_path / "net.safetensors")


def test_weights_that_are_not_finite_are_refused(
    backbone_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    backbone_state["conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(backbone_state, tmp_path / "net.safetensors")

    with pytest.raises(CheckpointError, match="NaN"):
        backbone_checkpoint(tmp_path / "net.safetensors")


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").write_bytes(pickle.dumps({"conv1.weight": _Bomb()}, protocol=2))

    with pytest.raises(CheckpointError, match="nothing but tensors"):
        backbone_checkpoint(tmp_path / "net.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_failed_write_leaves_the_old_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")

    with pytest.raises(CheckpointError, match="could not write"):
        save_checkpoint(checkpoint, blocked / "net.safetensors")
    assert blocked.read_text() == "not a folder"


def test_the_file_holds_plain_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "net.safetensors")

    assert load_file(tmp_path / "net.safetensors").keys() == checkpoint.network.state_dict().keys()
