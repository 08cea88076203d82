"""Warnings while training goes on."""

import pytest

from model.health import PATIENCE, HealthWatch

FINE = {
    "effective_positions": 40.0,
    "triplet": 0.2,
    "positive": 3.0,
    "negative": 4.0,
    "wrong_logit": -1.0,
}


def watch(*, has_attention: bool = True, margin: float | None = 0.3) -> HealthWatch:
    return HealthWatch(128, margin, has_attention=has_attention)


def warnings(health: HealthWatch, window: dict[str, float], times: int = PATIENCE) -> list[str]:
    return [text for _ in range(times) for text in health.look(window)]


def test_a_healthy_run_hears_nothing() -> None:
    assert warnings(watch(), FINE, times=50) == []


@pytest.mark.parametrize(
    ("sign", "said"),
    [
        ({"effective_positions": 1.02}, "saturates: 1.02"),
        ({"effective_positions": 127.0}, "collapsed to uniform"),
        ({"triplet": 0.3, "positive": 0.001}, "sticks at the margin"),
    ],
)
def test_each_bad_sign_is_told_once(sign: dict[str, float], said: str) -> None:
    health = watch()

    assert warnings(health, FINE | sign, times=PATIENCE - 1) == []
    [text] = warnings(health, FINE | sign, times=20)
    assert said in text


def test_wrong_logits_that_rise_together_are_told() -> None:
    health = watch()
    health.look(FINE | {"wrong_logit": 0.0})

    [text] = warnings(health, FINE | {"wrong_logit": 2.2})

    assert "wrong-class logits rise together (mean 2.20)" in text


def test_one_odd_window_is_not_told() -> None:
    health = watch()

    for _ in range(10):
        assert warnings(health, FINE | {"effective_positions": 1.0}, times=PATIENCE - 1) == []
        assert warnings(health, FINE, times=1) == []


def test_a_plain_average_is_no_collapse() -> None:
    """Without attention the maps are uniform because they are meant to be."""
    health = watch(has_attention=False)

    assert warnings(health, FINE | {"effective_positions": 128.0}, times=20) == []


def test_a_hard_triplet_loss_with_long_distances_is_no_collapse() -> None:
    assert warnings(watch(), FINE | {"triplet": 0.3, "positive": 5.0}, times=20) == []


def test_losses_that_are_not_there_are_not_missed() -> None:
    window = {"effective_positions": 40.0}

    assert warnings(watch(margin=None), window, times=20) == []
