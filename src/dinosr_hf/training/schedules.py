"""Schedules of the learning rate, as factors of its peak. All of them begin with the same warm-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from ..utils.command_line import ArgumentError

# Where the warm-up begins, as a share of the peak.
INITIAL_LR_SCALE = 0.01


def _warm_up(step: int, warmup_steps: int) -> float:
    """Linear from `INITIAL_LR_SCALE` to 1 over `warmup_steps`, then 1."""
    if step >= warmup_steps:
        return 1.0
    return INITIAL_LR_SCALE + (1 - INITIAL_LR_SCALE) * step / warmup_steps


def tri_stage(step: int, *, max_steps: int, warmup_share: float, hold_share: float, final_lr_scale: float) -> float:
    """
    The paper's schedule (Section 4.1): linear warm-up, constant, exponential decay.

    Args:
        step: Updates completed, from 0.
        max_steps: Updates of the run.
        warmup_share: Share of the updates in which the rate rises from 1 % of the peak.
        hold_share: Share of the updates in which it stays at the peak; what remains is decay.
        final_lr_scale: Factor at the last update and after it.

    Returns:
        Factor of the peak rate, in (0, 1].
    """
    warmup_steps = int(max_steps * warmup_share)
    decay_start = warmup_steps + int(max_steps * hold_share)
    if step < decay_start:
        return _warm_up(step, warmup_steps)
    done = min(1.0, (step - decay_start) / max(1, max_steps - decay_start))
    return final_lr_scale**done


def cosine(step: int, *, max_steps: int, warmup_share: float, final_lr_scale: float) -> float:
    """
    Linear warm-up, then half a cosine down to the last rate (Loshchilov and Hutter, arXiv 1608.03983; no restarts).

    Args:
        step: Updates completed, from 0.
        max_steps: Updates of the run.
        warmup_share: Share of the updates in which the rate rises from 1 % of the peak.
        final_lr_scale: Factor at the last update and after it.

    Returns:
        Factor of the peak rate, in (0, 1].
    """
    warmup_steps = int(max_steps * warmup_share)
    if step < warmup_steps:
        return _warm_up(step, warmup_steps)
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_lr_scale + (1 - final_lr_scale) * (1 + math.cos(math.pi * done)) / 2


def constant(step: int, *, max_steps: int, warmup_share: float) -> float:
    """
    Linear warm-up, then the peak: for runs whose end is not known yet.

    Args:
        step: Updates completed, from 0.
        max_steps: Updates of the run.
        warmup_share: Share of the updates in which the rate rises from 1 % of the peak.

    Returns:
        Factor of the peak rate, in (0, 1].
    """
    return _warm_up(step, int(max_steps * warmup_share))


# What each schedule reads of the arguments of a run, besides the step.
SCHEDULES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "tri_stage": (tri_stage, ("max_steps", "warmup_share", "hold_share", "final_lr_scale")),
    "cosine": (cosine, ("max_steps", "warmup_share", "final_lr_scale")),
    "constant": (constant, ("max_steps", "warmup_share")),
}


def make_schedule(options: Any) -> Callable[[int], float]:
    """
    The schedule that a run is told to use.

    Warns where `hold_share` or `final_lr_scale` was set and the schedule has no use for it.

    Args:
        options: A dataclass, the arguments of a run; its `schedule`, `max_steps`, `warmup_share`, `hold_share` and
            `final_lr_scale` count.

    Returns:
        A function, which can be pickled, of the updates completed to the factor of the peak rate.

    Raises:
        ArgumentError: If there is no schedule of this name.
    """
    if options.schedule not in SCHEDULES:
        raise ArgumentError(f"schedule={options.schedule} is unknown. Choose one of {', '.join(SCHEDULES)}.")
    function, names = SCHEDULES[options.schedule]
    defaults = {spec.name: spec.default for spec in fields(options)}
    for name in ("hold_share", "final_lr_scale"):
        value = getattr(options, name)
        if name not in names and value != defaults[name]:
            warnings.warn(f"{name}={value} counts for nothing: schedule={options.schedule} has none.", stacklevel=2)
    return partial(function, **{name: getattr(options, name) for name in names})
