"""Learning-rate schedules: functions of the step, by name. Imports no torch.

Every schedule begins with a linear warm-up from 0 to `max_lr`. To add one, write a function of a step after the warm-up
and add it to `SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run."""

    name: str
    """A key of `SCHEDULES`."""
    max_lr: float
    min_lr: float
    num_warmup_steps: int
    num_decay_steps: int
    """The step at which the schedule ends, warm-up included; from there on the rate stays at its final value."""
    decay_fraction: float = 0.2
    """Share of the schedule that `wsd` spends decaying, at its end."""

    def progress(self, step: int) -> float:
        """Share of the steps between the warm-up and the end of the schedule that are done, from 0 to 1."""
        num_steps = self.num_decay_steps - self.num_warmup_steps
        return 1.0 if step >= self.num_decay_steps else (step - self.num_warmup_steps) / num_steps


def _cosine(step: int, schedule: Schedule) -> float:
    """Half a cosine from `max_lr` to `min_lr` (Loshchilov & Hutter 2017, section 3)."""
    if step >= schedule.num_decay_steps:
        return schedule.min_lr
    cosine = math.cos(math.pi * schedule.progress(step))
    return schedule.min_lr + (schedule.max_lr - schedule.min_lr) * 0.5 * (1 + cosine)


def _linear(step: int, schedule: Schedule) -> float:
    """A straight line from `max_lr` to `min_lr`."""
    return _interpolate(schedule, schedule.progress(step))


def _wsd(step: int, schedule: Schedule) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4), here with a linear decay to `min_lr`."""
    num_steps = round(schedule.decay_fraction * schedule.num_decay_steps)
    start = max(schedule.num_warmup_steps, schedule.num_decay_steps - num_steps)
    if step < start:
        return schedule.max_lr
    if step >= schedule.num_decay_steps:
        return schedule.min_lr
    return _interpolate(schedule, (step - start) / (schedule.num_decay_steps - start))


def _interpolate(schedule: Schedule, progress: float) -> float:
    """The straight line from `max_lr` to `min_lr`, exact at both ends."""
    return schedule.max_lr * (1 - progress) + schedule.min_lr * progress


def _constant(step: int, schedule: Schedule) -> float:
    """`max_lr` throughout; `min_lr` and `num_decay_steps` have no effect."""
    return schedule.max_lr


SCHEDULES: dict[str, Callable[[int, Schedule], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}
"""Every schedule by the name that `lr_schedule` takes."""


def learning_rate(step: int, schedule: Schedule) -> float:
    """The learning rate of the update that follows `step` updates; the first is 0 where there is a warm-up."""
    if step < schedule.num_warmup_steps:
        return schedule.max_lr * step / schedule.num_warmup_steps
    return SCHEDULES[schedule.name](step, schedule)
