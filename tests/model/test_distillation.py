"""A student is pulled towards its teacher in two ways."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.distillation import DistillationConfig, DistillationLoss
from model.errors import TeacherError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher": "network.pth"}, "teacher: expected an .onnx file"),
        ({"channels": "grb"}, "channels: expected"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"mean": (0.0, 0.0)}, "mean: expected 3 numbers"),
        ({"mean": (0.0, 0.0, float("nan"))}, "mean: expected 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected 3 positive numbers"),
        ({"similarity_weight": -1.0}, "similarity_weight: expected 0 or more"),
        ({"embedding_weight": float("inf")}, "embedding_weight: expected 0 or more"),
        ({"similarity_weight": 0.0, "embedding_weight": 0.0}, "got 0 for both"),
        ({"cache": ""}, "cache: expected a folder"),
        ({"views": 4, "plain": 1.5}, r"plain: expected a share in \[0, 1\]"),
        ({"plain": 0.5}, "expected distillation.views of 2 or more"),
        ({"teacher": "start", "live": True}, "live: expected a teacher's file"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**{"teacher": "network.onnx", **wrong})


def make_loss(
    dim: int = 6, teacher_dim: int = 6, *, similarity: float = 1.0, embedding: float = 1.0
) -> DistillationLoss:
    config = DistillationConfig(
        "teacher.onnx", similarity_weight=similarity, embedding_weight=embedding
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DistillationLoss(dim, teacher_dim, config)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection_of(loss: DistillationLoss) -> nn.Linear:
    assert isinstance(loss.projection, nn.Linear)
    return loss.projection


def rotation(dim: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(drawn(dim, dim, seed=9))[0]
    return turned


def test_the_terms_are_those_of_a_slow_loop() -> None:
    loss = make_loss(6, 4)
    student, teacher = drawn(2, 3, 6), drawn(2, 3, 4, seed=1)
    s, t = student.flatten(0, 1).double().numpy(), teacher.flatten(0, 1).double().numpy()
    weight = projection_of(loss).weight.detach().double().numpy()
    bias = projection_of(loss).bias.detach().double().numpy()

    def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    squares = [(cosine(s[n], s[m]) - cosine(t[n], t[m])) ** 2 for n in range(6) for m in range(6)]
    angles = [1 - cosine(weight @ s[n] + bias, t[n]) for n in range(6)]
    terms = loss(student, teacher)

    assert terms.similarity.item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert terms.embedding.item() == pytest.approx(np.mean(angles), rel=1e-5)


def test_a_student_with_the_teachers_geometry_has_no_similarity_loss() -> None:
    """Turned, scaled and in more dimensions, angles are the same."""
    teacher = drawn(2, 3, 6)
    padded = torch.cat([7 * teacher @ rotation(6), torch.zeros(2, 3, 4)], dim=2)

    assert make_loss(10, 6)(padded, teacher).similarity.item() == pytest.approx(0, abs=1e-10)


def test_orthogonal_frames_against_equal_ones_cost_the_share_of_pairs() -> None:
    """Of N^2 pairs N are a frame with itself; each of the others is off by 1: here 12 of 16."""
    orthogonal, equal = torch.eye(4).view(2, 2, 4), torch.ones(2, 2, 6)

    assert make_loss(4, 6)(orthogonal, equal).similarity.item() == pytest.approx(12 / 16)


def test_the_length_of_embeddings_counts_on_neither_side() -> None:
    loss = make_loss()
    nn.init.zeros_(projection_of(loss).bias)
    student, teacher = drawn(2, 3, 6), drawn(2, 3, 6, seed=1)
    lengths = 0.1 + drawn(2, 3, 1, seed=2).abs()

    plain, scaled = loss(student, teacher), loss(lengths * student, 5 * teacher)

    assert scaled.similarity.item() == pytest.approx(plain.similarity.item(), rel=1e-5)
    assert scaled.embedding.item() == pytest.approx(plain.embedding.item(), rel=1e-5)


def test_a_projection_that_reproduces_the_teacher_has_no_embedding_loss() -> None:
    loss, student, turn = make_loss(), drawn(2, 3, 6), rotation(6)
    projection_of(loss).weight.data = turn.T.contiguous()
    nn.init.zeros_(projection_of(loss).bias)

    assert loss(student, 3 * student @ turn).embedding.item() == pytest.approx(0, abs=1e-6)
    assert loss(student, -student @ turn).embedding.item() == pytest.approx(2)


def test_the_total_is_the_weighted_sum_and_alone_has_a_graph() -> None:
    student, teacher = drawn(2, 3, 6).requires_grad_(), drawn(2, 3, 6, seed=1)

    terms = make_loss(similarity=0.5, embedding=3.0)(student, teacher)

    expected = 0.5 * terms.similarity.item() + 3 * terms.embedding.item()
    assert terms.total.item() == pytest.approx(expected)
    assert terms.total.requires_grad
    assert not terms.similarity.requires_grad
    assert not terms.embedding.requires_grad


@pytest.mark.parametrize("student", [torch.zeros(2, 3, 6), torch.ones(2, 3, 6), drawn(1, 1, 6)])
def test_gradients_are_finite_even_where_frames_are_equal_or_zero(student: Tensor) -> None:
    loss, student = make_loss(), student.clone().requires_grad_()

    loss(student, drawn(*student.shape, seed=1)).total.backward()

    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in loss.parameters())


def test_the_loss_is_float32_within_autocast() -> None:
    loss, student, teacher = make_loss(), drawn(2, 3, 6), drawn(2, 3, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss(student.bfloat16(), teacher)

    exact = loss(student.bfloat16().float(), teacher)

    assert rough.total.dtype == torch.float32
    assert rough.total.item() == exact.total.item()


def test_a_step_down_the_gradient_brings_the_student_nearer() -> None:
    loss, student = make_loss(), drawn(2, 3, 6).requires_grad_()
    teacher = drawn(2, 3, 6, seed=1)
    before = loss(student, teacher)
    before.total.backward()
    assert student.grad is not None

    after = loss(student - 0.1 * student.grad, teacher)

    assert after.total < before.total


def test_without_a_projection_the_student_stands_where_the_teacher_does() -> None:
    config = DistillationConfig("t.onnx", projection=False)
    loss = DistillationLoss(6, 6, config)
    said = drawn(2, 3, 6)

    assert list(loss.parameters()) == []
    assert loss(said, said).total.item() == pytest.approx(0, abs=1e-6)
    assert loss(said, -said).embedding.item() == pytest.approx(2)
    with pytest.raises(TeacherError, match=r"without a projection, 6, got 5: set network\.head"):
        DistillationLoss(5, 6, config)


def test_shapes_that_do_not_fit_are_refused() -> None:
    loss = make_loss(6, 4)
    for student, teacher in (
        (drawn(6, 6), drawn(6, 4)),
        (drawn(2, 3, 5), drawn(2, 3, 4)),
        (drawn(2, 3, 6), drawn(2, 3, 6)),
        (drawn(2, 3, 6), drawn(3, 2, 4)),
    ):
        with pytest.raises(TeacherError, match="expected"):
            loss(student, teacher)
