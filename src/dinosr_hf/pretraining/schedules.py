"""Schedules of the learning rate, as factors of its peak."""

from __future__ import annotations

# Where the warm-up begins, as a share of the peak.
INITIAL_LR_SCALE = 0.01


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
    if step < warmup_steps:
        return INITIAL_LR_SCALE + (1 - INITIAL_LR_SCALE) * step / warmup_steps
    if step < decay_start:
        return 1.0
    done = min(1.0, (step - decay_start) / max(1, max_steps - decay_start))
    return final_lr_scale**done
