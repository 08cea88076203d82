"""The losses: Wang and Zhao, Eq. 4-9, against closed forms, slow loops and another library."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional

from model.losses import (
    IdentityLoss,
    LossConfig,
    LossTerms,
    batch_hard_triplet,
    consistency_regulariser,
    coverage_cv2,
    effective_positions,
    focal_sigmoid_bias,
    identity_accuracy,
    identity_loss,
    pairwise_distances,
    regulariser_excess,
    temporal_regulariser,
    total_loss,
    wrong_logit_mean,
)

FRAMES, HEIGHT, WIDTH = 15, 16, 8
CELLS = HEIGHT * WIDTH
LEAST = CELLS * (1 - FRAMES / CELLS) ** 2  # 99.7578125
REGULARISERS = [
    temporal_regulariser,
    regulariser_excess,
    coverage_cv2,
    consistency_regulariser,
]
IDENTITY_LOSSES: tuple[IdentityLoss, ...] = tuple(
    one for one in get_args(IdentityLoss) if one != "none"
)
FOCAL = [one for one in IDENTITY_LOSSES if one.startswith("focal")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(seed: int, tracklets: int = 2, std: float = 2.0) -> Tensor:
    """What attention is the softmax of, (B, T, H*W) float64."""
    shape = (tracklets, FRAMES, CELLS)
    return std * torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def attention_of(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1).view(*scores.shape[:-1], HEIGHT, WIDTH)


def looking_at(cells: list[int]) -> Tensor:
    """One-hot maps of one tracklet, a cell for each frame, (1, T, H, W)."""
    maps = functional.one_hot(torch.tensor(cells), CELLS).float()
    return maps.view(1, len(cells), HEIGHT, WIDTH)


def evenly_over(count: int) -> Tensor:
    """Frames that are all even over the same cells, (1, T, H, W)."""
    maps = torch.zeros(1, FRAMES, CELLS)
    maps[..., :count] = 1 / count
    return maps.view(1, FRAMES, HEIGHT, WIDTH)


def batch(
    seed: int, identities: int = 4, tracklets: int = 2, dim: int = 6
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D), near enough to one another for the margin, and shuffled labels (B,)."""
    labels = torch.arange(identities).repeat_interleave(tracklets)
    order = torch.randperm(len(labels), generator=generator(seed))
    return 0.2 * torch.randn(len(labels), dim, generator=generator(seed + 1000)), labels[order]


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    [found] = torch.autograd.grad(loss, of)
    return found


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (1, 323),
        (2, 210.5),
        (4, 154.25),
        (8, 126.125),
        (16, 112.0625),
        (32, 105.03125),
        (64, 101.515625),
        (128, 99.7578125),
    ],
)
def test_frames_that_share_k_cells_cost_what_eq_4_says(cells: int, expected: float) -> None:
    """HW - 2N + N^2 / k."""
    assert temporal_regulariser(evenly_over(cells)).item() == pytest.approx(expected, abs=1e-4)


def test_one_hot_frames_on_cells_of_their_own_cost_hw_minus_n() -> None:
    apart = looking_at(list(range(FRAMES)))

    assert temporal_regulariser(apart).item() == pytest.approx(CELLS - FRAMES)


@pytest.mark.parametrize("std", [0.1, 1, 5, 50])
def test_the_regulariser_stays_between_even_coverage_and_one_shared_cell(std: float) -> None:
    maps = attention_of(scores(0, tracklets=1, std=std))

    value = temporal_regulariser(maps).item()

    assert LEAST < value < CELLS - 2 * FRAMES + FRAMES**2


def test_the_regulariser_is_cells_less_twice_the_frames_plus_the_square_of_coverage() -> None:
    maps = attention_of(scores(1, tracklets=1))
    coverage = maps.sum(dim=1)

    value = temporal_regulariser(maps).item()

    expected = CELLS - 2 * FRAMES + coverage.square().sum().item()
    assert value == pytest.approx(expected, rel=1e-6)


def test_the_regulariser_has_its_gradient_in_closed_form() -> None:
    """dReg/dR_n(u) = 2 a_n(u) (S(u) - <a_n, S>)."""
    logits = scores(2, tracklets=1).requires_grad_()

    found = gradient(temporal_regulariser(attention_of(logits)), logits)

    maps = logits.detach().softmax(dim=-1)  # (1, T, H*W)
    coverage = maps.sum(dim=1, keepdim=True)
    expected = 2 * maps * (coverage - (maps * coverage).sum(dim=2, keepdim=True))
    assert expected.norm() > 0.1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", [0, FRAMES / CELLS, 1, 7])
def test_the_gradient_is_the_same_whatever_the_one_of_eq_4_is(target: float) -> None:
    """Sum S is N for any attention, so sum (t - S)^2 depends on t by a constant."""
    logits = scores(3, tracklets=1).requires_grad_()
    coverage = attention_of(logits).sum(dim=1)

    expected = gradient((target - coverage).square().sum(), logits)

    found = gradient(temporal_regulariser(attention_of(logits)), logits)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_one_hot_attention_has_exactly_no_gradient() -> None:
    """The printed Eq. 2 saturates to it, and then Eq. 4 does nothing."""
    saturated = torch.zeros(1, FRAMES, CELLS)
    saturated[..., 5] = 200
    saturated.requires_grad_()
    soft = scores(4, tracklets=1).requires_grad_()

    assert gradient(temporal_regulariser(attention_of(saturated)), saturated).abs().max() == 0
    assert gradient(temporal_regulariser(attention_of(soft)), soft).abs().max() > 0


def test_the_first_form_of_eq_4_is_a_constant_and_not_the_square() -> None:
    """Sum (1 - S) = HW - N, whatever the attention."""
    some = [attention_of(scores(seed, tracklets=1)) for seed in (5, 6)]

    firsts = [(1 - maps.sum(dim=1)).sum().item() for maps in some]
    squares = [temporal_regulariser(maps).item() for maps in some]

    assert firsts == pytest.approx([CELLS - FRAMES] * 2)
    assert abs(squares[0] - squares[1]) > 0.01


def test_the_excess_is_what_the_regulariser_has_above_its_minimum() -> None:
    maps = attention_of(scores(7))

    excess = regulariser_excess(maps).item()

    assert excess == pytest.approx(temporal_regulariser(maps).item() - LEAST, abs=1e-4)
    assert regulariser_excess(evenly_over(CELLS)).item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (evenly_over(CELLS), 0),
        (evenly_over(1), 127),
        (looking_at(list(range(FRAMES))), CELLS / FRAMES - 1),  # 7.53
    ],
    ids=["even", "one cell", "a cell each"],
)
def test_coverage_cv2_has_its_closed_forms(maps: Tensor, expected: float) -> None:
    assert coverage_cv2(maps).item() == pytest.approx(expected, abs=1e-5)


def test_coverage_cv2_is_the_squared_coefficient_of_variation_of_the_coverage() -> None:
    maps = attention_of(scores(8, tracklets=1))
    coverage = maps.sum(dim=1)

    expected = (coverage.std(correction=0) / coverage.mean()) ** 2

    assert coverage_cv2(maps).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cv_trains_like_the_printed_form_with_lambda_n_squared_by_hw() -> None:
    """Lambda 1 of Eq. 5 is 1.758 of coverage CV^2."""
    logits = scores(9).requires_grad_()

    printed = gradient(temporal_regulariser(attention_of(logits)), logits)
    cv = gradient(coverage_cv2(attention_of(logits)), logits)

    weight = FRAMES**2 / CELLS
    assert weight == pytest.approx(1.758, abs=1e-3)
    assert torch.allclose(printed, weight * cv, rtol=1e-4, atol=1e-7)


def test_consistency_asks_for_the_opposite_of_what_is_printed() -> None:
    together, apart = looking_at([5] * FRAMES), looking_at(list(range(FRAMES)))

    assert temporal_regulariser(apart) < temporal_regulariser(together)
    assert consistency_regulariser(together).item() == pytest.approx(0, abs=1e-7)
    assert consistency_regulariser(apart).item() == pytest.approx(1 - 1 / FRAMES)


def test_consistency_is_the_mean_square_of_the_maps_less_the_square_of_their_mean() -> None:
    maps = attention_of(scores(10, tracklets=1)).flatten(2)

    expected = maps.square().sum(dim=2).mean() - maps.mean(dim=1).square().sum()

    found = consistency_regulariser(maps.view(1, FRAMES, HEIGHT, WIDTH))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_a_regulariser_is_the_mean_over_tracklets(regulariser: Callable[..., Tensor]) -> None:
    maps = attention_of(scores(11, tracklets=3))

    together = regulariser(maps).item()

    alone = [regulariser(one.unsqueeze(0)).item() for one in maps]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-6)


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_masked_frames_are_not_counted(regulariser: Callable[..., Tensor]) -> None:
    """N is each tracklet's own, and what stands in the padding, even NaN, changes nothing."""
    maps = attention_of(scores(12))
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    mask[0, 4:] = False
    padded = torch.where(mask[..., None, None], maps, math.nan).requires_grad_()

    value = regulariser(padded, mask)

    alone = [regulariser(maps[:1, :4]).item(), regulariser(maps[1:]).item()]
    assert value.item() == pytest.approx(sum(alone) / 2, rel=1e-6)
    slope = gradient(value, padded)
    assert slope.isfinite().all()
    assert slope[0, 4:].abs().max() == 0


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), r"expected a bool mask \(2, 15\), got .*\(2, 3\)"),
        (torch.ones(2, FRAMES), r"expected a bool mask \(2, 15\), got torch.float32"),
        (torch.zeros(2, FRAMES, dtype=torch.bool), "at least one frame in each tracklet"),
    ],
    ids=["shape", "dtype", "no frame"],
)
def test_a_regulariser_refuses_a_mask_that_cannot_be(
    regulariser: Callable[..., Tensor], mask: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        regulariser(attention_of(scores(13)), mask)


def test_a_regulariser_refuses_maps_without_frames() -> None:
    with pytest.raises(ValueError, match=r"expected attention \(B, T, H, W\), got \(2, 16, 8\)"):
        temporal_regulariser(torch.ones(2, HEIGHT, WIDTH))


@pytest.mark.parametrize("cells", [1, 2, 128])
def test_effective_positions_count_the_cells_that_a_map_looks_at(cells: int) -> None:
    assert effective_positions(evenly_over(cells)).item() == pytest.approx(cells)


def test_effective_positions_are_the_mean_over_frames() -> None:
    maps = torch.cat([evenly_over(1), evenly_over(CELLS)])

    assert effective_positions(maps).item() == pytest.approx((1 + CELLS) / 2)


def slow_triplet(embeddings: Tensor, labels: Tensor, margin: float) -> tuple[float, ...]:
    """Loss, active share, mean hardest positive and negative, by loops over pairs."""
    rows, names = embeddings.tolist(), labels.tolist()
    hinges, positives, negatives = [], [], []
    for anchor, name in zip(rows, names, strict=True):
        others = list(zip(rows, names, strict=True))
        positives.append(max(math.dist(anchor, row) for row, other in others if other == name))
        negatives.append(min(math.dist(anchor, row) for row, other in others if other != name))
        hinges.append(max(0.0, margin + positives[-1] - negatives[-1]))
    count = len(rows)
    active = sum(hinge > 0 for hinge in hinges)
    return sum(hinges) / count, active / count, sum(positives) / count, sum(negatives) / count


def library_triplet(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    distance = LpDistance(normalize_embeddings=False)
    mined = BatchHardMiner(distance=distance)(embeddings, labels)
    loss = TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())
    found: Tensor = loss(embeddings, labels, mined)
    return found


def test_the_triplet_loss_is_the_mean_over_all_anchors() -> None:
    """Over those with a loss alone it would be 0.1875."""
    embeddings = torch.tensor([[0.0], [0.1], [1.0], [1.05], [1.2], [1.3]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])

    terms = batch_hard_triplet(embeddings, labels, margin=0.3)

    assert terms.loss.item() == pytest.approx(0.125)
    assert terms.active.item() == pytest.approx(4 / 6)
    assert terms.positive.item() == pytest.approx(0.5 / 6)
    assert terms.negative.item() == pytest.approx(2.65 / 6)


@pytest.mark.parametrize(("identities", "tracklets"), [(2, 2), (8, 2), (4, 4), (3, 5)])
def test_the_triplet_loss_equals_a_slow_loop(identities: int, tracklets: int) -> None:
    embeddings, labels = batch(identities, identities, tracklets)

    terms = batch_hard_triplet(embeddings, labels, margin=0.3)

    found = [one.item() for one in terms]
    assert found == pytest.approx(slow_triplet(embeddings, labels, 0.3), rel=1e-5)


def test_identities_may_have_different_numbers_of_tracklets() -> None:
    embeddings, _ = batch(0, identities=7, tracklets=1)
    labels = torch.tensor([4, 9, 4, 9, 9, 4, 9])

    terms = batch_hard_triplet(embeddings, labels, margin=0.3)

    assert terms.loss.item() == pytest.approx(slow_triplet(embeddings, labels, 0.3)[0], rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_triplet_loss_and_its_gradient_equal_another_library(seed: int) -> None:
    """Which expands |x - y|^2 where it has more than 25 rows, so exactness is not to be had."""
    embeddings, labels = batch(seed, identities=8, tracklets=2 + seed % 3, dim=32)
    embeddings.requires_grad_()

    ours = batch_hard_triplet(embeddings, labels, margin=0.3).loss
    theirs = library_triplet(embeddings, labels, margin=0.3)

    assert ours.item() > 0.05
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = gradient(theirs, embeddings)
    assert torch.allclose(gradient(ours, embeddings), expected, rtol=1e-4, atol=1e-6)


def test_the_order_of_a_batch_does_not_matter() -> None:
    embeddings, labels = batch(3)
    order = torch.randperm(len(labels), generator=generator(0))

    one = batch_hard_triplet(embeddings, labels)
    other = batch_hard_triplet(embeddings[order], labels[order])

    assert torch.allclose(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize("margin", [0.25, 0.5, 2])
def test_embeddings_at_one_point_cost_exactly_the_margin_and_keep_a_finite_gradient(
    margin: float,
) -> None:
    """Margins that binary fractions hold exactly, so that their sum rounds nothing."""
    embeddings = torch.ones(6, 8, requires_grad=True)

    terms = batch_hard_triplet(embeddings, torch.arange(6) // 2, margin)

    assert terms.loss.item() == margin
    assert terms.active.item() == 1
    assert gradient(terms.loss, embeddings).isfinite().all()


def test_two_embeddings_at_one_point_do_not_spoil_the_gradient_of_the_others() -> None:
    embeddings, labels = batch(1, identities=3)
    first, second = (labels == 0).nonzero().flatten().tolist()
    embeddings[second] = embeddings[first]
    embeddings.requires_grad_()

    slope = gradient(batch_hard_triplet(embeddings, labels).loss, embeddings)

    assert slope.isfinite().all()
    assert slope.abs().max() > 0


def test_negatives_beyond_the_margin_cost_nothing() -> None:
    embeddings, labels = batch(2, dim=6)
    embeddings = embeddings + 100 * functional.one_hot(labels, 6)

    terms = batch_hard_triplet(embeddings, labels, margin=0.3)

    assert terms.loss.item() == 0
    assert terms.active.item() == 0


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([0, 1, 2, 3], r"\[1, 1, 1, 1\] of identities \[0, 1, 2, 3\]"),
        ([0, 0, 1, 1, 2], r"\[2, 2, 1\] of identities \[0, 1, 2\]"),
        ([7, 7, 7, 7], r"\[4\] of identities \[7\]"),
        ([], r"\[\] of identities \[\]"),
    ],
    ids=["K = 1", "one alone", "one identity", "empty"],
)
def test_an_anchor_without_a_positive_or_a_negative_is_refused(labels: list[int], got: str) -> None:
    expected = "expected at least two identities with at least two tracklets each, got tracklets "

    with pytest.raises(ValueError, match=expected + got):
        batch_hard_triplet(torch.ones(len(labels), 3), torch.tensor(labels, dtype=torch.int64))


def test_labels_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected embeddings \(B, D\) and labels \(B,\), got"):
        batch_hard_triplet(torch.ones(4, 3), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("rows", [2, 30])
def test_a_small_distance_between_long_embeddings_survives(rows: int) -> None:
    """|x|^2 + |y|^2 - 2xy leaves nothing of it; from 26 rows on torch would take that by itself."""
    direction = functional.normalize(torch.randn(2048, generator=generator(0)), dim=0)
    aside = functional.normalize(torch.randn(2048, generator=generator(1)), dim=0)
    embeddings = torch.stack([450 * direction, 450 * direction + 0.0449 * aside]).repeat(rows, 1)
    assert embeddings[0].norm().item() == pytest.approx(450, abs=0.01)

    distances = pairwise_distances(embeddings)

    assert distances[0, 1].item() == pytest.approx(0.0449, abs=1e-4)
    assert distances[0, 2].item() == 0


def test_distances_equal_those_of_differences_in_double_precision() -> None:
    rows, columns = (torch.randn(n, 64, generator=generator(n)) for n in (30, 40))

    distances = pairwise_distances(rows, columns)

    expected = (rows.double().unsqueeze(1) - columns.double()).norm(dim=2)
    assert distances.dtype == torch.float32
    assert torch.allclose(distances.double(), expected, rtol=1e-5)


def test_the_gradient_of_distances_equals_that_of_differences() -> None:
    """Where a distance is 0, as on the diagonal, it is 0; a root of a sum has NaN there."""
    rows = torch.randn(30, 8, dtype=torch.float64, generator=generator(3)).requires_grad_()
    weights = torch.rand(30, 30, dtype=torch.float64, generator=generator(4))

    found = gradient((pairwise_distances(rows) * weights).sum(), rows)

    apart = ~torch.eye(30, dtype=torch.bool)
    slow = (rows.unsqueeze(1) - rows).square().sum(dim=2)[apart].sqrt()
    assert torch.allclose(found, gradient((slow * weights[apart]).sum(), rows), atol=1e-5)


@pytest.mark.parametrize("shapes", [((4,), (4, 3)), ((4, 3), (4, 2)), ((2, 4, 3), (4, 3))])
def test_distances_between_embeddings_of_other_shapes_are_refused(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"expected embeddings \(N, D\) and others \(M, D\), got"):
        pairwise_distances(*(torch.ones(shape) for shape in shapes))


def slow_identity_loss(config: LossConfig, logits: Tensor, labels: Tensor) -> float:
    """As the equations stand, in double precision, row by row."""
    total, gamma = 0.0, config.gamma
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        softmax = row.exp() / row.exp().sum()
        sigmoid = 1 / (1 + (-row).exp())
        if config.identity == "ce":
            total -= softmax[label].log().item()
        elif config.identity == "ce_smooth":
            target = torch.full_like(row, config.smoothing / len(row))
            target[label] += 1 - config.smoothing
            total -= (target * softmax.log()).sum().item()
        elif config.identity == "focal_softmax":
            total -= ((1 - softmax[label]) ** gamma * softmax[label].log()).item()
        elif config.identity == "focal_literal":
            total -= ((1 - sigmoid[label]) ** gamma * sigmoid[label].log()).item()
        elif config.identity == "focal_sigmoid":
            right = 1 - sigmoid
            right[label] = sigmoid[label]
            total -= ((1 - right) ** gamma * right.log()).sum().item()
    return total / len(labels)


@pytest.mark.parametrize("identity", IDENTITY_LOSSES)
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_an_identity_loss_equals_its_equation_row_by_row(
    identity: IdentityLoss, gamma: float
) -> None:
    logits = 3 * torch.randn(6, 5, generator=generator(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    config = LossConfig(identity=identity, gamma=gamma, smoothing=0.2)

    found = identity_loss(logits, labels, config).item()

    assert found == pytest.approx(slow_identity_loss(config, logits, labels), rel=1e-5)


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ("focal_literal", 0.25 * math.log(2)),  # 0.1733
        ("focal_sigmoid", 5 * 0.25 * math.log(2)),  # 0.8664
        ("focal_softmax", (4 / 5) ** 2 * math.log(5)),  # 1.0300
    ],
)
def test_focal_losses_have_their_closed_forms_at_zero(
    identity: IdentityLoss, expected: float
) -> None:
    loss = identity_loss(torch.zeros(3, 5), torch.tensor([0, 2, 4]), LossConfig(identity))

    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ("focal_literal", 0),
        ("focal_sigmoid", 4 * 40),
        ("focal_softmax", (4 / 5) ** 2 * math.log(5)),
    ],
)
def test_only_the_literal_focal_loss_takes_equal_large_logits_for_an_answer(
    identity: IdentityLoss, expected: float
) -> None:
    """Its degeneracy: logits of 40 for every identity, whatever the features, bring it to 0."""
    loss = identity_loss(torch.full((3, 5), 40.0), torch.tensor([0, 2, 4]), LossConfig(identity))

    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_softmax_focal_without_focus_is_cross_entropy() -> None:
    logits = torch.randn(6, 5, generator=generator(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    loss = identity_loss(logits, labels, LossConfig("focal_softmax", gamma=0))

    assert loss.item() == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_sigmoid_focal_without_focus_is_binary_cross_entropy_summed_over_identities() -> None:
    logits = torch.randn(6, 5, generator=generator(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    loss = identity_loss(logits, labels, LossConfig("focal_sigmoid", gamma=0))

    targets = functional.one_hot(labels, 5).float()
    expected = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("identity", IDENTITY_LOSSES)
def test_only_the_literal_focal_loss_has_no_gradient_for_wrong_logits(
    identity: IdentityLoss,
) -> None:
    logits = torch.randn(6, 5, generator=generator(3)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    slope = gradient(identity_loss(logits, labels, LossConfig(identity)), logits)

    right = functional.one_hot(labels, 5).bool()
    assert (slope[right] < 0).all()
    if identity == "focal_literal":
        assert (slope[~right] == 0).all()
    else:
        assert (slope[~right] > 0).all()


@pytest.mark.parametrize("identity", IDENTITY_LOSSES)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
def test_identity_losses_and_their_gradients_are_finite_at_logits_of_a_hundred(
    identity: IdentityLoss, gamma: float
) -> None:
    logits = torch.tensor(list(itertools.product((-100.0, 0.0, 100.0), repeat=3))).requires_grad_()

    for label in range(3):
        labels = torch.full((27,), label)
        loss = identity_loss(logits, labels, LossConfig(identity, gamma=gamma))

        assert loss.isfinite()
        assert gradient(loss, logits).isfinite().all()


@pytest.mark.parametrize("identity", FOCAL)
def test_focal_losses_are_right_where_a_logit_is_wrong_by_a_hundred(identity: IdentityLoss) -> None:
    """The true identity at -100 and another at 100: all in units of 100, none overflows."""
    logits = torch.tensor([[-100.0, 100.0, -100.0]])

    loss = identity_loss(logits, torch.tensor([0]), LossConfig(identity))

    expected = {"focal_softmax": 200, "focal_sigmoid": 200, "focal_literal": 100}[identity]
    assert loss.item() == pytest.approx(expected)


def test_no_identity_loss_is_zero() -> None:
    loss = identity_loss(torch.ones(2, 3), torch.tensor([0, 1]), LossConfig("none"))

    assert loss.item() == 0


@pytest.mark.parametrize("shape", [(3,), (2, 5), (3, 5, 1)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected logits \(B, C\) and labels \(B,\), got"):
        identity_loss(torch.zeros(shape), torch.tensor([0, 1, 2]), LossConfig())


def trained(identity: IdentityLoss, seed: int) -> tuple[float, Tensor, Tensor]:
    """Loss, logits and labels of 20 identities that a small network was trained to tell apart.

    The features are as a network's after its ReLU: positive, with much in common.
    """
    labels = torch.arange(20).repeat_interleave(16)
    centres = 5 + torch.randn(20, 32, generator=generator(seed))
    noise = 0.3 * torch.randn(len(labels), 32, generator=generator(seed + 1))
    features = (centres[labels] + noise).relu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 20))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    config = LossConfig(identity)
    for _ in range(300):
        optimiser.zero_grad()
        identity_loss(network(features), labels, config).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        logits = network(features)
        return identity_loss(logits, labels, config).item(), logits, labels


@pytest.mark.parametrize("seed", [0, 1])
def test_the_literal_focal_loss_is_brought_to_zero_without_telling_anyone_apart(seed: int) -> None:
    """Every logit rises, wrong ones too; chance is 0.05. The softmax reading tells all apart."""
    literal, literal_logits, labels = trained("focal_literal", seed)
    softmax, softmax_logits, _ = trained("focal_softmax", seed)

    wrong = ~functional.one_hot(labels, 20).bool()
    assert literal < 1e-3
    assert identity_accuracy(literal_logits, labels) < 0.15
    assert (literal_logits[wrong] > 0).all()
    assert wrong_logit_mean(literal_logits, labels) > 5
    assert softmax < 1e-2
    assert identity_accuracy(softmax_logits, labels) > 0.95
    assert wrong_logit_mean(softmax_logits, labels) < 1


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_a_classifier_with_the_focal_bias_begins_at_its_prior(prior: float) -> None:
    assert 1 / (1 + math.exp(-focal_sigmoid_bias(prior))) == pytest.approx(prior)


def test_the_focal_bias_is_minus_4_595_by_default() -> None:
    assert focal_sigmoid_bias() == pytest.approx(-math.log(99))


@pytest.mark.parametrize("prior", [0, 1, -0.1, math.nan])
def test_a_prior_that_is_no_probability_is_refused(prior: float) -> None:
    with pytest.raises(ValueError, match=r"prior: expected a probability in \(0, 1\), got"):
        focal_sigmoid_bias(prior)


def test_accuracy_is_the_share_of_rows_whose_largest_logit_is_the_true_one() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, -1.0, -2.0]])

    assert identity_accuracy(logits, torch.tensor([0, 1, 2, 2])).item() == 0.5


def test_the_wrong_logit_mean_leaves_out_the_true_ones() -> None:
    logits = torch.tensor([[90.0, 1.0, 2.0], [3.0, 4.0, -70.0]])

    assert wrong_logit_mean(logits, torch.tensor([0, 2])).item() == pytest.approx(2.5)


def everything(config: LossConfig, dtype: torch.dtype = torch.float32) -> LossTerms:
    """The losses of one seeded batch of eight tracklets."""
    embeddings, labels = batch(5)
    logits = torch.randn(8, 4, generator=generator(6))
    maps = attention_of(scores(7, tracklets=8))
    return total_loss(config, embeddings.to(dtype), logits.to(dtype), labels, maps.to(dtype))


def triplet_of(terms: LossTerms) -> float:
    return 0.0 if terms.triplet is None else terms.triplet.loss.item()


def test_the_total_is_the_sum_of_its_terms() -> None:
    """L = L_f + L_v + lambda Reg."""
    terms = everything(LossConfig(regulariser_weight=0.7))

    parts = terms.identity.item() + triplet_of(terms) + 0.7 * terms.regulariser.item()
    assert min(terms.identity.item(), triplet_of(terms), terms.regulariser.item()) > 0
    assert terms.total.item() == pytest.approx(parts, rel=1e-6)


def test_the_terms_are_what_their_functions_say() -> None:
    config = LossConfig()
    embeddings, labels = batch(5)
    logits = torch.randn(8, 4, generator=generator(6))
    maps = attention_of(scores(7, tracklets=8))
    mask = torch.arange(FRAMES).expand(8, -1) < torch.arange(8).unsqueeze(1) + 3

    terms = total_loss(config, embeddings, logits, labels, maps, mask)

    assert terms.identity == identity_loss(logits, labels, config)
    assert terms.triplet == batch_hard_triplet(embeddings, labels, config.margin)
    assert terms.regulariser == temporal_regulariser(maps, mask)
    assert terms.regulariser != temporal_regulariser(maps)


def test_lambda_zero_trains_as_no_regulariser_does() -> None:
    weightless = everything(LossConfig(regulariser_weight=0))
    without = everything(LossConfig(regulariser="none"))

    assert weightless.total == without.total
    assert without.regulariser.item() == 0
    assert weightless.regulariser.item() > 0


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"identity": "focal_sigmoid"}, "identity"),
        ({"identity": "focal_literal"}, "identity"),
        ({"identity": "ce"}, "identity"),
        ({"identity": "ce_smooth"}, "identity"),
        ({"identity": "none"}, "identity"),
        ({"gamma": 1.0}, "identity"),
        ({"triplet": False}, "triplet"),
        ({"margin": 0.5}, "triplet"),
        ({"regulariser": "cv"}, "regulariser"),
        ({"regulariser": "consistency"}, "regulariser"),
        ({"regulariser": "none"}, "regulariser"),
        ({"regulariser_weight": 2.0}, None),
        ({"smoothing": 0.3}, None),
    ],
    ids=str,
)
def test_a_switch_changes_its_term_alone(change: dict[str, Any], changed: str | None) -> None:
    before = everything(LossConfig())
    after = everything(replace(LossConfig(), **change))

    differs = {
        "identity": before.identity != after.identity,
        "triplet": triplet_of(before) != triplet_of(after),
        "regulariser": before.regulariser != after.regulariser,
    }
    assert [name for name, one in differs.items() if one] == ([changed] if changed else [])


@pytest.mark.parametrize("reading", ["printed", "cv", "consistency"])
def test_each_regulariser_is_the_one_of_its_name(reading: Any) -> None:
    maps = attention_of(scores(7, tracklets=8))
    expected = {
        "printed": temporal_regulariser,
        "cv": coverage_cv2,
        "consistency": consistency_regulariser,
    }[reading](maps)

    assert everything(LossConfig(regulariser=reading)).regulariser == expected


def test_the_gradient_reaches_embeddings_logits_and_attention_and_what_is_logged_has_none() -> None:
    embeddings, labels = batch(5)
    logits = torch.randn(8, 4, generator=generator(6))
    maps = attention_of(scores(7, tracklets=8))
    learned = [one.requires_grad_() for one in (embeddings, logits, maps)]

    terms = total_loss(LossConfig(), embeddings, logits, labels, maps)

    slopes = torch.autograd.grad(terms.total, learned)
    assert all(slope.abs().max() > 0 for slope in slopes)
    assert terms.triplet is not None
    logged = [*terms.triplet[1:], effective_positions(maps), wrong_logit_mean(logits, labels)]
    assert not any(one.requires_grad for one in logged)


def test_an_identity_loss_without_logits_is_refused() -> None:
    embeddings, labels = batch(5)

    with pytest.raises(ValueError, match="expected logits for the identity loss ce, got none"):
        total_loss(LossConfig("ce"), embeddings, None, labels, attention_of(scores(7, tracklets=8)))


def test_without_an_identity_loss_no_logits_are_needed() -> None:
    embeddings, labels = batch(5)
    maps = attention_of(scores(7, tracklets=8))

    terms = total_loss(LossConfig("none", regulariser="none"), embeddings, None, labels, maps)

    assert terms.total.item() == pytest.approx(triplet_of(terms))


def test_attention_of_another_batch_is_refused() -> None:
    embeddings, labels = batch(5)

    with pytest.raises(ValueError, match=r"expected attention of 8 tracklets, .* got 3"):
        total_loss(
            LossConfig("none"), embeddings, None, labels, attention_of(scores(7, tracklets=3))
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("identity", IDENTITY_LOSSES)
@pytest.mark.parametrize("regulariser", ["printed", "cv", "consistency"])
def test_half_precision_and_autocast_change_nothing_but_the_inputs(
    dtype: torch.dtype, identity: IdentityLoss, regulariser: Any
) -> None:
    """All is float32, equal bit for bit to what the rounded inputs give in float32."""
    config = LossConfig(identity, regulariser=regulariser)
    embeddings, labels = batch(5)
    logits = torch.randn(8, 4, generator=generator(6))
    maps = attention_of(scores(7, tracklets=8))
    rounded = [one.to(dtype) for one in (embeddings, logits, maps)]

    with torch.autocast("cpu", dtype=dtype):
        found = total_loss(config, rounded[0], rounded[1], labels, rounded[2])

    wide = [one.float() for one in rounded]
    expected = total_loss(config, wide[0], wide[1], labels, wide[2])
    assert found == expected
    scalars = [found.total, found.identity, found.regulariser, *(found.triplet or ())]
    assert {one.dtype for one in scalars} == {torch.float32}


@pytest.mark.parametrize(
    "function", [*REGULARISERS, effective_positions, lambda maps: pairwise_distances(maps[0, 0])]
)
def test_every_function_by_itself_is_float32_within_autocast(
    function: Callable[[Tensor], Tensor],
) -> None:
    maps = attention_of(scores(14)).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(maps)

    assert found.dtype == torch.float32
    assert torch.equal(found, function(maps.float()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("identity", "focal", r"identity: expected \(.*'focal_softmax'.*\), got 'focal'"),
        ("regulariser", "on", r"regulariser: expected \('printed'.*\), got 'on'"),
        ("gamma", -1, "gamma: expected a finite number, 0 or more, got -1"),
        ("gamma", math.nan, "gamma: expected a finite number, 0 or more, got nan"),
        ("gamma", "2", "gamma: expected a finite number, 0 or more, got '2'"),
        ("smoothing", 1, r"smoothing: expected a share in \[0, 1\), got 1"),
        ("smoothing", -0.1, r"smoothing: expected a share in \[0, 1\), got -0.1"),
        ("smoothing", None, r"smoothing: expected a share in \[0, 1\), got None"),
        ("triplet", 1, "triplet: expected True or False, got 1"),
        ("margin", -0.3, "margin: expected a finite number, 0 or more, got -0.3"),
        ("margin", True, "margin: expected a finite number, 0 or more, got True"),
        ("regulariser_weight", math.inf, "regulariser_weight: expected a finite number, .* inf"),
        ("regulariser_weight", -1, "regulariser_weight: expected a finite number, .* -1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**{field: value})


def test_the_default_is_the_corrected_reading_of_the_paper() -> None:
    config = LossConfig()

    assert (config.identity, config.gamma) == ("focal_softmax", 2.0)
    assert (config.triplet, config.margin) == (True, 0.3)
    assert (config.regulariser, config.regulariser_weight) == ("printed", 1.0)
