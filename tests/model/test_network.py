"""Eq. 1-3 and the temporal average, against closed forms (paper/review.md, 3.8, tests 1 to 5)."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.errors import InvalidFramesError
from model.network import (
    NetworkConfig,
    SpatialAttention,
    TrackletNet,
    build_backbone,
    pool_cells,
    pool_frames,
)

READINGS = [
    SpatialAttention("std"),
    SpatialAttention(1.0),
    SpatialAttention(attention="mean"),
    SpatialAttention(attention="l1"),
    SpatialAttention(attention="none"),
]


@pytest.fixture
def features() -> torch.Tensor:
    """(2, 64, 16, 8), non-negative like what a ReLU leaves."""
    return torch.randn(2, 64, 16, 8, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture(scope="module")
def network() -> TrackletNet:
    """A seeded network in eval mode; small inputs keep it quick."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TrackletNet().eval()


def clips(tracklets: int, frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tracklets, frames, 3, 64, 32, generator=generator)


def test_the_backbone_has_the_size_and_the_cost_of_the_paper() -> None:
    """23,508,032 parameters; 256x128 in, 2048 x 16 x 8 out, for 4.053 GMAC."""
    backbone = build_backbone().to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        out = backbone(torch.empty(1, 3, 256, 128, device="meta"))

    assert sum(parameter.numel() for parameter in backbone.parameters()) == 23_508_032
    assert tuple(out.shape) == (1, 2048, 16, 8)
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.053, abs=5e-4)


def test_eq_1_sums_channels() -> None:
    """For f = 1, R is C; one cell with R + ln 2 then takes 2/129 of the printed softmax."""
    features = torch.ones(1, 64, 16, 8)
    features[0, 0, 3, 4] += math.log(2)

    attention = SpatialAttention(1.0)(features)

    assert attention[0, 3, 4].item() == pytest.approx(2 / 129, rel=1e-4)
    assert attention[0, 0, 0].item() == pytest.approx(1 / 129, rel=1e-4)


def test_l1_gives_a_doubled_cell_twice_the_weight() -> None:
    features = torch.ones(1, 64, 16, 8)
    features[0, :, 3, 4] = 2

    attention = SpatialAttention(attention="l1")(features)

    assert attention[0, 3, 4].item() == pytest.approx(2 / 129)
    assert attention[0, 0, 0].item() == pytest.approx(1 / 129)


def test_mean_is_the_printed_softmax_at_temperature_c(features: torch.Tensor) -> None:
    mean = SpatialAttention(attention="mean")(features)

    torch.testing.assert_close(mean, SpatialAttention(64.0)(features))


def test_std_is_the_softmax_of_z_scores(features: torch.Tensor) -> None:
    """Shifting R changes no softmax, so R / std and (R - mean) / std agree."""
    saliency = features.double().sum(dim=1).flatten(1)
    z = (saliency - saliency.mean(1, keepdim=True)) / saliency.std(1, correction=0, keepdim=True)

    attention = SpatialAttention("std")(features)

    torch.testing.assert_close(attention.flatten(1).double(), z.softmax(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reading", READINGS, ids=lambda one: f"{one.attention}-{one.temperature}")
@pytest.mark.parametrize("value", [0.0, 0.3, 7.0])
def test_a_flat_frame_gets_uniform_attention(reading: SpatialAttention, value: float) -> None:
    attention = reading(torch.full((1, 2048, 16, 8), value))

    torch.testing.assert_close(attention, torch.full((1, 16, 8), 1 / 128))


@pytest.mark.parametrize("reading", READINGS, ids=lambda one: f"{one.attention}-{one.temperature}")
def test_attention_is_a_distribution_that_follows_its_frame(
    reading: SpatialAttention, features: torch.Tensor
) -> None:
    """It sums to 1, permuted frames permute it, and a flipped frame flips it."""
    attention = reading(features)

    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    assert attention.min() >= 0
    torch.testing.assert_close(reading(features.flip(0)), attention.flip(0))
    torch.testing.assert_close(reading(features.flip(3)), attention.flip(2))


def test_only_the_printed_softmax_depends_on_the_scale_of_features(features: torch.Tensor) -> None:
    for scale in (0.01, 3.0, 500.0):
        std, l1 = SpatialAttention("std"), SpatialAttention(attention="l1")
        torch.testing.assert_close(std(scale * features), std(features), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(l1(scale * features), l1(features))

    printed = SpatialAttention(1.0)
    assert not torch.allclose(printed(3 * features), printed(features))


def test_the_printed_softmax_saturates_on_2048_channels() -> None:
    """Why it is not the default: with R in the hundreds one cell takes nearly everything."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 2048, 16, 8, generator=generator) * torch.rand(
        1, 1, 16, 8, generator=generator
    )

    assert SpatialAttention(1.0)(features).max() > 0.95
    assert SpatialAttention("std")(features).max() < 0.1


def test_attention_is_computed_in_float32_whatever_the_features_are(features: torch.Tensor) -> None:
    half = features.bfloat16()

    attention = SpatialAttention("std")(half)

    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, SpatialAttention("std")(half.float()))


@pytest.mark.parametrize(
    ("temperature", "attention"),
    [(0.0, "softmax"), (-1, "softmax"), ("mad", "softmax"), (1, "max")],
)
def test_an_unknown_reading_is_refused(temperature: object, attention: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        SpatialAttention(temperature, attention)  # type: ignore[arg-type]


def test_eq_3_with_uniform_attention_is_average_pooling(features: torch.Tensor) -> None:
    """The weighted sum is GAP itself; the printed mean of weighted cells is 128 times smaller."""
    uniform = torch.full((2, 16, 8), 1 / 128)
    gap = features.mean(dim=(2, 3))

    torch.testing.assert_close(pool_cells(features, uniform, "sum"), gap)
    torch.testing.assert_close(pool_cells(features, uniform, "mean"), gap / 128)


def test_eq_3_with_all_attention_on_one_cell_takes_that_cell(features: torch.Tensor) -> None:
    one = torch.zeros(2, 16, 8)
    one[:, 3, 4] = 1

    torch.testing.assert_close(pool_cells(features, one), features[:, :, 3, 4])


def test_temporal_average_ignores_repeats_order_and_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 5, 2048, generator=generator)
    average = pool_frames(frames)
    padding = torch.full((1, 3, 2048), float("nan"))
    mask = torch.tensor([[True] * 5 + [False] * 3])

    torch.testing.assert_close(pool_frames(frames.repeat(1, 2, 1)), average)
    torch.testing.assert_close(pool_frames(frames.flip(1)), average)
    torch.testing.assert_close(pool_frames(torch.cat([frames, padding], dim=1), mask), average)
    torch.testing.assert_close(pool_frames(frames[:, :1]), frames[:, 0])


def test_a_tracklet_without_frames_is_refused() -> None:
    with pytest.raises(InvalidFramesError, match="at least one frame"):
        pool_frames(torch.zeros(2, 3, 8), torch.tensor([[True, False, False], [False] * 3]))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidFramesError, match="expected a mask"):
        pool_frames(torch.zeros(2, 3, 8), torch.ones(2, 4, dtype=torch.bool))


@torch.inference_mode()
def test_an_embedding_does_not_depend_on_the_batch_it_shared(network: TrackletNet) -> None:
    batch = clips(tracklets=4, frames=3)

    together = network(batch)
    alone = torch.cat([network(clip[None]) for clip in batch])

    assert together.shape == (4, 2048)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_padded_frames_change_nothing(network: TrackletNet) -> None:
    short = clips(tracklets=1, frames=2)
    padded = torch.cat([short, 9 * torch.ones(1, 2, 3, 64, 32)], dim=1)
    mask = torch.tensor([[True, True, False, False]])

    torch.testing.assert_close(network(padded, mask), network(short), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_attention_comes_on_demand(network: TrackletNet) -> None:
    batch = clips(tracklets=2, frames=3)

    embeddings, attention = network(batch, return_attention=True)

    torch.testing.assert_close(embeddings, network(batch))
    assert attention.shape == (2, 3, 4, 2)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize(
    "shape", [(3, 64, 32), (2, 3, 64, 32), (1, 0, 3, 64, 32), (1, 2, 1, 64, 32)]
)
def test_clips_of_another_shape_are_refused(network: TrackletNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidFramesError, match="expected clips"):
        network(torch.zeros(shape))


def test_a_gradient_reaches_every_parameter() -> None:
    """The module that serves is the one that trains."""
    network = TrackletNet(NetworkConfig()).train()

    network(clips(tracklets=2, frames=2)).square().mean().backward()

    assert all(parameter.grad is not None for parameter in network.parameters())
