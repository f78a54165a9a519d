"""The pre-training loop: forward, backward, clip, optimizer, codebooks and teacher; log, evaluate, save."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data import MicroBatch, SpeechSource, SpeechStream
from ..model.modeling_dinosr import DinoSRForPreTraining, DinoSRForPreTrainingOutput, anchored_loss
from ..training.resume import CheckpointError
from ..training.run_record import RunRecord
from ..training.schedules import make_schedule
from ..training.signals import RunInterrupted, SignalWatch
from ..utils.command_line import ArgumentError
from ..utils.model_folder import save_folder
from .anchor import Anchor
from .anchor_arguments import AnchorWeights, anchor_weights_at
from .best_model import BestModel
from .checkpoint import Checkpoint
from .feed import Step
from .held_out import HeldOut
from .metrics import MetricSums
from .pretraining_arguments import PretrainingArguments
from .run_folder import append_metrics, finish_record, mark_finished
from .train_state import make_train_state

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_ROW = 1000  # recordings; even a run whose max_skipped_share is 1 stops after so many


class TrainingStopped(RuntimeError):
    """
    A run that ended itself because going on would be of no use; the message says why, and what to change.

    A checkpoint was written, unless the model has collapsed.
    """


class FrameCounts(NamedTuple):
    """Numbers of frames that a loss is a mean over, of a micro-batch or of a step."""

    masked: int
    anchor_masked: int  # those with a label of the anchor
    anchor_unmasked: int

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor]) -> FrameCounts:
        """Count the frames of a micro-batch, on the CPU: padded ones are never masked, and have no label."""
        mask = inputs["mask_time_indices"]
        if "anchor_labels" not in inputs:
            return cls(int(mask.sum()), 0, 0)
        is_labelled = inputs["anchor_labels"] >= 0
        masked = int((is_labelled & mask).sum())
        return cls(int(mask.sum()), masked, int(is_labelled.sum()) - masked)


class StepTotals(NamedTuple):
    """What the processes found in a step before its forward pass, summed over all of them."""

    frames: FrameCounts
    skipped_files: int
    utterances: int
    save_requests: int
    stop_requests: int
    problems: int


class Update(NamedTuple):
    """What an update of the weights leaves for the line of metrics."""

    epoch: int
    learning_rate: float
    grad_norm: torch.Tensor
    decays: dict[str, float]
    anchor: AnchorWeights | None


def nan_if_not_finite(energies: torch.Tensor) -> torch.Tensor:
    """
    Return 0, or NaN if any of the teacher's energies is not finite, to be added to the factor of the loss.

    Under fp16 the teacher's output can overflow while the loss is finite. A NaN loss makes this process's gradient
    NaN, averaging the gradients over the processes spreads it, and so all of them see a gradient norm that is not
    finite and skip the step together (`Pretraining._train_step`), without another collective or host synchronisation.
    """
    return energies.sum() * 0


def _share_of_loss(
    output: DinoSRForPreTrainingOutput,
    own: FrameCounts,
    total: FrameCounts,
    anchor: AnchorWeights | None,
    num_processes: int,
) -> torch.Tensor:
    """
    Return a micro-batch's share of the loss of its step, which is `anchored_loss` of means over the step's frames.

    Times the number of processes, whose gradients are averaged and not added up. The anchor's weights are applied here
    and not by the model: compiled, it would be compiled anew whenever they change.
    """
    assert output.codebook_loss is not None and output.target_energies is not None
    share = own.masked * num_processes / total.masked
    loss = output.codebook_loss * (share + nan_if_not_finite(output.target_energies))
    if anchor is None:
        return loss
    assert output.codebook_losses is not None and output.anchor_losses is not None
    shares = (own.anchor_masked / max(total.anchor_masked, 1), own.anchor_unmasked / max(total.anchor_unmasked, 1))
    masked, unmasked = (part * share * num_processes for part, share in zip(output.anchor_losses, shares, strict=True))
    losses = torch.stack([masked, unmasked])
    return anchored_loss(loss, losses, len(output.codebook_losses), anchor.weight, anchor.unmasked_share)


def _accumulate_gradients(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    total: FrameCounts,
    anchor: AnchorWeights | None,
    accelerator: Accelerator,
    sums: MetricSums,
) -> None:
    """
    Run forward and backward of a step. The gradient is that of the mean over all masked frames of the step, however
    they are spread over micro-batches and processes; likewise of means over frames with a label of the anchor.
    """
    for position, batch in enumerate(micro_batches):
        # Counted here and not on the device, whose forward pass would wait for it.
        masked_frames = batch.inputs["mask_time_indices"].flatten().nonzero()[:, 0]
        inputs = {**batch.inputs, "masked_frames": masked_frames}
        inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in inputs.items()}
        is_last = position == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            output = model(**inputs)
            own = FrameCounts.of(batch.inputs)
            accelerator.backward(_share_of_loss(output, own, total, anchor, accelerator.num_processes))
        num_values = batch.inputs["input_values"].numel()
        num_samples = int(batch.inputs["attention_mask"].sum()) if "attention_mask" in batch.inputs else num_values
        sums.add(output, num_samples, num_values - num_samples)


def _memory_gib(device: torch.device) -> float:
    """Return the peak memory of the GPU; without a GPU, the current memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil  # a dependency of accelerate

    return psutil.Process().memory_info().rss / 2**30


@contextlib.contextmanager
def _may_fail(what: str, kind: type[Exception]) -> Iterator[None]:
    """Log an error of type `kind` in the body, which is not worth the run."""
    try:
        yield
    except kind as error:
        logger.error(f"{what}: {str(error).rstrip('.')}. The run goes on.")


@contextlib.contextmanager
def _model_errors(folder: str, problem: CheckpointError | None) -> Iterator[None]:
    """Raise errors of writing the model as a `CheckpointError`, after the `problem` that the checkpoint had."""
    try:
        yield
    except Exception as error:
        before = f"{problem} " if problem else ""
        raise CheckpointError(
            f"{before}The model could not be written to {folder} ({type(error).__name__}: {error})."
            " Free space there, and give the same command: it resumes from the last checkpoint."
        ) from error


class Pretraining:
    """
    A pre-training run. What changes while it trains is in `state`; `run` is the loop.

    The model is a fresh or pre-trained one of `arguments.model_config()`, and the accelerator's own gradient
    accumulation must be off: steps are cut into micro-batches by `micro_seconds`. `held_out` is evaluated on every
    `eval_steps`; `anchor` is the one that the arguments name, see `open_anchor`; `record` is completed at the end, by
    the main process. Raises `ArgumentError` if the processes do not see the same recordings, and `CheckpointError` if
    the checkpoint to resume from does not fit the model.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        source: SpeechSource | SpeechStream,
        arguments: PretrainingArguments,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
        held_out: HeldOut | None = None,
        anchor: Anchor | None = None,
        record: RunRecord | None = None,
    ) -> None:
        self.arguments, self.options, self.accelerator, self.held_out = arguments, arguments.run, accelerator, held_out
        self.record = record
        self.skip_reasons: Counter[str] = Counter()  # of recordings, in this session
        self.skipped_in_row = 0  # recordings since the last masked frame
        self.best: BestModel | None = None
        if held_out is not None and self.options.eval_patience:
            self.best = BestModel(self.options.output_dir, self.options.eval_patience, accelerator, held_out.digest)
        self.schedule = make_schedule(arguments.run)
        self.signals = SignalWatch()
        self.state = make_train_state(model, source, arguments, accelerator, checkpoint, anchor)
        if len(set(gather_object([self.state.feed.fingerprint]))) > 1:  # each would train on by its own plan
            raise ArgumentError(
                "The processes do not see the same recordings: their lists differ. Look at the data on each machine,"
                " or give all of them the same manifest."
            )

    def run(self) -> DinoSRForPreTraining:
        """
        Train to the last step, and write the model into `output_dir` with `metrics.jsonl` beside it; return the model.

        Raises:
            ValueError: If no step can be made of the data.
            TrainingStopped: If too many recordings cannot be read, too many steps in a row have no finite gradient, or
                the model collapsed and `stop_on_collapse` is set.
            RunInterrupted: After SIGTERM, SIGINT or SIGHUP; a checkpoint was written.
            CheckpointError: If the last checkpoint or the model cannot be written.
        """
        state, options = self.state, self.options
        progress = state.progress
        state.model.train()
        state.timed_until = time.perf_counter()
        is_quiet = not self.accelerator.is_main_process
        bar = tqdm(total=options.max_steps, initial=progress.step, unit="step", dynamic_ncols=True, disable=is_quiet)
        with self.signals, logging_redirect_tqdm(), bar, state.writer:
            self._warn_again()  # of what was told before the run was resumed
            for step in () if self._is_over() else state.feed:
                totals = self._gather_totals(step)
                if totals.save_requests or totals.stop_requests:
                    self._answer_signals(is_stop=totals.stop_requests > 0)
                if totals.problems:
                    self._stop(step.problem or "Another process cannot read its data any further.")
                self._count_recordings(step, totals)
                state.feed.advance()  # from here on a checkpoint comes after this step
                update = self._train_step(step, totals.frames) if totals.frames.masked else None
                if update is None:  # no recording could be read, or the gradient was not finite
                    continue
                bar.update()
                self._after_update(update, bar)
                if self._is_over():
                    break
            self._finish()
            self._warn_again()
        return state.model.eval()

    def _is_over(self) -> bool:
        is_overfitted = self.best is not None and self.best.is_over
        return is_overfitted or self.state.progress.step >= self.options.max_steps

    def _gather_totals(self, step: Step) -> StepTotals:
        """Tell the processes, in one collective, what all of them must know before a step."""
        # Padded frames are never in these masks: the frames of the step are known before the first forward pass.
        masks = [batch.inputs["mask_time_indices"] for batch in step.micro_batches]
        counts = [FrameCounts.of(batch.inputs) for batch in step.micro_batches]
        num_skipped = sum(len(batch.skipped) for batch in step.micro_batches)
        own = StepTotals(
            FrameCounts(
                masked=sum(count.masked for count in counts),
                anchor_masked=sum(count.anchor_masked for count in counts),
                anchor_unmasked=sum(count.anchor_unmasked for count in counts),
            ),
            skipped_files=num_skipped,
            utterances=num_skipped + sum(int(mask.any(dim=-1).sum()) for mask in masks),
            save_requests=int(self.signals.save),
            stop_requests=int(self.signals.stop > 0),
            problems=int(step.problem is not None),
        )
        if self.accelerator.num_processes == 1:
            return own
        numbers = torch.tensor([*own.frames, *own[1:]], device=self.accelerator.device)
        masked, anchor_masked, anchor_unmasked, *others = self.accelerator.reduce(numbers, "sum").tolist()
        return StepTotals(FrameCounts(masked, anchor_masked, anchor_unmasked), *others)

    def _answer_signals(self, is_stop: bool) -> None:
        """Save, or save and stop: a signal to any process is answered by all of them."""
        self._checkpoint()
        if not is_stop:
            return
        self.state.writer.wait()
        step = self.state.progress.step
        path = Path(self.options.output_dir) / f"checkpoint-{step}"
        saved = f"with {path}" if path.exists() else "with nothing new to save"
        raise RunInterrupted(self.signals.stop or signal.SIGTERM, step, saved)

    def _count_recordings(self, step: Step, totals: StepTotals) -> None:
        """Count and report the recordings that could not be read; stop if they are many, as when a disk is gone."""
        progress, share = self.state.progress, self.arguments.data.max_skipped_share
        if totals.skipped_files:
            skipped = [tuple(entry) for batch in step.micro_batches for entry in batch.skipped]
            for name, message, reason in gather_object(skipped):
                logger.warning("Skipped %s: %s", name, message)
                self.skip_reasons[reason] += 1
        self.skipped_in_row = 0 if totals.frames.masked else self.skipped_in_row + totals.skipped_files
        recent_skipped = progress.recent_skipped + totals.skipped_files
        recent_utterances = progress.recent_utterances + totals.utterances
        problem = way_out = ""
        if recent_skipped > share * max(recent_utterances, 1000):
            problem = f"among the recent ones more than max_skipped_share={share:g} allows (of at least 1,000)"
            way_out = ", or raise max_skipped_share"
        elif self.skipped_in_row >= _MAX_SKIPPED_IN_ROW:
            problem = f"the last {self.skipped_in_row:,} of them one after the other"
        if problem:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skip_reasons.most_common())
            # The checkpoint comes before this step: the run that resumes reads it again, and counts it then.
            is_silence = dict(self.skip_reasons.most_common(1)).keys() == {"silent"}
            advice = (
                "Cut the recordings where they are silent"
                if is_silence
                else "Look at the disk, make the manifest again"
            )
            self._stop(
                f"{progress.skipped_files + totals.skipped_files:,} of {progress.utterances + totals.utterances:,}"
                f" recordings could not be used, and {problem}. In this session: {reasons}. The log names them."
                f" {advice}{way_out}."
            )
        progress.skipped_files += totals.skipped_files
        progress.utterances += totals.utterances
        progress.recent_skipped, progress.recent_utterances = recent_skipped, recent_utterances
        if progress.recent_utterances > 10_000:
            progress.recent_utterances /= 2
            progress.recent_skipped /= 2

    def _stop(self, reason: str) -> NoReturn:
        """Write a checkpoint and raise `TrainingStopped` with the reason; all processes together."""
        self._checkpoint()
        try:
            self.state.writer.wait()
        except CheckpointError as error:
            raise TrainingStopped(f"{reason} {error}") from error
        saved_step = self.state.writer.step
        resume = f" The run resumes from checkpoint-{saved_step}." if saved_step else ""
        raise TrainingStopped(f"{reason}{resume}")

    def _train_step(self, step: Step, frames: FrameCounts) -> Update | None:
        """Forward, backward, clip, optimizer, codebooks and teacher; None if the step was skipped."""
        state, options, progress = self.state, self.options, self.state.progress
        sums, anchor = state.sums.empty_like(), anchor_weights_at(options, progress.step)
        _accumulate_gradients(state.wrapped_model, step.micro_batches, frames, anchor, self.accelerator, sums)
        is_fitting_heads = progress.step < options.fit_heads_steps
        if is_fitting_heads:
            for parameter in state.model.dinosr.parameters():
                parameter.grad = None  # the optimizer leaves it alone, without decay
        grad_norm = self.accelerator.clip_grad_norm_(state.model.parameters(), options.max_grad_norm or math.inf)
        if not bool(torch.isfinite(grad_norm)):
            self._skip_step()
            return None
        progress.skipped_in_row = 0
        learning_rate = options.learning_rate * self.schedule(progress.step)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        state.optimizer.step()
        state.optimizer.zero_grad()
        progress.step += 1
        decays = state.model.update_targets(progress.step, moves_teacher=not is_fitting_heads)
        state.sums.merge(sums)
        if not state.is_front_end_frozen and state.model.config.is_front_end_frozen_at(progress.step):
            state.is_front_end_frozen = True
            logger.info("Step %d: the student's front end is frozen from here on.", progress.step)
            if state.wrapped_model is not state.model:
                # DDP's buckets would wait for the gradients of the frozen parameters.
                state.wrapped_model = self.accelerator.prepare_model(state.model)
        return Update(step.epoch, learning_rate, grad_norm, decays, anchor)

    def _skip_step(self) -> None:
        """Drop a step whose gradient is not finite: no weight, codeword, teacher or metric changes."""
        progress, scaler = self.state.progress, self.accelerator.scaler
        self.state.optimizer.zero_grad()
        self.state.model.codebooks.discard()
        if scaler is not None:
            scaler.update()  # fp16: lowers the scale of the next steps
        progress.skipped_steps += 1
        progress.skipped_in_row += 1
        if progress.skipped_in_row >= self.options.max_skipped_steps:
            num_steps, progress.skipped_in_row = progress.skipped_in_row, 0  # the run that resumes has as many again
            self._stop(
                f"{num_steps} steps in a row had no finite gradient, after step {progress.step}. Lower learning_rate,"
                " use bf16 instead of fp16, or set max_grad_norm, and start again."
            )

    def _after_update(self, update: Update, bar: tqdm) -> None:
        options, step = self.options, self.state.progress.step
        is_last, is_logged = step == options.max_steps, step % options.log_steps == 0
        if is_logged or step == 1 or is_last:
            self._log(update, bar)
        if self.held_out is not None and step % options.eval_steps == 0 and not is_last:
            figures = self._evaluate(self.held_out)
            self._add_to_best(figures)
            if self._is_over() and not is_logged:  # its last step, as it turns out
                self._log(update, bar)
        if options.save_steps and step % options.save_steps == 0 and not is_last:
            folder = Path(options.output_dir) / f"step-{step}"  # to keep, beside the checkpoints
            with _may_fail(f"The model could not be written to {folder}", Exception):
                if self.accelerator.is_main_process:
                    save_folder(self.state.model, folder)
        if options.checkpoint_steps and step % options.checkpoint_steps == 0 and not is_last:
            self._checkpoint()

    def _log(self, update: Update, bar: tqdm) -> None:
        state, options, progress = self.state, self.options, self.state.progress
        figures: dict[str, Any] = state.sums.compute(partial(self.accelerator.reduce, reduction="sum"))
        state.sums = state.sums.empty_like()
        state.count_time()
        speed = figures["seconds"] / progress.interval_seconds
        num_steps = max(1, progress.step - progress.logged_step)
        seconds_left = (options.max_steps - progress.step) * figures["seconds"] / num_steps / max(speed, 1e-9)
        progress.interval_seconds, progress.logged_step = 0.0, progress.step
        progress.audio_seconds += figures["seconds"]
        metrics: dict[str, Any] = {
            "step": progress.step,
            "epoch": update.epoch,
            "learning_rate": update.learning_rate,
            **update.decays,
            **({} if update.anchor is None else update.anchor.metrics()),
            "grad_norm": float(update.grad_norm),
            **figures,
            "audio_seconds_per_second": speed,
            "audio_hours": progress.audio_seconds / 3600,
            "elapsed_seconds": progress.elapsed_seconds,
            "seconds_left": seconds_left,
            "skipped_files": progress.skipped_files,
            "skipped_steps": progress.skipped_steps,
            "memory_gib": _memory_gib(self.accelerator.device),
        }
        perplexities = f"{metrics['target_perplexity']:.0f}/{metrics['prediction_perplexity']:.0f}"
        shown = {"loss": f"{metrics['loss']:.3f}", "ppl": perplexities}
        bar.set_postfix(shown, active=f"{metrics['active_codewords']:.0f}", speed=f"{speed:.0f}x", refresh=False)
        warnings = state.monitor.check(metrics)
        if warnings:
            metrics["warnings"] = warnings
        self._write_metrics(metrics)
        for warning in warnings:
            logger.warning("%s", warning)
        if options.stop_on_collapse and (standing := state.monitor.standing()):
            problem = "The model has collapsed or diverged, and stop_on_collapse is set."
            raise TrainingStopped(f"{problem} {' '.join(standing)}")

    def _warn_again(self) -> None:
        """Repeat the warnings of collapse that still hold."""
        for text in self.state.monitor.standing():
            logger.warning(f"Step {self.state.progress.step:,}, still: {text}")

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a line of `metrics.jsonl`, and send its numbers to the trackers, lists as one number an entry."""
        with _may_fail(f"metrics.jsonl lacks step {metrics['step']}", OSError):
            if self.accelerator.is_main_process:
                append_metrics(self.options.output_dir, metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for name, values in metrics.items():
            if isinstance(values, list) and name != "warnings":
                numbers |= {f"{name}/{number}": value for number, value in enumerate(values)}
        with _may_fail(f"The trackers lack step {metrics['step']}", Exception):
            self.accelerator.log(numbers, step=metrics["step"])

    def _evaluate(self, held_out: HeldOut) -> dict[str, Any]:
        """Evaluate the model and write the figures down; return them, or none if that failed."""
        step = self.state.progress.step
        figures: dict[str, Any] = {}
        started = time.perf_counter()
        # ValueErrors are raised from sums over all processes: in all of them alike.
        with _may_fail(f"Step {step} could not be evaluated", ValueError):
            figures = held_out.evaluate(self.state.model, self.accelerator)
            line = {"step": step, "eval_set": held_out.digest}
            self._write_metrics(line | {f"eval_{name}": value for name, value in figures.items()})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float))
            logger.info(f"Step {step}, held out: {shown}.")
        self.state.progress.interval_seconds -= time.perf_counter() - started  # not training time
        return figures

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint, unless there is one of this step."""
        self.signals.save = False
        if self.state.progress.step != self.state.writer.step:
            self.state.save(self.arguments)

    def _add_to_best(self, figures: Mapping[str, Any]) -> None:
        """Keep the model if it is the best so far and the run wants to know."""
        if self.best is not None and figures:
            with _may_fail("The best model could not be written", Exception):
                self.best.add(self.state.progress.step, figures, self.state.model)

    def _take_best(self, best: BestModel, held_out: HeldOut) -> Mapping[str, Any]:
        """Evaluate the last model if that was not done, take the best model's weights, and return its figures."""
        if not best.has(self.state.progress.step):
            self._add_to_best(self._evaluate(held_out))
        return best.restore(self.state.progress.step, self.state.model)

    def _finish(self) -> None:
        """Write the last checkpoint and the model, even if the checkpoint cannot be written; then evaluate it."""
        problem: CheckpointError | None = None
        try:
            if self.options.checkpoint_steps:
                self._checkpoint()
                self.state.writer.wait()
        except CheckpointError as error:
            problem = error
        folder, is_main = self.options.output_dir, self.accelerator.is_main_process
        evaluated: Mapping[str, Any] = {}
        if self.best is not None and self.held_out is not None:
            evaluated = self._take_best(self.best, self.held_out)
        with _model_errors(folder, problem):
            if is_main:
                save_folder(self.state.model, folder)
        if self.held_out is not None and self.best is None:
            evaluated = self._evaluate(self.held_out)
        with _model_errors(folder, problem):
            if is_main:
                if self.record is not None:
                    num_steps = self.state.progress.step
                    finish_record(self.arguments, self.record, num_steps, self.held_out, evaluated)
                mark_finished(folder, self.state.progress.step)  # the last file: until then the run is not finished
        self.accelerator.wait_for_everyone()
        if problem is not None:
            raise problem
