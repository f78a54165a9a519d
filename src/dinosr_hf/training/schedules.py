"""Learning rate schedules, as factors of the peak rate. All start with the same warm-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from ..utils.command_line import ArgumentError

# Factor at which the warm-up starts.
INITIAL_LR_SCALE = 0.01


def _warm_up(step: int, warmup_steps: int) -> float:
    """Rise linearly from `INITIAL_LR_SCALE` to 1 over `warmup_steps`, then stay at 1."""
    if step >= warmup_steps:
        return 1.0
    return INITIAL_LR_SCALE + (1 - INITIAL_LR_SCALE) * step / warmup_steps


def tri_stage(step: int, *, max_steps: int, warmup_share: float, hold_share: float, final_lr_scale: float) -> float:
    """
    Return the factor of the peak rate, in (0, 1], of the paper's schedule (Section 4.1) after `step` updates.

    It rises linearly from 1 % in `warmup_share` of the `max_steps`, holds for `hold_share` of them, and decays
    exponentially to `final_lr_scale` in the rest.
    """
    warmup_steps = int(max_steps * warmup_share)
    decay_start = warmup_steps + int(max_steps * hold_share)
    if step < decay_start:
        return _warm_up(step, warmup_steps)
    done = min(1.0, (step - decay_start) / max(1, max_steps - decay_start))
    return final_lr_scale**done


def cosine(step: int, *, max_steps: int, warmup_share: float, final_lr_scale: float) -> float:
    """As `tri_stage`, with half a cosine after the warm-up (Loshchilov and Hutter, arXiv 1608.03983; no restarts)."""
    warmup_steps = int(max_steps * warmup_share)
    if step < warmup_steps:
        return _warm_up(step, warmup_steps)
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_lr_scale + (1 - final_lr_scale) * (1 + math.cos(math.pi * done)) / 2


def constant(step: int, *, max_steps: int, warmup_share: float) -> float:
    """As `tri_stage`, with the peak rate after the warm-up: for runs whose end is not known yet."""
    return _warm_up(step, int(max_steps * warmup_share))


# Each schedule, and the run arguments that it reads besides the step.
SCHEDULES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "tri_stage": (tri_stage, ("max_steps", "warmup_share", "hold_share", "final_lr_scale")),
    "cosine": (cosine, ("max_steps", "warmup_share", "final_lr_scale")),
    "constant": (constant, ("max_steps", "warmup_share")),
}


def make_schedule(options: Any) -> Callable[[int], float]:
    """
    Return the schedule that the arguments of a run ask for: from completed updates to the factor of the peak rate.

    `options` is a dataclass with `schedule` and all that `SCHEDULES` lists. Warns if `hold_share` or `final_lr_scale`
    was set and the schedule ignores it. Raises `ArgumentError` if there is no schedule of this name.
    """
    if options.schedule not in SCHEDULES:
        raise ArgumentError(f"schedule={options.schedule} is unknown. Choose one of {', '.join(SCHEDULES)}.")
    function, names = SCHEDULES[options.schedule]
    defaults = {spec.name: spec.default for spec in fields(options)}
    for name in ("hold_share", "final_lr_scale"):
        value = getattr(options, name)
        if name not in names and value != defaults[name]:
            warnings.warn(f"{name}={value} is ignored: schedule={options.schedule} does not use it.", stacklevel=2)
    return partial(function, **{name: getattr(options, name) for name in names})
