"""Every schedule is its closed form, and goes through the points that users expect."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from distgpt.optim.schedules import SCHEDULES, Schedule, learning_rate


def schedule(name: str = "cosine", warmup: int = 10, decay: int = 100, fraction: float = 0.2) -> Schedule:
    return Schedule(
        name, max_lr=5e-4, min_lr=1e-4, num_warmup_steps=warmup, num_decay_steps=decay, decay_fraction=fraction
    )


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(10, 2000), (0, 10), (10, 10), (1, 1), (0, 1)])
def test_cosine_and_linear_rise_fall_and_stay(name: str, warmup: int, steps: int) -> None:
    rates = [learning_rate(step, schedule(name, warmup, steps)) for step in range(steps + 5)]
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a > b for a, b in pairwise(rates[warmup : steps + 1]))
    assert rates[steps:] == [1e-4] * 5
    middle = (warmup + steps) / 2
    if middle.is_integer() and steps > warmup:
        assert rates[int(middle)] == pytest.approx(3e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_linearly_from_zero(name: str) -> None:
    for step in range(10):
        assert learning_rate(step, schedule(name)) == pytest.approx(5e-4 * step / 10)
    assert learning_rate(10, schedule(name)) == 5e-4
    assert learning_rate(0, schedule(name, warmup=0)) == 5e-4


def test_cosine_is_half_a_cosine() -> None:
    for step in range(10, 101):
        expected = 1e-4 + 4e-4 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert learning_rate(step, schedule()) == pytest.approx(expected)


def test_linear_is_a_straight_line() -> None:
    rates = [learning_rate(step, schedule("linear")) for step in range(10, 101)]
    assert all(a - b == pytest.approx(4e-4 / 90) for a, b in pairwise(rates))


def test_wsd_is_flat_and_then_a_straight_line() -> None:
    rates = [learning_rate(step, schedule("wsd")) for step in range(106)]
    assert rates[10:81] == [5e-4] * 71  # it decays in the last fifth of 100 steps
    assert all(a - b == pytest.approx(4e-4 / 20) for a, b in pairwise(rates[80:101]))
    assert rates[100:] == [1e-4] * 6


def test_wsd_never_decays_during_the_warmup() -> None:
    rates = [learning_rate(step, schedule("wsd", warmup=90)) for step in range(101)]
    assert rates[90] == 5e-4 and rates[100] == 1e-4


def test_constant_stays_beyond_the_horizon() -> None:
    assert {learning_rate(step, schedule("constant")) for step in range(10, 300)} == {5e-4}


@pytest.mark.parametrize("name", ["wsd", "constant"])
def test_a_longer_horizon_changes_no_step_of_the_flat_part(name: str) -> None:
    """So a run can be extended while it is there."""
    for step in range(80):
        assert learning_rate(step, schedule(name)) == learning_rate(step, schedule(name, decay=500))
