"""
Scaling of the paper's recipe, which was chosen for steps of 63 minutes of audio, to steps of another size.

With `kappa`, the audio of a step over that of the reference step (1/8, say), four things are kept:

- **How far the weights get with the same audio, and how noisily.** The square root rule for Adam (Malladi et al.,
  arXiv 2205.10287): learning rate times sqrt(kappa), epsilon over sqrt(kappa). It is derived for gradients that are
  mostly noise, as those of small batches are. Weight decay scales as the learning rate, as AdamW multiplies the two;
  the norm at which gradients are clipped scales as epsilon, as both are compared with gradients.
- **The memory of every average, in audio.** A decay `d` per step becomes `d ** kappa`: for the teacher this is the EMA
  scaling rule (Busbridge et al., arXiv 2307.13813). It holds for Adam's two averages for the same reason. Malladi et
  al. write `1 - kappa (1 - d)` for Adam, which is the same to first order in `1 - d`; the power also holds if `1 - d`
  is large, keeps the variance of the average to second order, and stays positive for steps more than ten times the
  reference.
- **The frames that move a codeword.** A small batch has too few of them: the first codewords to leave their random
  start take all. So the codebooks keep their decay, and are updated every 1 / kappa steps, with the frames of all
  of these.
- **The audio at which something happens.** Step numbers, the length of the run among them, are divided by kappa.

What concerns the machine and not the result, such as `log_steps` and `checkpoint_steps`, stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..utils.command_line import ArgumentError
from .pretraining_arguments import PretrainingArguments


class Change(NamedTuple):
    """A scaled argument: its name, the values for the reference step and for this run, and the rule in a few words."""

    name: str
    before: float
    after: float
    why: str


def format_value(value: float) -> str:
    """Format a number: integers in full, decays with three digits of their distance to 1, others with four digits."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    if 0.5 <= value < 1:
        return f"{value:.{2 - math.floor(math.log10(1 - value))}f}".rstrip("0")
    return f"{value:.4g}"


def _steps(value: int, kappa: float) -> int:
    """Keep at least 1, and 0 for off."""
    return max(1, round(value / kappa)) if value else 0


def _freeze_step(value: int, kappa: float) -> int:
    """Scale the number of the teacher's moves: the freeze is at the step after the last one."""
    return _steps(value - 1, kappa) + 1 if value > 1 else value


def _power(value: float, kappa: float) -> float:
    return value if math.isclose(kappa, 1) else float(value) ** kappa


def _times(value: float, kappa: float) -> float:
    return value * kappa


def _root(value: float, kappa: float) -> float:
    return value * math.sqrt(kappa)


def _inverse_root(value: float, kappa: float) -> float:
    return value / math.sqrt(kappa)


# Names of arguments, the function that scales them, and the rule in a few words.
Rule = tuple[str, Callable[[Any, float], float], str]
RUN_RULES: tuple[Rule, ...] = (
    ("max_steps", _steps, "steps / kappa: the same audio in total"),
    ("learning_rate", _root, "times sqrt(kappa): square root rule for Adam"),
    ("adam_beta1 adam_beta2", _power, "to the power of kappa: the same memory in audio"),
    ("adam_epsilon", _inverse_root, "over sqrt(kappa): gradients are that much noisier"),
    ("weight_decay", _root, "times sqrt(kappa): the same decay for the same audio"),
    ("max_grad_norm", _inverse_root, "over sqrt(kappa): gradients are that much noisier"),
    ("save_steps eval_steps anchor_end_step fit_heads_steps", _steps, "steps / kappa: at the same audio"),
)
MODEL_RULES: tuple[Rule, ...] = (
    ("codebook_update_steps", _steps, "steps / kappa: updated by the frames of the same audio"),
    ("codebook_end_decay_step", _steps, "steps / kappa: at the same audio"),
    ("ema_decay ema_end_decay", _power, "to the power of kappa: EMA scaling rule"),
    ("ema_anneal_steps freeze_front_end_step", _steps, "steps / kappa: at the same audio"),
    ("freeze_teacher_step", _freeze_step, "steps / kappa: at the same audio"),
)
EXPONENTIAL_RULES: tuple[Rule, ...] = (  # of `ema_schedule`
    ("ema_timescale", _steps, "steps / kappa: at the same audio"),
    ("ema_threshold", _times, "times kappa: the teacher stops at the same audio"),
)


def _scale(group: Any, rules: Sequence[Rule], kappa: float) -> tuple[Any, list[Change]]:
    """Return the group with scaled values, and the changes; None stays None."""
    changes = []
    for names, scale, why in rules:
        for name in names.split():
            before = getattr(group, name)
            if before is not None and (after := scale(before, kappa)) != before:
                changes.append(Change(name, before, after, why))
    return dataclasses.replace(group, **{change.name: change.after for change in changes}), changes


def scale_to_batch(arguments: PretrainingArguments) -> tuple[PretrainingArguments, list[Change]]:
    """
    Scale the arguments from steps of `reference_step_seconds`, for which they were chosen, to `step_seconds`.

    Returns the arguments with `scale_to_batch` off, so that a file of them starts the same run and is not scaled
    twice, and the changes; if it is off already, the arguments as they are.

    Raises:
        ArgumentError: If `reference_step_seconds` or `step_seconds` is not more than 0.
    """
    if not arguments.run.scale_to_batch:
        return arguments, []
    reference, seconds = arguments.run.reference_step_seconds, arguments.data.step_seconds
    for name, value in (("reference_step_seconds", reference), ("step_seconds", seconds)):
        if not 0 < value < math.inf:
            raise ArgumentError(f"{name}={value} is out of range: scale_to_batch needs more than 0 seconds.")
    kappa = seconds / reference
    run, changes = _scale(arguments.run, RUN_RULES, kappa)
    is_exponential = arguments.model.ema_schedule == "exponential"
    rules = (*MODEL_RULES, *(EXPONENTIAL_RULES if is_exponential else ()))
    model, model_changes = _scale(arguments.model, rules, kappa)
    # The steps between their updates keep the codebooks' memory in audio, but for rounding to whole steps.
    exponent = kappa * model.codebook_update_steps / arguments.model.codebook_update_steps
    rule = ("codebook_decay codebook_end_decay", _power, f"to the power of {exponent:.3g}: makes up for rounding")
    model, decay_changes = _scale(model, [rule], exponent)
    run = dataclasses.replace(run, scale_to_batch=False)
    return dataclasses.replace(arguments, model=model, run=run), [*changes, *model_changes, *decay_changes]


def changes_table(arguments: PretrainingArguments, changes: Sequence[Change]) -> str:
    """Format what `scale_to_batch` returned, as a heading and a line for each change."""
    kappa = arguments.data.step_seconds / arguments.run.reference_step_seconds
    rows = [(change.name, format_value(change.before), format_value(change.after), change.why) for change in changes]
    name, before, after, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {row[0]:<{name}}  {row[1]:>{before}} -> {row[2]:>{after}}  {row[3]}" for row in rows]
    return "\n".join([f"scale_to_batch: a step is {kappa:.4g} (kappa) times the reference step.", *lines])
