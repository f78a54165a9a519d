"""
The paper's recipe for another batch: what was chosen for a step of 63 minutes of audio, for a step of yours.

With `kappa`, the audio of a step over that of the reference step (1/8, say), three things are kept:

- **How far the weights get with the same audio, and how noisily.** The square root rule for Adam (Malladi et al.,
  arXiv 2205.10287): learning rate times sqrt(kappa), epsilon over sqrt(kappa). It is derived for gradients that are
  mostly noise, as those of small batches are. Weight decay goes with the learning rate, as AdamW multiplies the two;
  the norm at which gradients are clipped goes with epsilon, as both are compared with gradients.
- **The memory of every average, in audio.** A decay `d` a step becomes `d ** kappa`: for the teacher this is the EMA
  scaling rule (Busbridge et al., arXiv 2307.13813). It holds for Adam's two averages for the same
  reason; Malladi et al. write `1 - kappa (1 - d)` for Adam, which is the same to first order in `1 - d`; the power
  also holds where `1 - d` is large, keeps the variance of the average to second order, and stays positive for steps
  more than ten times the reference.
- **The frames that move a codeword.** A small batch has too few of them: the first codewords to leave their random
  start take all. So the codebooks keep their decay, and are updated every 1 / kappa steps, with the frames of all
  of these.
- **The audio at which something happens.** Step numbers, the run's length among them, are divided by kappa.

What counts for the machine rather than for the result, such as `log_steps` and `checkpoint_steps`, stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..utils.command_line import ArgumentError
from .pretraining_arguments import PretrainingArguments


class Change(NamedTuple):
    """
    A value that was scaled.

    Attributes:
        name: Of the argument.
        before: Value for the reference step.
        after: Value for this run.
        why: The rule, in a few words.
    """

    name: str
    before: float
    after: float
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {format_value(self.before)} -> {format_value(self.after)} ({self.why})"


def format_value(value: float) -> str:
    """A number to read: whole ones in full, decays with what they lack to 1 to three digits, others to four digits."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    if 0.5 <= value < 1:
        return f"{value:.{2 - math.floor(math.log10(1 - value))}f}".rstrip("0")
    return f"{value:.4g}"


def _steps(value: int, kappa: float) -> int:
    """At least 1 where there was one; 0 stands for off."""
    return max(1, round(value / kappa)) if value else 0


def _freeze_step(value: int, kappa: float) -> int:
    """The freeze is at the step after the teacher's last move, so it is the moves that are counted."""
    return _steps(value - 1, kappa) + 1 if value > 1 else value


def _power(value: float, kappa: float) -> float:
    return float(value) ** kappa


def _kept(value: float, exponent: float) -> float:
    """A decay to a power; itself where the power is 1 but for rounding."""
    return value if math.isclose(exponent, 1) else float(value) ** exponent


def _root(value: float, kappa: float) -> float:
    return value * math.sqrt(kappa)


def _inverse_root(value: float, kappa: float) -> float:
    return value / math.sqrt(kappa)


Rule = tuple[tuple[str, ...], Callable[[Any, float], float], str]
RUN_RULES: tuple[Rule, ...] = (
    (("max_steps",), _steps, "steps / kappa: the same audio in all"),
    (("learning_rate",), _root, "times sqrt(kappa): square root rule for Adam"),
    (("adam_beta1", "adam_beta2"), _power, "to the power of kappa: the same memory in audio"),
    (("adam_epsilon",), _inverse_root, "over sqrt(kappa): gradients are noisier by that"),
    (("weight_decay",), _root, "times sqrt(kappa): the same shrinking for the same audio"),
    (("max_grad_norm",), _inverse_root, "over sqrt(kappa): gradients are noisier by that"),
    (("save_steps", "eval_steps"), _steps, "steps / kappa: at the same audio"),
)
MODEL_RULES: tuple[Rule, ...] = (
    (("codebook_update_steps",), _steps, "steps / kappa: moved by the frames of the same audio"),
    (("codebook_end_decay_step",), _steps, "steps / kappa: at the same audio"),
    (("ema_decay", "ema_end_decay"), _power, "to the power of kappa: EMA scaling rule"),
    (("ema_anneal_steps",), _steps, "steps / kappa: at the same audio"),
    (("freeze_teacher_step",), _freeze_step, "steps / kappa: at the same audio"),
)


def _scale(group: Any, rules: Sequence[Rule], kappa: float) -> tuple[Any, list[Change]]:
    """The group with scaled values, and the changes; None stays None."""
    changes = []
    for names, rule, why in rules:
        for name in names:
            before = getattr(group, name)
            if before is None:
                continue
            after = rule(before, kappa)
            if after != before:
                changes.append(Change(name, before, after, why))
    return dataclasses.replace(group, **{change.name: change.after for change in changes}), changes


def scale_to_batch(arguments: PretrainingArguments) -> tuple[PretrainingArguments, list[Change]]:
    """
    Take the arguments as meant for steps of `reference_step_seconds`, and scale them to steps of `step_seconds`.

    Args:
        arguments: As read. Where `scale_to_batch` is off, there is nothing to do.

    Returns:
        The arguments of the run, with `scale_to_batch` off: written to a file they start the same run, and are not
        scaled twice. And what changed.

    Raises:
        ArgumentError: If `reference_step_seconds` or `step_seconds` is not more than 0, or a scaled value is one that
            no run can have.
    """
    if not arguments.run.scale_to_batch:
        return arguments, []
    for name, seconds in (
        ("reference_step_seconds", arguments.run.reference_step_seconds),
        ("step_seconds", arguments.data.step_seconds),
    ):
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ArgumentError(f"{name}={seconds} is out of range: scale_to_batch needs more than 0 seconds.")
    kappa = arguments.data.step_seconds / arguments.run.reference_step_seconds
    run, changes = _scale(arguments.run, RUN_RULES, kappa)
    model, model_changes = _scale(arguments.model, MODEL_RULES, kappa)
    # The codebooks' memory in audio is kept by the steps between their updates. Being whole, these cannot keep all.
    exponent = kappa * model.codebook_update_steps / arguments.model.codebook_update_steps
    decays = (("codebook_decay", "codebook_end_decay"), _kept, f"to the power of {exponent:.3g}: what rounding leaves")
    model, decay_changes = _scale(model, (decays,), exponent)
    model_changes += decay_changes
    run = dataclasses.replace(run, scale_to_batch=False)
    return dataclasses.replace(arguments, model=model, run=run), [*changes, *model_changes]


def changes_table(changes: Sequence[Change], kappa: float) -> str:
    """
    What `scale_to_batch` changed, as lines of text.

    Args:
        changes: As it gave them.
        kappa: Audio of a step over that of the reference step.

    Returns:
        A heading and a line for each change; one line where there is none.
    """
    if not changes:
        return f"scale_to_batch: a step is the reference step (kappa {kappa:.4g}); nothing is changed."
    rows = [(change.name, format_value(change.before), format_value(change.after), change.why) for change in changes]
    name, before, after = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"  {row[0]:<{name}}  {row[1]:>{before}} -> {row[2]:>{after}}  {row[3]}" for row in rows]
    return "\n".join([f"scale_to_batch: a step is {kappa:.4g} (kappa) of the reference step.", *lines])
