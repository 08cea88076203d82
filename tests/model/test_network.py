"""Eq. 1-3 and the temporal average, against closed forms (paper/review.md, 3.8, tests 1 to 5)."""

import math
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.errors import InvalidFramesError
from model.network import (
    NetworkConfig,
    SpatialAttention,
    TrackletNet,
    build_backbone,
    frame_agreement,
    pool_cells,
    pool_frames,
    unit_length,
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


def small(**config: object) -> TrackletNet:
    """A seeded small network in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TrackletNet(NetworkConfig(backbone="conv5", **config)).eval()  # type: ignore[arg-type]


@pytest.fixture
def crowd() -> torch.Tensor:
    """Frame embeddings (3, 7, 16) with a common direction, as those of one network have."""
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)) + 0.5


def slow_agreement(frames: torch.Tensor) -> torch.Tensor:
    """The weights of one tracklet's frames (T, D), pair by pair."""
    pairs = [(i, j) for i in range(len(frames)) for j in range(len(frames)) if i != j]
    similarity = [float(torch.cosine_similarity(frames[i], frames[j], dim=0)) for i, j in pairs]
    mean = sum(similarity) / len(pairs)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in similarity) / len(pairs))
    terms = [math.exp(one / deviation) for one in similarity]
    weights = torch.zeros(len(frames))
    for (first, _), term in zip(pairs, terms, strict=True):
        weights[first] += term / sum(terms)
    return weights


def test_two_frames_that_agree_outweigh_a_third() -> None:
    """Cosines of 1, 0 and 0 have z-scores of 2 and -1 over root 2; e^(3 / root 2) is 8.3418."""
    frames = torch.tensor([[[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]])
    ratio = math.exp(3 / math.sqrt(2))

    weights = frame_agreement(frames, torch.ones(1, 3, dtype=torch.bool))

    whole = 2 * ratio + 4
    expected = torch.tensor([[(ratio + 1) / whole, (ratio + 1) / whole, 2 / whole]])
    torch.testing.assert_close(weights, expected)
    pooled = pool_frames(frames, temporal="agreement")
    torch.testing.assert_close(pooled, (expected.unsqueeze(2) * frames).sum(1))


def test_agreement_is_a_softmax_over_pairs(crowd: torch.Tensor) -> None:
    weights = frame_agreement(crowd, torch.ones(3, 7, dtype=torch.bool))

    for row, frames in zip(weights, crowd, strict=True):
        torch.testing.assert_close(row, slow_agreement(frames), rtol=1e-4, atol=1e-6)


def test_four_frames_of_one_person_outweigh_eleven_of_strangers() -> None:
    """12 of 210 ordered pairs agree: e^(1 / deviation) is 74.5 for a weight of 0.86 in all."""
    frames = torch.eye(16)[:15].unsqueeze(0)
    frames[0, :4] = torch.eye(16)[15]

    weights = frame_agreement(frames, torch.ones(1, 15, dtype=torch.bool))

    share = 12 / 210
    agreed = math.exp(1 / math.sqrt(share * (1 - share)))
    expected = (12 * agreed + 4 * 11) / (12 * agreed + 198)
    assert weights[0, :4].sum().item() == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.859, abs=1e-3)


@pytest.mark.parametrize("temporal", ["mean", "agreement"])
def test_either_pooling_ignores_order_and_padding_and_follows_scale(
    temporal: Literal["mean", "agreement"], crowd: torch.Tensor
) -> None:
    pooled = pool_frames(crowd, temporal=temporal)
    padded = torch.cat([crowd, torch.full((3, 2, 16), float("nan"))], dim=1)
    mask = torch.tensor([[True] * 7 + [False] * 2] * 3)

    torch.testing.assert_close(pool_frames(crowd.flip(1), temporal=temporal), pooled)
    torch.testing.assert_close(pool_frames(padded, mask, temporal), pooled)
    torch.testing.assert_close(pool_frames(1e-3 * crowd, temporal=temporal), 1e-3 * pooled)
    torch.testing.assert_close(pool_frames(crowd[1:2], temporal=temporal), pooled[1:2])


def test_frames_that_are_much_alike_are_told_apart_as_others_are() -> None:
    """A direction that all frames share shifts every cosine, and z-scores do not see it."""
    own = torch.eye(16)[:6]
    own[1] = own[0]

    def weights(shared: float) -> torch.Tensor:
        frames = torch.cat([own, torch.full((6, 1), shared)], dim=1).unsqueeze(0)
        return frame_agreement(frames, torch.ones(1, 6, dtype=torch.bool))

    torch.testing.assert_close(weights(10.0), weights(0.0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_agreement_of_one_or_two_frames_is_their_average(count: int, crowd: torch.Tensor) -> None:
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 1 : 1 + count] = True

    pooled = pool_frames(crowd, mask, "agreement")

    torch.testing.assert_close(pooled, crowd[:, 1 : 1 + count].mean(1))


def test_agreement_of_equal_frames_is_that_frame(crowd: torch.Tensor) -> None:
    equal = crowd[:, :1].repeat(1, 5, 1)

    torch.testing.assert_close(pool_frames(equal, temporal="agreement"), crowd[:, 0])


@pytest.mark.parametrize("case", ["different", "equal", "zero", "some zero", "nearly equal"])
def test_agreement_has_a_finite_gradient(case: str, crowd: torch.Tensor) -> None:
    frames = crowd.clone()
    if case == "equal":
        frames = frames[:, :1].repeat(1, 7, 1)
    elif case == "nearly equal":
        frames = frames[:, :1] + 1e-6 * frames
    elif "zero" in case:
        frames[:, 3 if case == "some zero" else 0 :] = 0
    frames.requires_grad_()
    mask = torch.tensor([[True] * 7, [True] + [False] * 6, [True] * 3 + [False] * 4])

    pool_frames(frames, mask, "agreement").square().sum().backward()  # type: ignore[no-untyped-call]

    assert frames.grad is not None
    assert frames.grad.isfinite().all()
    assert frames.grad.abs().max() < 100
    assert frames.grad[~mask].abs().max() == 0


def test_the_gradient_of_agreement_is_that_of_differences() -> None:
    frames = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    frames.requires_grad_()
    # Weights are float32 by intention, so differences are no finer than that.
    assert torch.autograd.gradcheck(
        lambda one: pool_frames(one, temporal="agreement"), frames, eps=1e-3, atol=1e-2
    )


def test_agreement_is_computed_in_float32_under_autocast(crowd: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_frames(crowd, temporal="agreement")

    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool_frames(crowd, temporal="agreement"))


def test_unit_length_leaves_zero_alone() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)

    made = unit_length(vectors)
    made.sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(made, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_what_is_no_number_does_not_become_one(crowd: torch.Tensor) -> None:
    """A broken network must show, whatever is made of its frames."""
    crowd[1, 2, 3] = float("nan")

    pooled = unit_length(pool_frames(crowd, temporal="agreement"))

    assert pooled[1].isnan().all()
    assert pooled[[0, 2]].isfinite().all()


@torch.inference_mode()
def test_a_unit_network_scales_what_it_serves_and_not_what_it_trains() -> None:
    """After the neck, so that distances and cosines of what is served rank alike."""
    pixels = clips(tracklets=3, frames=2)
    plain, unit = small(neck=True, head=8), small(neck=True, head=8, unit=True)

    served = unit(pixels)

    torch.testing.assert_close(served, torch.nn.functional.normalize(plain(pixels)))
    assert torch.equal(unit.encode(pixels).embeddings, plain.encode(pixels).embeddings)
    assert torch.equal(unit.train()(pixels), plain.train()(pixels))


@torch.inference_mode()
def test_a_network_pools_as_its_configuration_says_in_training_and_in_service() -> None:
    pixels, network = clips(tracklets=2, frames=5), small(temporal="agreement")
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    encoded = network.encode(pixels, mask)

    expected = pool_frames(encoded.frames, mask, "agreement")
    assert torch.equal(encoded.embeddings, expected)
    torch.testing.assert_close(network(pixels, mask), expected)
    assert not torch.allclose(expected, pool_frames(encoded.frames, mask))


@torch.inference_mode()
def test_a_head_sets_the_length_of_embeddings_and_lets_them_take_signs() -> None:
    pixels = clips(tracklets=2, frames=3)
    network, headless = small(head=24), small()

    encoded = network.encode(pixels)

    assert network.dim == 24
    assert encoded.embeddings.shape == network(pixels).shape == (2, 24)
    assert encoded.frames.shape == (2, 3, 24)
    assert encoded.frames.min() < 0 <= headless.encode(pixels).frames.min()
    # It is linear and without bias, so it may stand before or after the average.
    after = network.head(headless_like(network).encode(pixels).embeddings)
    torch.testing.assert_close(encoded.embeddings, after, rtol=1e-4, atol=1e-5)


def headless_like(network: TrackletNet) -> TrackletNet:
    """The same backbone without its head."""
    other = small()
    other.backbone.load_state_dict(network.backbone.state_dict())
    return other


def test_a_head_computes_in_float32_under_autocast_and_learns() -> None:
    network = small(head=8).train()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = network.encode(clips(tracklets=2, frames=2))

    encoded.embeddings.square().sum().backward()  # type: ignore[no-untyped-call]

    assert encoded.frames.dtype == torch.float32
    assert isinstance(network.head, torch.nn.Linear)
    assert network.head.weight.grad is not None
    assert network.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("config", [{"temporal": "median"}, {"head": -1}])
def test_an_unknown_pooling_or_a_negative_length_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        NetworkConfig(**config)  # type: ignore[arg-type]
