"""
What a run comes to before it runs: batch, length, rates and decays on the way, weights and disk; as text and picture.

`N` codebooks, `V` codewords, `B` batch, `T` frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..data import SAMPLING_RATE, PlanSummary
from ..model.configuration_dinosr import DinoSRConfig
from ..model.masking_dinosr import sample_span_mask
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.schedules import make_schedule
from ..utils.extras import import_extra
from .pretraining_arguments import PretrainingArguments
from .scaling import Change, changes_table, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BYTES_PER_WEIGHT = 4  # weights, averages and codebooks are float32 in any precision
ADAM_AVERAGES = 2
# Codewords start at random, and frames fall on those that have moved. Where the first step took them a tenth of the
# way, one run ended with 3 of 128 in use; the paper's takes them 98 % (docs/experiments.md).
LEAST_FIRST_MOVE = 0.5
# A teacher with a longer memory than this share of the run mostly remembers its random weights.
LONGEST_MEMORY_SHARE = 0.25


class PlanPoint(NamedTuple):
    """
    A moment of a run.

    Attributes:
        step: Updates completed.
        hours: Audio read so far.
        learning_rate: Of this update.
        codebook_decay: Of this update.
        ema_decay: Of this update; 1 where the teacher stands still.
    """

    step: int
    hours: float
    learning_rate: float
    codebook_decay: float
    ema_decay: float


@dataclass(frozen=True)
class RunPlan:
    """
    What a run comes to; `str()` is for reading.

    Attributes:
        arguments: Of the run, scaled where `scale_to_batch` asked for it.
        config: Of the model.
        schedule: Updates completed to the factor of the peak learning rate.
        world_size: Number of processes.
        seconds_per_step: Audio of an optimizer step, over all processes.
        utterance_seconds: Mean length of the parts of utterances that are read.
        micro_batches: Forward passes of a process in a step, on average.
        padded_share: Share of what the model reads that is padding; None if that is not known beforehand.
        steps_per_epoch: None where the data is a stream, whose end is not known.
        masked_share: Share of the frames that is masked.
        masked_frames: Masked frames of a step.
        num_parameters: All weights: student, teacher, codebooks, heads.
        num_trained: Those that the optimizer trains.
        changes: What `scale_to_batch` changed.
    """

    arguments: PretrainingArguments
    config: DinoSRConfig
    schedule: Callable[[int], float]
    world_size: int
    seconds_per_step: float
    utterance_seconds: float
    micro_batches: float
    padded_share: float | None
    steps_per_epoch: int | None
    masked_share: float
    masked_frames: float
    num_parameters: int
    num_trained: int
    changes: Sequence[Change]

    @property
    def frames_per_codeword(self) -> float:
        """Masked frames of a step for each codeword of a codebook, if all were in use."""
        return self.masked_frames / self.config.codebook_size

    @property
    def first_move(self) -> float:
        """How far, from 0 to 1, its first update takes a codeword of average use from a random start to its frames."""
        frames = self.frames_per_codeword * self.config.codebook_update_steps
        taken = (1 - self.config.codebook_decay_at(0)) * frames
        return taken / (self.config.codebook_decay_at(0) + taken)  # counts begin at one

    @property
    def hours(self) -> float:
        """Audio of the whole run."""
        return self.arguments.run.max_steps * self.seconds_per_step / 3600

    @property
    def epochs(self) -> float | None:
        """Passes over the data; None where it is a stream."""
        return None if self.steps_per_epoch is None else self.arguments.run.max_steps / self.steps_per_epoch

    @property
    def model_bytes(self) -> int:
        """Size of a saved model."""
        return BYTES_PER_WEIGHT * self.num_parameters

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint to resume from: the model, and Adam's averages."""
        return self.model_bytes + BYTES_PER_WEIGHT * ADAM_AVERAGES * self.num_trained

    @property
    def num_saved_models(self) -> int:
        """Models that are kept for good, the last one too."""
        options = self.arguments.run
        return 1 + ((options.max_steps - 1) // options.save_steps if options.save_steps else 0)

    @property
    def disk_bytes(self) -> int:
        """All that the run leaves or needs at any time: models, kept checkpoints, and the one being written."""
        num_checkpoints = self.arguments.run.keep_checkpoints + 1
        return self.num_saved_models * self.model_bytes + num_checkpoints * self.checkpoint_bytes

    def at(self, step: int) -> PlanPoint:
        """Rates and decays of update `step`, counted from 1; the numbers that the line of metrics will have."""
        return PlanPoint(
            step=step,
            hours=step * self.seconds_per_step / 3600,
            learning_rate=self.arguments.run.learning_rate * self.schedule(step - 1),
            codebook_decay=self.config.codebook_decay_at(max(0, step - self.config.codebook_update_steps)),
            ema_decay=self.config.ema_decay_at(step),
        )

    @property
    def points(self) -> list[PlanPoint]:
        """The first update, those at a quarter, half and three quarters of the run, and the last."""
        last = self.arguments.run.max_steps
        return [self.at(max(1, round(last * quarter / 4))) for quarter in range(5)]

    @property
    def marks(self) -> dict[str, int]:
        """Updates at which something begins or ends, by what it is; those after the last update are left out."""
        options, config = self.arguments.run, self.config
        warmup_steps = int(options.max_steps * options.warmup_share)
        hold_steps = int(options.max_steps * options.hold_share) if options.schedule == "tri_stage" else 0
        marks = {
            "warm-up ends": warmup_steps,
            "rate begins to fall": warmup_steps + hold_steps if hold_steps else 0,
            "EMA decay reaches its end": config.ema_anneal_steps if config.ema_decay != config.ema_end_decay else 0,
            "codebook decay reaches its end": (
                config.codebook_end_decay_step if config.codebook_end_decay not in (None, config.codebook_decay) else 0
            ),
            "teacher frozen": config.freeze_teacher_step or 0,
        }
        return {name: step for name, step in marks.items() if 0 < step <= options.max_steps}

    @property
    def notes(self) -> list[str]:
        """What is unusual about the run; empty for the paper's."""
        return list(_notes(self))

    def __str__(self) -> str:
        rows = [*_batch_rows(self), *_run_rows(self), *_model_rows(self)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        if self.changes:
            kappa = self.arguments.data.step_seconds / self.arguments.run.reference_step_seconds
            lines += ["", changes_table(self.changes, kappa)]
        lines += ["", *_point_lines(self)]
        notes = self.notes
        return "\n".join([*lines, *([""] if notes else []), *(f"Note: {note}" for note in notes)])


def format_seconds(seconds: float) -> str:
    """A length of audio to read: in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _memory(plan: RunPlan, decay: float, num_steps: int = 1) -> str:
    """What an average with this decay, taken every so many updates, remembers: 1 / (1 - decay) times as many."""
    if decay >= 1:
        return "no end"
    updates = num_steps / (1 - decay)
    return f"{updates:,.0f} updates, {format_seconds(plan.seconds_per_step * updates)} of audio"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _batch_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    data = plan.arguments.data
    padded = "" if plan.padded_share is None else f", {plan.padded_share:.1%} padding"
    yield (
        "step",
        f"{format_seconds(plan.seconds_per_step)} of audio, at most {format_value(data.step_seconds)} s:"
        f" {plan.seconds_per_step / plan.utterance_seconds:,.1f} utterances of {plan.utterance_seconds:.1f} s{padded}",
    )
    yield (
        "forward passes",
        f"{plan.micro_batches:,.1f} a step in each of {plan.world_size} process(es), at most"
        f" {format_value(data.micro_seconds)} s each",
    )
    yield (
        "masked",
        f"{plan.masked_frames:,.0f} frames a step ({plan.masked_share:.1%}):"
        f" {plan.frames_per_codeword:,.1f} for each of {plan.config.codebook_size} codewords",
    )


def _run_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    options = plan.arguments.run
    epochs = "a stream, so epochs are not known"
    if plan.epochs is not None:
        epochs = f"{plan.epochs:,.1f} epochs of {plan.steps_per_epoch:,} steps"
    yield "updates", f"{options.max_steps:,}: {plan.hours:,.1f} hours of audio, {epochs}"
    warmup_steps = int(options.max_steps * options.warmup_share)
    yield (
        "learning rate",
        f"{format_value(options.learning_rate)} after {warmup_steps:,} updates of warm-up; {options.schedule}; at last"
        f" {format_value(options.learning_rate * plan.schedule(options.max_steps))}",
    )
    yield (
        "Adam",
        f"betas {format_value(options.adam_beta1)}, {format_value(options.adam_beta2)}; epsilon"
        f" {format_value(options.adam_epsilon)}; weight decay {format_value(options.weight_decay)}; clipping"
        f" {format_value(options.max_grad_norm) if options.max_grad_norm else 'off'}",
    )


def _model_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    options, config = plan.arguments.run, plan.config
    yield "starts from", "random weights" if options.base_model is None else options.base_model
    yield (
        "codebooks",
        f"{config.num_codebooks} of {config.codebook_size}, moved every {config.codebook_update_steps} update(s); they"
        f" remember {_memory(plan, plan.points[0].codebook_decay, config.codebook_update_steps)} at first",
    )
    frozen = config.freeze_teacher_step
    yield (
        "teacher",
        f"remembers {_memory(plan, plan.points[0].ema_decay)} at first; "
        + (
            "never stands still"
            if frozen is None
            else f"stands still from update {frozen:,} on (freeze_mode {config.freeze_mode})"
        ),
    )
    yield "weights", f"{plan.num_trained:,} to train, {plan.num_parameters:,} with teacher and codebooks"
    yield (
        "disk",
        f"{_gigabytes(plan.disk_bytes)}: {plan.num_saved_models:,} model(s) of {_gigabytes(plan.model_bytes)},"
        f" {options.keep_checkpoints} checkpoint(s) of {_gigabytes(plan.checkpoint_bytes)} and one being written",
    )


def _point_lines(plan: RunPlan) -> Iterator[str]:
    heads = ("done", "update", "hours of audio", "learning rate", "EMA decay", "codebook decay")
    rows: list[tuple[str, ...]] = [heads]
    for quarter, point in enumerate(plan.points):
        values = (point.learning_rate, point.ema_decay, point.codebook_decay)
        rows.append((f"{quarter * 25} %", f"{point.step:,}", f"{point.hours:,.1f}", *map(format_value, values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        yield "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))


def _notes(plan: RunPlan) -> Iterator[str]:
    options, config = plan.arguments.run, plan.config
    frozen = config.freeze_teacher_step
    if frozen is not None and frozen > options.max_steps:
        yield f"The teacher is not frozen in this run: freeze_teacher_step={frozen:,} is past the last update."
    is_cut_off = config.ema_anneal_steps > options.max_steps and not config.is_teacher_frozen_at(options.max_steps)
    if is_cut_off and config.ema_decay != config.ema_end_decay:
        yield (
            f"The EMA decay ends at {format_value(plan.points[-1].ema_decay)} and not at"
            f" {format_value(config.ema_end_decay)}: ema_anneal_steps={config.ema_anneal_steps:,} is past the last"
            " update."
        )
    if config.codebook_end_decay is not None and config.codebook_end_decay_step > options.max_steps:
        yield (
            f"The codebook decay ends at {format_value(plan.points[-1].codebook_decay)} and not at"
            f" {format_value(config.codebook_end_decay)}: codebook_end_decay_step={config.codebook_end_decay_step:,}"
            " is past the last update."
        )
    memory = 1 / max(1 - config.ema_decay, 1e-12)
    if memory > LONGEST_MEMORY_SHARE * options.max_steps:
        yield (
            f"The teacher remembers {memory:,.0f} updates, and the run has {options.max_steps:,}: it hardly leaves its"
            " first weights. Lower ema_decay and ema_end_decay, or train longer."
        )
    if plan.first_move < LEAST_FIRST_MOVE:
        yield (
            f"The codebooks' first update takes codewords {plan.first_move:.0%} of the way from their random start to"
            " the frames, the paper's 98 %: few may stay in use. Lower codebook_decay, with codebook_end_decay and"
            " codebook_end_decay_step to raise it afterwards, raise step_seconds or codebook_update_steps, or let"
            " codewords start anew with codebook_revival_share."
        )
    ratio = plan.arguments.data.step_seconds / options.reference_step_seconds
    averages = ("codebook_decay", "ema_decay", "ema_end_decay")
    defaults = {spec.name: spec.default for spec in dataclasses.fields(DinoSRConfig)}
    if not plan.changes and not 0.5 <= ratio <= 2 and all(getattr(config, n) == defaults[n] for n in averages):
        yield (
            f"A step is {ratio:.3g} of the paper's, and the decays are the paper's: averages cover less or more audio"
            " than there. scale_to_batch adapts them."
        )


def _masked_share(config: DinoSRConfig, num_frames: int) -> float:
    """Share of masked frames of utterances of this length, by drawing masks for 200 of them."""
    mask = sample_span_mask(
        (200, num_frames),
        config.mask_prob,
        config.mask_length,
        min_spans=config.mask_min_spans,
        lengths=[num_frames] * 200,
        generator=np.random.default_rng(0),
    )
    return float(mask.mean())


def describe_plan(
    arguments: PretrainingArguments,
    summary: PlanSummary | None,
    world_size: int = 1,
    *,
    changes: Sequence[Change] = (),
) -> RunPlan:
    """
    Derive what a run comes to. Nothing is trained, and no weight takes memory.

    Args:
        arguments: Of the run, scaled if they are to be.
        summary: Of the first epoch, as `summarize_plan` gives it. None for a stream, where only limits are known:
            then steps are taken as full and utterances as half way between the shortest and the longest.
        world_size: Number of processes.
        changes: What `scale_to_batch` changed, to be part of the text.

    Returns:
        The plan.

    Raises:
        ValueError: If model or schedule are impossible.
    """
    data, config = arguments.data, arguments.model_config()
    if summary is None:
        seconds_per_step, utterance_seconds = data.step_seconds, (data.min_seconds + data.max_seconds) / 2
        micro_batches: float = math.ceil(data.step_seconds / world_size / data.micro_seconds)
    else:
        seconds_per_step = summary.seconds_per_step
        utterance_seconds = summary.hours * 3600 / summary.num_utterances
        micro_batches = summary.num_micro_batches / summary.num_steps / world_size
    num_frames = config.num_frames(int(utterance_seconds * SAMPLING_RATE))
    masked_share = _masked_share(config, num_frames)
    with torch.device("meta"):
        weights = list(DinoSRForPreTraining(config).parameters())
    return RunPlan(
        arguments=arguments,
        config=config,
        schedule=make_schedule(arguments.run),
        world_size=world_size,
        seconds_per_step=seconds_per_step,
        utterance_seconds=utterance_seconds,
        micro_batches=micro_batches,
        padded_share=None if summary is None else summary.padded_share,
        steps_per_epoch=None if summary is None else summary.num_steps,
        masked_share=masked_share,
        masked_frames=masked_share * num_frames * seconds_per_step / utterance_seconds,
        num_parameters=sum(weight.numel() for weight in weights),
        num_trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        changes=tuple(changes),
    )


def _show_decay(axes: Axes, steps: Sequence[int], decays: Sequence[float], name: str) -> None:
    """A decay over steps, so that 0.99 and 0.999 are as far apart as 0.999 and 0.9999; nothing where it is 1."""
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


def plan_figure(plan: RunPlan, *, width: float = 7.2) -> Figure:
    """
    Draw learning rate, EMA decay and codebook decay over the run, with the updates at which something changes.

    Args:
        plan: Of `describe_plan`.
        width: Inches.

    Returns:
        A `matplotlib.figure.Figure`, made without pyplot: `figure.savefig("plan.png", dpi=150)`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    last, marks = plan.arguments.run.max_steps, plan.marks
    # Also the updates on both sides of each mark, or a jump would look like a slope.
    beside = {step + offset for step in marks.values() for offset in (-1, 0, 1)}
    steps = sorted({int(step) for step in np.linspace(1, last, 600)} | {step for step in beside if 1 <= step <= last})
    points = [plan.at(step) for step in steps]

    ticker: Any = import_extra("matplotlib.ticker", "analysis")
    figure: Any = import_extra("matplotlib.figure", "analysis").Figure(figsize=(width, 5.4), layout="constrained")
    rate, ema, codebook = figure.subplots(3, sharex=True)
    rate.plot(steps, [point.learning_rate for point in points], color="C0")
    rate.set_ylim(0, None)
    rate.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
    rate.set_ylabel("learning rate", fontsize=8)
    _show_decay(ema, steps, [point.ema_decay for point in points], "EMA decay")
    _show_decay(codebook, steps, [point.codebook_decay for point in points], "codebook decay")
    shown_in = {"warm-up ends": rate, "rate begins to fall": rate, "codebook decay reaches its end": codebook}
    for name, step in marks.items():
        axes = shown_in.get(name, ema)
        axes.axvline(step, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(
            f" {name}: {step:,}",
            (step, 0.06),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            ha="right" if step > 0.6 * last else "left",
        )
    if "teacher frozen" in marks:
        ema.axvspan(marks["teacher frozen"], last, color="0.92", zorder=0)
    codebook.set_xlabel("updates", fontsize=8)
    codebook.set_xlim(0, last)
    codebook.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    per_hour = 3600 / plan.seconds_per_step
    hours = rate.secondary_xaxis("top", functions=(lambda step: step / per_hour, lambda hour: hour * per_hour))
    hours.set_xlabel("hours of audio", fontsize=8)
    hours.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.6g}"))
    for axes in (rate, ema, codebook, hours):
        axes.tick_params(labelsize=7, length=2)
    return figure
