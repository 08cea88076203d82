"""Within-class covariance normalisation, in closed form and at the end of a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import make_checkpoint
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.errors import DatasetError, RecipeError
from model.frames import Clip, Preprocessing
from model.network import NetworkConfig, TrackletNet
from model.recipe import load_recipe
from model.within_class import (
    WithinClassConfig,
    discount,
    normalise_head,
    twice_seen,
    within_class_covariance,
)


def test_covariance_of_two_people_by_hand() -> None:
    # Person a: camera means (1, 0) and (3, 0); b: (0, 1), (0, 5) and (0, 3); c: one camera.
    rows = np.array([[0.0, 0], [2, 0], [3, 0], [0, 1], [0, 5], [0, 3], [100, 100]])
    people, cameras = ["a", "a", "a", "b", "b", "b", "c"], ["1", "1", "2", "1", "2", "3", "1"]

    covariance = within_class_covariance(rows, people, cameras)

    # a: (-1, 0), (1, 0); b: (0, -2), (0, 2), (0, 0); 1 + 2 degrees of freedom.
    assert np.allclose(covariance, [[2 / 3, 0], [0, 8 / 3]])


def test_several_frames_of_a_camera_weigh_no_more() -> None:
    once = within_class_covariance(np.array([[0.0], [1]]), ["a", "a"], ["1", "2"])
    often = within_class_covariance(np.array([[0.0], [0], [0], [1]]), ["a"] * 4, list("1112"))

    assert np.allclose(once, often)


def test_nobody_with_two_cameras_is_refused() -> None:
    with pytest.raises(ValueError, match="two cameras"):
        within_class_covariance(np.ones((2, 2)), ["a", "b"], ["1", "2"])


def test_discount_shortens_what_varies_and_lengthens_nothing() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    variances = np.array([0.0, 0.01, 0.5, 1.0])

    changed = discount((rotation * variances) @ rotation.T, ridge=0.01)

    lengths = np.diag(rotation.T @ changed @ rotation)
    assert np.allclose(lengths, [1, 2**-0.5, 51**-0.5, 101**-0.5])
    assert np.allclose(changed, changed.T)
    # With a small ridge the covariance of what varies becomes nearly the same in every direction.
    small = discount(np.diag([0.5, 1.0]), ridge=1e-9)
    assert np.allclose(small @ np.diag([0.5, 1.0]) @ small, 1e-9 * np.eye(2))


def test_no_variance_changes_nothing() -> None:
    assert np.array_equal(discount(np.zeros((3, 3)), 0.01), np.eye(3))


@pytest.mark.parametrize(
    ("field", "value"), [("ridge", 0.0), ("ridge", 1.5), ("ridge", float("nan")), ("frames", 0)]
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        WithinClassConfig(**{field: value})  # type: ignore[arg-type]


def tracklet(identity: str, camera: str, frames: int = 1) -> Tracklet:
    paths = tuple(Path(f"/{identity}/{camera}/{n}.png") for n in range(frames))
    return Tracklet(identity=identity, camera=camera, name="", frames=paths)


def test_people_are_sorted_by_part_and_those_of_one_camera_left_out() -> None:
    seen = [
        tracklet("x/a", "x/1"),
        tracklet("x/a", "x/2"),
        tracklet("y/a", "y/1"),
        tracklet("y/a", "y/1"),
        tracklet("x/b", "x/1"),
    ]

    assert twice_seen(seen) == {"x": seen[:2]}
    assert twice_seen([tracklet("a", "1"), tracklet("a", "2")]).keys() == {""}
    with pytest.raises(DatasetError, match="at least two cameras saw, got 2 identities"):
        twice_seen(seen[2:])


SIZE = Preprocessing(height=64, width=32)
SMALL = NetworkConfig(backbone="conv5", head=32, unit=True)
TINTS = {"1": (1.0, 1.0, 1.0), "2": (0.5, 0.8, 1.2)}


def shot(one: Tracklet, number: int) -> Clip:
    """A person is two colours in noise, a camera a tint."""
    person, camera = ord(one.identity[-1]), one.camera[-1]
    colours = np.random.default_rng(person).uniform(30, 200, size=(2, 1, 1, 3))
    noise = np.random.default_rng([person, ord(camera), number]).normal(0, 12, size=(2, 32, 32, 3))
    return ((colours + noise) * TINTS[camera]).clip(0, 255).astype(np.uint8).reshape(64, 32, 3)


def apart(network: TrackletNet, people: str) -> float:
    """Mean squared distance between cameras of a person, by that between persons of a camera."""
    embedder = Embedder(make_checkpoint(network, SIZE, {}), device="cpu", precision="fp32")
    made = np.array(
        [
            [embedder.embed([shot(tracklet(one, camera), 0)[None]])[0].embedding for camera in "12"]
            for one in people
        ]
    )  # (people, 2, D)
    within = np.square(made[:, 0] - made[:, 1]).sum(-1).mean()
    between = np.square(made[:-1] - made[1:]).sum(-1).mean()
    return float(within / between)


@pytest.fixture
def network() -> TrackletNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return TrackletNet(SMALL).eval()


def test_folded_into_the_head_it_helps_people_it_was_not_learned_from(
    network: TrackletNet,
) -> None:
    seen = [tracklet(one, camera, frames=5) for one in "abcdefgh" for camera in "12"]
    before = apart(network, "ijklmnop")
    told: list[tuple[int, int]] = []
    embedder = Embedder(make_checkpoint(network, SIZE, {}), device="cpu", precision="fp32")

    people = normalise_head(
        network,
        embedder,
        seen,
        WithinClassConfig(ridge=0.01, frames=3),
        shot,
        lambda done, total: told.append((done, total)),
    )

    assert people == {"": 8}
    assert told[-1] == (48, 48)
    assert apart(network, "ijklmnop") < 0.5 * before


def test_parts_count_the_same_however_many_people_they_have(network: TrackletNet) -> None:
    """The head is that of the mean of the parts' covariances."""
    few = [tracklet("x/a", camera) for camera in ("x/1", "x/2")]
    many = [tracklet(f"y/{one}", camera) for one in "bcd" for camera in ("y/1", "y/2")]
    embedder = Embedder(make_checkpoint(network, SIZE, {}), device="cpu", precision="fp32")
    before = network.state_dict()["head.weight"].double().numpy().copy()

    people = normalise_head(network, embedder, [*few, *many], WithinClassConfig(), shot)

    covariances = []
    for part in (few, many):
        rows = np.stack([embedder.embed([shot(one, 0)[None]])[0].embedding for one in part])
        names = [one.identity for one in part]
        covariances.append(
            within_class_covariance(rows.astype(float), names, [one.camera for one in part])
        )
    expected = discount((covariances[0] + covariances[1]) / 2, 0.1) @ before
    assert people == {"x": 1, "y": 3}
    after = network.state_dict()["head.weight"].numpy()
    assert np.allclose(after, expected, atol=1e-5)


def test_a_network_without_a_head_is_refused() -> None:
    bare = TrackletNet(replace(SMALL, head=0)).eval()
    embedder = Embedder(make_checkpoint(bare, SIZE, {}), device="cpu", precision="fp32")

    with pytest.raises(ValueError, match="head"):
        normalise_head(bare, embedder, [], WithinClassConfig(), shot)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["within_class.ridge=0.01"], "a network with a head and without a neck"),
        (
            ["within_class.ridge=0.01", "network.head=8", "network.neck=true"],
            "a network with a head and without a neck",
        ),
        (["network.head=8", "optimiser.epochs=0"], r"or a table \[within_class\], got 0"),
        (["network.head=8", "within_class.ridge=2"], "ridge: expected a share"),
        (["network.head=8", "within_class.rigde=0.1"], "unknown key 'within_class.rigde'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("folder", settings)
