"""The plan of a run before it trains: batch, length, learning rate, decays, size and disk; as text and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..data import SAMPLING_RATE, PlanSummary, SpeechSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.masking_dinosr import sample_span_mask
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.schedules import make_schedule
from ..utils.extras import import_extra
from .anchor_arguments import anchor_weights_at
from .base_model import keeps_codebooks
from .pretraining_arguments import DataArguments, PretrainingArguments, RunArguments
from .scaling import Change, changes_table, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BYTES_PER_WEIGHT = 4  # weights, averages and codebooks are float32 in any precision
ADAM_AVERAGES = 2
# Codewords start at random, and frames fall on those that have moved. A run whose first step took them a tenth of the
# way to their frames ended with 3 of 128 in use; the paper's takes them 98 % (docs/experiments-2026-11.md).
MIN_FIRST_MOVE = 0.5
# A teacher whose average spans more than this share of the run mostly remembers its random weights.
MAX_MEMORY_SHARE = 0.25


class PlanPoint(NamedTuple):
    """Update `step` of a run, counted from 1: hours of audio read so far, its learning rate and its decays."""

    step: int
    hours: float
    learning_rate: float
    codebook_decay: float
    ema_decay: float  # 1 if the teacher is frozen


def describe_left_out(data: DataArguments, source: SpeechSource, summary: PlanSummary) -> str:
    """Say how many recordings the first epoch leaves out, why, and name one of each kind."""
    min_samples = int(data.min_seconds * SAMPLING_RATE)
    short = [name for name, num_samples in source.utterances if num_samples < min_samples]
    names = {f"shorter than min_seconds={data.min_seconds:g}": short}
    names |= source.skipped
    found = [f"{len(ids):,} {reason} (such as {ids[0]})" for reason, ids in names.items() if ids]
    if (num_fast := summary.num_too_short - len(short)) > 0:
        found.append(f"{num_fast:,} shorter than that at their speed")
    if summary.num_dropped:
        found.append(f"{summary.num_dropped:,} that do not fill half a step, others in each epoch")
    cropped = f"; {summary.cropped_share:.1%} of the audio is cropped away" if summary.cropped_share else ""
    return (", ".join(found) or "no recording") + cropped


class RunPlan:
    """
    The plan of a run, made without training and without memory for weights; `str()` describes it.

    Args:
        arguments: Arguments of the run, after `scale_to_batch`.
        summary: Summary of the first epoch from `summarize_plan`. None for a stream, of which only the limits are
            known: steps are then taken as full, and utterances as half way between the shortest and the longest.
        world_size: Number of processes.
        changes: Changes that `scale_to_batch` made, to be part of the text.
        left_out: What the first epoch leaves out, to be part of the text, as `describe_left_out` returns it.

    Raises:
        ValueError: If the model or the schedule is impossible.
    """

    def __init__(
        self,
        arguments: PretrainingArguments,
        summary: PlanSummary | None,
        world_size: int = 1,
        *,
        changes: Sequence[Change] = (),
        left_out: str | None = None,
    ) -> None:
        data, run, config = arguments.data, arguments.run, arguments.model_config()
        self.arguments, self.config, self.world_size, self.changes = arguments, config, world_size, changes
        self.left_out, self.schedule = left_out, make_schedule(run)

        # The audio of a step over all processes, the mean length of what is read of an utterance, the mean number of
        # forward passes of a process in a step, the share of padding, and the length of the data.
        self.seconds_per_step, self.utterance_seconds = data.step_seconds, (data.min_seconds + data.max_seconds) / 2
        self.micro_batches: float = math.ceil(data.step_seconds / world_size / data.micro_seconds)
        self.padded_share: float | None = None
        self.steps_per_epoch: int | None = None
        if summary is not None:
            self.seconds_per_step = summary.seconds_per_step
            self.utterance_seconds = summary.hours * 3600 / summary.num_utterances
            self.micro_batches = summary.num_micro_batches / summary.num_steps / world_size
            self.padded_share, self.steps_per_epoch = summary.padded_share, summary.num_steps
        self.hours = run.max_steps * self.seconds_per_step / 3600

        # Masked frames of a step, estimated from the masks of 200 utterances.
        num_frames = config.num_frames(int(self.utterance_seconds * SAMPLING_RATE))
        shape, lengths, generator = (200, num_frames), [num_frames] * 200, np.random.default_rng(0)
        spans = (config.mask_prob, config.mask_length)
        mask = sample_span_mask(shape, *spans, min_spans=config.mask_min_spans, lengths=lengths, generator=generator)
        self.masked_share = float(mask.mean())
        self.masked_frames = self.masked_share * num_frames * self.seconds_per_step / self.utterance_seconds
        self.frames_per_codeword = self.masked_frames / config.codebook_size  # if all were in use
        # Share of the way from a random start to its frames that the first update takes an average codeword.
        decay = config.codebook_decay_at(0)
        taken = (1 - decay) * self.frames_per_codeword * config.codebook_update_steps
        self.first_move = taken / (decay + taken)  # counts begin at one

        with torch.device("meta"):
            weights = list(DinoSRForPreTraining(config).parameters())
        self.num_parameters = sum(weight.numel() for weight in weights)  # student, teacher, codebooks, heads
        self.num_trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        self.model_bytes = BYTES_PER_WEIGHT * self.num_parameters
        self.checkpoint_bytes = self.model_bytes + BYTES_PER_WEIGHT * ADAM_AVERAGES * self.num_trained
        self.num_saved_models = 1 + ((run.max_steps - 1) // run.save_steps if run.save_steps else 0)
        if run.eval_patience:
            self.num_saved_models += 1 + run.keep_checkpoints  # the best now, and those at checkpoints
        num_checkpoints = run.keep_checkpoints + 1  # and the one being written
        self.disk_bytes = self.num_saved_models * self.model_bytes + num_checkpoints * self.checkpoint_bytes

        # The first update, those at a quarter, half and three quarters of the run, and the last one.
        self.points = [self.at(max(1, round(run.max_steps * quarter / 4))) for quarter in range(5)]
        self.marks = _marks(run, config)
        self.notes = list(_notes(self))  # on what is unusual; none for the paper's run

    def at(self, step: int) -> PlanPoint:
        """Return learning rate and decays of update `step`, counted from 1, as its line of metrics will have them."""
        return PlanPoint(
            step=step,
            hours=step * self.seconds_per_step / 3600,
            learning_rate=self.arguments.run.learning_rate * self.schedule(step - 1),
            codebook_decay=self.config.codebook_decay_at(max(0, step - self.config.codebook_update_steps)),
            ema_decay=self.config.ema_decay_at(step),
        )

    def __str__(self) -> str:
        lines = [f"{name:<14}  {text}" for name, text in _rows(self).items()]
        if self.changes:
            lines += ["", changes_table(self.arguments, self.changes)]
        lines += ["", *_point_lines(self)]
        return "\n".join([*lines, *([""] if self.notes else []), *(f"Note: {note}" for note in self.notes)])


def _marks(run: RunArguments, config: DinoSRConfig) -> dict[str, int]:
    """Return the updates at which something begins or ends, by description, as far as they are in the run."""
    warmup_steps = int(run.max_steps * run.warmup_share)
    hold_steps = int(run.max_steps * run.hold_share) if run.schedule == "tri_stage" else 0
    has_linear_decay = config.ema_schedule == "linear" and config.ema_decay != config.ema_end_decay
    has_codebook_anneal = config.codebook_end_decay not in (None, config.codebook_decay)
    marks = {
        "warm-up ends": warmup_steps,
        "rate begins to fall": warmup_steps + hold_steps if hold_steps else 0,
        "EMA decay reaches its end": config.ema_anneal_steps if has_linear_decay else 0,
        "codebook decay reaches its end": config.codebook_end_decay_step if has_codebook_anneal else 0,
        "teacher frozen": config.teacher_stop_step or 0,
        "front end frozen": config.freeze_front_end_step or 0,
    }
    return {name: step for name, step in marks.items() if 0 < step <= run.max_steps}


def format_seconds(seconds: float) -> str:
    """Format a length of audio for reading: in seconds, minutes or hours."""
    if seconds < 6000:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _rows(plan: RunPlan) -> dict[str, str]:
    """Describe the run, a line each for step, masks, length, optimizer, model and disk."""
    data, run, config = plan.arguments.data, plan.arguments.run, plan.config
    number = format_value
    first, frozen = plan.points[0], config.teacher_stop_step
    padded = "" if plan.padded_share is None else f", {plan.padded_share:.1%} padding"
    if data.speed_change:
        padded += f"; speeds {1 - data.speed_change:.2f} to {1 + data.speed_change:.2f}"
    epochs = "a stream, so the number of epochs is not known"
    if plan.steps_per_epoch is not None:
        epochs = f"{run.max_steps / plan.steps_per_epoch:,.1f} epochs of {plan.steps_per_epoch:,} steps"
    freeze = "never frozen"
    if frozen is not None:
        freeze = f"frozen from update {frozen:,} on (freeze_mode {config.freeze_mode})"
    if config.freeze_front_end_step is not None:
        freeze += f"; front end frozen from update {config.freeze_front_end_step:,} on"

    def memory(decay: float, num_steps: int = 1) -> str:
        updates = num_steps / max(1 - decay, 1e-12)
        audio = format_seconds(plan.seconds_per_step * updates)
        return "everything" if decay >= 1 else f"{updates:,.0f} updates, {audio} of audio"

    rows = {
        "step": f"{format_seconds(plan.seconds_per_step)} of audio (step_seconds={number(data.step_seconds)}):"
        f" {plan.seconds_per_step / plan.utterance_seconds:,.1f} utterances of {plan.utterance_seconds:.1f} s{padded}",
        "forward passes": f"{plan.micro_batches:,.1f} per step in each of {plan.world_size} process(es), of at most"
        f" {number(data.micro_seconds)} s",
        **({} if plan.left_out is None else {"left out": plan.left_out}),
        "masked": f"{plan.masked_frames:,.0f} frames per step ({plan.masked_share:.1%}):"
        f" {plan.frames_per_codeword:,.1f} for each of {config.codebook_size} codewords",
        "updates": f"{run.max_steps:,}: {plan.hours:,.1f} hours of audio, {epochs}",
        "learning rate": f"{number(run.learning_rate)} after {int(run.max_steps * run.warmup_share):,} updates of"
        f" warm-up; {run.schedule}; finally {number(run.learning_rate * plan.schedule(run.max_steps))}",
        "Adam": f"betas {number(run.adam_beta1)}, {number(run.adam_beta2)}; epsilon {number(run.adam_epsilon)}; weight"
        f" decay {number(run.weight_decay)}; clipping {number(run.max_grad_norm) if run.max_grad_norm else 'off'}",
        "starts from": run.base_model or "random weights",
        "codebooks": f"{config.num_codebooks} of {config.codebook_size}, updated every {config.codebook_update_steps}"
        f" update(s); memory at first: {memory(first.codebook_decay, config.codebook_update_steps)}",
        "teacher": f"memory at first: {memory(first.ema_decay)}; {freeze}",
        "weights": f"{plan.num_trained:,} trained, {plan.num_parameters:,} with teacher and codebooks",
        "disk": f"{_gigabytes(plan.disk_bytes)}: {plan.num_saved_models:,} model(s) of {_gigabytes(plan.model_bytes)},"
        f" {run.keep_checkpoints} checkpoint(s) of {_gigabytes(plan.checkpoint_bytes)} and one being written",
    }
    return rows if run.anchor is None else rows | {"anchor": _describe_anchor(run, config)}


def _describe_anchor(run: RunArguments, config: DinoSRConfig) -> str:
    source = run.anchor if run.anchor_layer is None else f"layer {run.anchor_layer} of {run.anchor}"
    weights = [anchor_weights_at(run, step) for step in ((0, run.anchor_end_step) if run.anchor_end_step else (0,))]
    described = [
        f"weight {format_value(each.weight)} beside {config.num_codebooks} codebooks,"
        f" {format_value(each.unmasked_share)} of it on unmasked frames"
        for each in weights
        if each is not None
    ]
    end = f"; by update {run.anchor_end_step:,} {described[1]}" if run.anchor_end_step else ""
    return f"{config.num_anchor_labels} labels from {source}; {described[0]}{end}"


def _point_lines(plan: RunPlan) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [
        ("done", "update", "hours of audio", "learning rate", "EMA decay", "codebook decay")
    ]
    for quarter, point in enumerate(plan.points):
        values = map(format_value, (point.learning_rate, point.ema_decay, point.codebook_decay))
        rows.append((f"{quarter * 25} %", f"{point.step:,}", f"{point.hours:,.1f}", *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))


def _notes(plan: RunPlan) -> Iterator[str]:
    run, config, last = plan.arguments.run, plan.config, plan.points[-1]
    frozen = config.freeze_teacher_step
    if frozen is not None and frozen > run.max_steps:
        yield f"The teacher is never frozen in this run: freeze_teacher_step={frozen:,} is past the last update."
    ends = [
        ("codebook", config.codebook_decay, config.codebook_end_decay, last.codebook_decay, "codebook_end_decay_step")
    ]
    if config.ema_schedule == "linear" and not config.is_freeze_reached_at(run.max_steps):
        ends.insert(0, ("EMA", config.ema_decay, config.ema_end_decay, last.ema_decay, "ema_anneal_steps"))
    for decay, start, end, reached, name in ends:
        if end not in (None, start) and getattr(config, name) > run.max_steps:
            yield (
                f"The {decay} decay ends at {format_value(reached)} instead of {format_value(end)}:"
                f" {name}={getattr(config, name):,} is past the last update."
            )
    if run.fit_heads_steps >= run.max_steps:
        reach = f"fit_heads_steps={run.fit_heads_steps:,} reaches to the last of max_steps={run.max_steps:,}"
        yield f"Only heads and codebooks learn: {reach}. Lower it to train the network too."
    memory = 1 / max(1 - config.ema_decay, 1e-12)
    if run.base_model is None and memory > MAX_MEMORY_SHARE * run.max_steps:
        yield (
            f"The teacher averages over {memory:,.0f} updates, and the run has {run.max_steps:,}: it hardly leaves"
            " its initial weights. Lower ema_decay and ema_end_decay, or train longer."
        )
    if plan.first_move < MIN_FIRST_MOVE and not keeps_codebooks(plan.arguments):
        yield (
            f"The first update of the codebooks takes codewords {plan.first_move:.0%} of the way from their random"
            " start to their frames (the paper: 98 %), so few may stay in use. Lower codebook_decay, with"
            " codebook_end_decay and codebook_end_decay_step to raise it afterwards, raise step_seconds or"
            " codebook_update_steps, or let unused codewords start anew with codebook_revival_share."
        )
    ratio = plan.arguments.data.step_seconds / run.reference_step_seconds
    averages = ("codebook_decay", "ema_decay", "ema_end_decay")
    is_default = all(getattr(config, name) == getattr(DinoSRConfig, name) for name in averages)
    if not plan.changes and not 0.5 <= ratio <= 2 and is_default:
        yield (
            f"A step has {ratio:.3g} times the audio of the paper's, but the decays are the paper's: averages cover"
            f" {'less' if ratio < 1 else 'more'} audio. Set scale_to_batch to adapt them."
        )


def _show_decay(axes: Axes, steps: Sequence[int], decays: Sequence[float], name: str) -> None:
    """Draw a decay so that 0.99 and 0.999 are as far apart as 0.999 and 0.9999; nothing where it is 1."""
    ticker: Any = import_extra("matplotlib.ticker", "analysis")
    lacking = np.array([math.nan if decay >= 1 else 1 - decay for decay in decays])
    low, high = (np.nanmin(lacking), np.nanmax(lacking)) if np.isfinite(lacking).any() else (1e-3, 1e-1)
    axes.set_yscale("log")
    axes.set_ylim(high * 2, low / 2)
    axes.plot(steps, lacking, color="C0")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0,)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{1 - value:.8g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(name, fontsize=8)


def plan_figure(plan: RunPlan) -> Figure:
    """
    Draw learning rate, EMA decay and codebook decay over the run, with the updates at which something changes.

    Returns a `matplotlib.figure.Figure`, made without pyplot: `figure.savefig("plan.png", dpi=150)`. Raises
    `ImportError` if matplotlib is not installed.
    """
    last, marks = plan.arguments.run.max_steps, plan.marks
    # With the updates on both sides of each mark, or a jump would look like a slope.
    beside = {min(max(1, step + offset), last) for step in marks.values() for offset in (-1, 0, 1)}
    steps = sorted(beside.union(np.linspace(1, last, 600).astype(int).tolist()))
    points = [plan.at(step) for step in steps]

    figure: Any = import_extra("matplotlib.figure", "analysis").Figure(figsize=(7.2, 5.4), layout="constrained")
    rate, ema, codebook = figure.subplots(3, sharex=True)
    rate.plot(steps, [point.learning_rate for point in points], color="C0")
    rate.set_ylim(0, None)
    rate.yaxis.set_major_formatter("{x:.4g}")
    rate.set_ylabel("learning rate", fontsize=8)
    _show_decay(ema, steps, [point.ema_decay for point in points], "EMA decay")
    _show_decay(codebook, steps, [point.codebook_decay for point in points], "codebook decay")
    shown_in = {"warm-up ends": rate, "rate begins to fall": rate, "codebook decay reaches its end": codebook}
    for name, step in marks.items():
        axes, side = shown_in.get(name, ema), "right" if step > 0.6 * last else "left"
        axes.axvline(step, color="0.6", linewidth=0.8, linestyle="--")
        place = {"xy": (step, 0.06), "xycoords": ("data", "axes fraction"), "ha": side}
        axes.annotate(f" {name}: {step:,}", **place, fontsize=7)
    if "teacher frozen" in marks:
        ema.axvspan(marks["teacher frozen"], last, color="0.92", zorder=0)
    codebook.set_xlabel("updates", fontsize=8)
    codebook.set_xlim(0, last)
    codebook.xaxis.set_major_formatter("{x:,.0f}")
    per_hour = 3600 / plan.seconds_per_step
    hours = rate.secondary_xaxis("top", functions=(lambda step: step / per_hour, lambda hour: hour * per_hour))
    hours.set_xlabel("hours of audio", fontsize=8)
    hours.xaxis.set_major_formatter("{x:,.6g}")
    for axes in (rate, ema, codebook, hours):
        axes.tick_params(labelsize=7, length=2)
    return figure
