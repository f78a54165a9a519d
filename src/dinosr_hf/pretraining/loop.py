"""
The pre-training loop: forward, backward, clip, optimizer, codebooks and teacher, log, checkpoint.

`B` batch, `S` samples, `T` frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data import MicroBatch, SpeechSource, SpeechStream
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.schedules import make_schedule
from ..utils.command_line import ArgumentError
from ..utils.compat import enable_gradient_checkpointing
from .checkpoint import Checkpoint, CheckpointError, load_model_weights, load_training_state, save_checkpoint
from .feed import Step, StepFeed
from .held_out import HeldOut
from .metrics import MetricSums
from .monitor import CollapseMonitor
from .pretraining_arguments import ARCHITECTURE, PretrainingArguments, RunArguments
from .signals import RunInterrupted, SignalWatch
from .state import append_metrics, mark_finished, save_model

logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """A run that ended itself because going on would be of no use; the message says why, and what to change."""


@dataclass
class Progress:
    """
    What a run has done so far, over all processes; it is in each checkpoint.

    Attributes:
        step: Updates completed.
        skipped_steps: Steps left out because gradients or targets were not finite.
        skipped_in_row: Of these, the ones since the last update.
        skipped_files: Recordings left out because they could not be read.
        utterances: Recordings asked for.
        recent_skipped: The same two, but halved every 10,000 recordings, so that only the last ones count.
        recent_utterances: Of these.
        logged_step: Step of the last line of metrics.
        interval_seconds: Time spent training since that line.
        audio_seconds: Audio trained on, without padding.
        elapsed_seconds: Time spent training, over all sessions of the run.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    skipped_files: int = 0
    utterances: int = 0
    recent_skipped: float = 0.0
    recent_utterances: float = 0.0
    logged_step: int = 0
    interval_seconds: float = 0.0
    audio_seconds: float = 0.0
    elapsed_seconds: float = 0.0


def _count_samples(inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Samples of a batch without padding, and samples of padding."""
    total = inputs["input_values"].numel()
    read = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else total
    return read, total - read


def _accumulate_gradients(
    model: torch.nn.Module,
    micro_batches: list[MicroBatch],
    total_masked: float,
    accelerator: Accelerator,
    sums: MetricSums,
) -> None:
    """
    Forward and backward of a step: the gradient is that of the mean over all masked frames of the step, however they
    are spread over micro-batches and processes.
    """
    for position, batch in enumerate(micro_batches):
        # Counted here and not on the device, whose forward pass would wait for it.
        masked_frames = batch.inputs["mask_time_indices"].flatten().nonzero()[:, 0]
        inputs = {**batch.inputs, "masked_frames": masked_frames}
        inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in inputs.items()}
        is_last = position == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            output = model(**inputs)
            # Processes' gradients are averaged, not added up.
            share = len(masked_frames) * accelerator.num_processes / total_masked
            # 0, or not a number where the teacher's output is not finite while the loss is (fp16). Through the
            # gradient every process learns of it, with no collective.
            poison = output.target_energies.sum() * 0
            accelerator.backward(output.loss * (share + poison))
        sums.add(output, *_count_samples(batch.inputs))


def _adam_options(options: RunArguments) -> dict[str, Any]:
    betas = (options.adam_beta1, options.adam_beta2)
    return {"betas": betas, "eps": options.adam_epsilon, "weight_decay": options.weight_decay}


def _make_optimizer(model: DinoSRForPreTraining, options: RunArguments) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = {parameter.device.type for parameter in trained} <= {"cpu", "cuda"}
    return torch.optim.AdamW(trained, lr=options.learning_rate, fused=fused, **_adam_options(options))


def _memory_gib(device: torch.device) -> float:
    """The most memory that the GPU has held so far; without one, what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil  # a dependency of accelerate

    return psutil.Process().memory_info().rss / 2**30


class Pretraining:
    """
    A run: its parts, its place, and what it does at each step; `run` goes through it.

    Args:
        model: A fresh or pre-trained model of `arguments.model_config()`.
        source: The recordings, or a stream of them.
        arguments: What the run is told.
        accelerator: Devices, precision, processes. Its own gradient accumulation must be off: steps are cut into
            micro-batches by `micro_seconds`.
        checkpoint: What to go on from; None: the beginning.
        held_out: Evaluated every `eval_steps`; None: never.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        source: SpeechSource | SpeechStream,
        arguments: PretrainingArguments,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        options, config = arguments.run, model.config
        self.model, self.arguments, self.options, self.accelerator = model, arguments, options, accelerator
        self.held_out = held_out
        self.progress = Progress()
        self.feed = StepFeed(
            source,
            arguments.data,
            config,
            seed=options.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.monitor = CollapseMonitor(config, options)
        self._learning_rate: Callable[[int], float] = make_schedule(options)
        self._new_sums: Callable[[], MetricSums] = partial(
            MetricSums, config.num_codebooks, config.codebook_size, accelerator.device
        )
        self._sums = self._new_sums()
        self._signals = SignalWatch()
        self._saved_step = self.progress.step  # of the newest checkpoint
        if options.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if options.torch_compile:
            model.compile(backend=options.torch_compile_backend)
        optimizer = _make_optimizer(model, options)  # of all parameters, also those that a resumed run has frozen
        if checkpoint is not None:
            load_model_weights(checkpoint, model)
            self.progress = Progress(**checkpoint.manifest["progress"])
            self._saved_step = self.progress.step
        self._is_frozen = model.apply_freeze(self.progress.step)
        self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
        self._origin: str | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        self._check_feeds()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """What is not in the model: optimizer, random states, place in the data, interval of metrics."""
        self.feed.load_state_dict(checkpoint.manifest["feed"])
        self._origin = checkpoint.manifest["origin"]
        self.monitor.load_state_dict(checkpoint.manifest["monitor"])
        own = load_training_state(checkpoint, self._optimizer, self.accelerator)
        self._sums.load_state_dict(own["sums"])
        self.model.codebooks.held = own["held"]
        for group in self._optimizer.param_groups:  # the saved ones are those of the arguments then
            group |= _adam_options(self.options)

    def _check_feeds(self) -> None:
        """Processes that see other recordings would train on without a word, each on its own plan."""
        seen = gather_object([self.feed.fingerprint])
        if len(set(seen)) > 1:
            raise ArgumentError(
                "The processes do not see the same recordings: their lists differ. Look at the data on each machine,"
                " or give all of them the same manifest."
            )

    def run(self) -> DinoSRForPreTraining:
        """
        Train to the last step, and leave the model in `output_dir` with `metrics.jsonl` beside it.

        Returns:
            The trained model, without wrappers.

        Raises:
            ValueError: For data that the arguments do not fit.
            TrainingStopped: If too many recordings cannot be read, too many steps in a row have no finite gradient, or
                the model collapsed and `stop_on_collapse` is set.
            RunInterrupted: After SIGTERM or SIGINT; a checkpoint was written.
            CheckpointError: If the last checkpoint or the model cannot be written.
        """
        options, accelerator, progress = self.options, self.accelerator, self.progress
        self.model.train()
        self._started = time.perf_counter()
        self._interval_started = self._started - progress.interval_seconds
        self._elapsed_before = progress.elapsed_seconds
        with (
            self._signals,
            logging_redirect_tqdm(),
            tqdm(
                total=options.max_steps,
                initial=progress.step,
                disable=not accelerator.is_main_process,
                unit="step",
                dynamic_ncols=True,
            ) as bar,
        ):
            if progress.step < options.max_steps:
                for step in self.feed:
                    total_masked = self._exchange(step)
                    if total_masked and self._take(step, total_masked):
                        bar.update()
                        self._after_update(bar, step.epoch)
                    if progress.step >= options.max_steps:
                        break
            self._finish()
        return self.model.eval()

    def _exchange(self, step: Step) -> int:
        """
        What all processes must know of each other before a step, in one collective: the masked frames of the step,
        recordings that could not be read, and what signals asked for, which is answered at once.
        """
        accelerator, progress, micro_batches = self.accelerator, self.progress, step.micro_batches
        # Padded frames are never in these masks: the frames of the step are known before the first forward pass.
        masked = sum(int(batch.inputs["mask_time_indices"].sum()) for batch in micro_batches)
        skipped = [entry for batch in micro_batches for entry in batch.skipped]
        utterances = len(skipped) + sum(
            int(batch.inputs["mask_time_indices"].any(dim=-1).sum()) for batch in micro_batches
        )
        own = [masked, len(skipped), utterances, self._signals.save, self._signals.stop > 0]
        totals = list(map(int, own))
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(torch.tensor(totals, device=accelerator.device), "sum").tolist()
        total_masked, total_skipped, total_utterances, save_asked, stop_asked = totals
        if save_asked or stop_asked:
            self.feed.put_back()  # this step comes after the checkpoint
            self._answer_signals(bool(stop_asked))
            self.feed.take_again()
        if total_skipped:
            for name, message in gather_object([tuple(entry) for entry in skipped]):
                logger.warning("Skipped %s: %s", name, message)
        progress.skipped_files += total_skipped
        progress.utterances += total_utterances
        progress.recent_skipped += total_skipped
        progress.recent_utterances += total_utterances
        self._check_skipped_files()
        return int(total_masked)

    def _take(self, step: Step, total_masked: int) -> bool:
        """Forward, backward, clip, optimizer, codebooks and teacher; whether it was an update, and not skipped."""
        accelerator, options, progress = self.accelerator, self.options, self.progress
        sums = self._new_sums()
        _accumulate_gradients(self._wrapped, step.micro_batches, total_masked, accelerator, sums)
        self._grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm or math.inf)
        if not bool(torch.isfinite(self._grad_norm)):
            self._skip_step()
            return False
        progress.skipped_in_row = 0
        self._rate = options.learning_rate * self._learning_rate(progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        progress.step += 1
        self._decays = self.model.update_targets(progress.step)
        self._sums.merge(sums)
        if not self._is_frozen and self.model.apply_freeze(progress.step):
            self._is_frozen = True
            logger.info("Step %d: teacher, convolutions and projection are frozen from here on.", progress.step)
            if accelerator.num_processes > 1:
                # Its buckets wait for the gradients of parameters that have none any more.
                self._wrapped = accelerator.prepare_model(self.model)
        return True

    def _check_skipped_files(self) -> None:
        """So that a disk that went away is no run on what is left."""
        progress, share = self.progress, self.arguments.data.max_skipped_share
        if progress.recent_skipped > share * max(progress.recent_utterances, 1000):
            raise TrainingStopped(
                f"{progress.skipped_files:,} of {progress.utterances:,} recordings could not be read, and of the last"
                f" ones more than max_skipped_share={share:g} allows (of at least 1,000). The log names them. Look at"
                " the disk, make the manifest again, or raise max_skipped_share."
            )
        if progress.recent_utterances > 10_000:
            progress.recent_utterances /= 2
            progress.recent_skipped /= 2

    def _skip_step(self) -> None:
        """Gradients that are not finite move nothing: no weight, no codeword, no teacher, no figure."""
        progress, scaler = self.progress, self.accelerator.scaler
        self._optimizer.zero_grad()
        self.model.codebooks.discard()
        if scaler is not None:
            scaler.update()  # fp16: the next steps are scaled by less
        progress.skipped_steps += 1
        progress.skipped_in_row += 1
        if progress.skipped_in_row >= self.options.max_skipped_steps:
            raise TrainingStopped(
                f"{progress.skipped_in_row} steps in a row had no finite gradient, after step {progress.step}. The"
                " last checkpoint is as it was. Lower learning_rate, use bf16 instead of fp16, or set max_grad_norm,"
                " and start again: the run goes on from there."
            )

    def _after_update(self, bar: tqdm, epoch: int) -> None:
        options, step = self.options, self.progress.step
        is_last = step == options.max_steps
        if step % options.log_steps == 0 or step == 1 or is_last:
            self._log(bar, epoch)
        if self.held_out is not None and (step % options.eval_steps == 0 or is_last):
            self._evaluate(self.held_out)
        if options.save_steps and step % options.save_steps == 0 and not is_last:
            self._save_model(Path(options.output_dir) / f"step-{step}")
        if options.checkpoint_steps and step % options.checkpoint_steps == 0 and not is_last:
            self._try_checkpoint()

    def _log(self, bar: tqdm, epoch: int) -> None:
        options, progress = self.options, self.progress
        figures: dict[str, Any] = self._sums.compute(partial(self.accelerator.reduce, reduction="sum"))
        self._sums = self._new_sums()
        now = time.perf_counter()
        speed = figures["seconds"] / (now - self._interval_started)
        self._interval_started, progress.interval_seconds = now, 0.0
        progress.audio_seconds += figures["seconds"]
        progress.elapsed_seconds = self._elapsed_before + now - self._started
        metrics: dict[str, Any] = {
            "step": progress.step,
            "epoch": epoch,
            "learning_rate": self._rate,
            **self._decays,
            "grad_norm": float(self._grad_norm),
            **figures,
            "audio_seconds_per_second": speed,
            "audio_hours": progress.audio_seconds / 3600,
            "elapsed_seconds": progress.elapsed_seconds,
            "seconds_left": self._seconds_left(figures["seconds"], speed),
            "skipped_files": progress.skipped_files,
            "skipped_steps": progress.skipped_steps,
            "memory_gib": _memory_gib(self.accelerator.device),
        }
        bar.set_postfix(
            loss=f"{metrics['loss']:.3f}",
            ppl=f"{metrics['target_perplexity']:.0f}/{metrics['prediction_perplexity']:.0f}",
            active=f"{metrics['active_codewords']:.0f}",
            speed=f"{speed:.0f}x",
            refresh=False,
        )
        warnings = self.monitor.check(metrics)
        if warnings:
            metrics["warnings"] = warnings
        self._write(metrics)
        for warning in warnings:
            logger.warning("%s", warning)
        if self.monitor.has_collapsed and options.stop_on_collapse:
            raise TrainingStopped(
                f"The model has collapsed, and stop_on_collapse is set. {' '.join(self.monitor.standing())}"
            )

    def _seconds_left(self, interval_seconds: float, speed: float) -> float:
        """At the speed of the last interval, for the audio that is still to come."""
        done = max(1, self.progress.step - self.progress.logged_step)
        self.progress.logged_step = self.progress.step
        return (self.options.max_steps - self.progress.step) * interval_seconds / done / max(speed, 1e-9)

    def _write(self, metrics: dict[str, Any]) -> None:
        """A line of the JSONL, and what trackers can draw of it: numbers, a codebook's by a name of its own."""
        if self.accelerator.is_main_process:
            try:
                append_metrics(self.options.output_dir, metrics)
            except OSError as error:
                logger.error("metrics.jsonl lacks step %d: %s. The run goes on.", metrics["step"], error)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for name, values in metrics.items():
            if isinstance(values, list) and name != "warnings":
                numbers |= {f"{name}/{number}": value for number, value in enumerate(values)}
        self.accelerator.log(numbers, step=metrics["step"])

    def _evaluate(self, held_out: HeldOut) -> None:
        try:
            figures = held_out.evaluate(self.model, self.accelerator)
        except ValueError as error:  # of sums over all processes: in all of them alike
            logger.error("Step %d could not be evaluated: %s The run goes on.", self.progress.step, error)
            return
        self._write({"step": self.progress.step} | {f"eval_{name}": value for name, value in figures.items()})
        logger.info(
            "Step %d, held out: %s.",
            self.progress.step,
            ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float)),
        )
        self._interval_started += held_out.seconds_taken  # it is no training

    def _save_model(self, folder: Path) -> None:
        """For good, beside the checkpoints; a full disk is no reason to lose the run."""
        if self.accelerator.is_main_process:
            try:
                save_model(self.model, folder)
            except Exception as error:
                logger.error("The model could not be written to %s: %s. The run goes on.", folder, error)

    def checkpoint(self) -> Path:
        """
        Write a checkpoint of this moment, between two steps; all processes together.

        Raises:
            CheckpointError: If it cannot be written.
        """
        options, progress = self.options, self.progress
        now = time.perf_counter()
        progress.elapsed_seconds = self._elapsed_before + now - self._started
        progress.interval_seconds = now - self._interval_started
        self._signals.save = False
        config = self.model.config.to_dict()
        path = save_checkpoint(
            options.output_dir,
            progress.step,
            self.model,
            self._optimizer,
            self.accelerator,
            process_state={"sums": self._sums.state_dict(), "held": self.model.codebooks.held},
            manifest={
                "progress": dataclasses.asdict(progress),
                "feed": self.feed.state_dict(),
                "monitor": self.monitor.state_dict(),
                "architecture": {name: config[name] for name in ARCHITECTURE},
                "arguments": self.arguments.to_dict(),
                "origin": self._origin,
            },
            keep=options.keep_checkpoints,
        )
        self._saved_step = progress.step
        return path

    def _try_checkpoint(self) -> None:
        """A full disk is said aloud, and the run goes on: the checkpoint before this one is still there."""
        try:
            self.checkpoint()
        except CheckpointError as error:
            logger.error("%s The run goes on without it.", error)

    def _answer_signals(self, is_stop: bool) -> None:
        """What one process was asked for, all do."""
        step = self.progress.step
        if not is_stop:
            if step != self._saved_step:
                self._try_checkpoint()
            self._signals.save = False
            return
        path = Path(self.options.output_dir) / f"checkpoint-{step}"
        if step != self._saved_step:
            self.checkpoint()
        where = f"with {path}" if path.exists() else "with nothing new to save"
        number = self._signals.stop or signal.SIGTERM
        name = signal.Signals(number).name
        raise RunInterrupted(f"{name}: stopped after step {step}, {where}.", 128 + number)

    def _finish(self) -> None:
        """The last checkpoint, and the model, which is worth more: it is written even if the checkpoint cannot be."""
        problem: CheckpointError | None = None
        if self.options.checkpoint_steps and self.progress.step != self._saved_step:
            try:
                self.checkpoint()
            except CheckpointError as error:
                problem = error
        if self.accelerator.is_main_process:
            try:
                save_model(self.model, self.options.output_dir)
                mark_finished(self.options.output_dir, self.progress.step)
            except Exception as error:
                before, folder = f"{problem} " if problem else "", self.options.output_dir
                raise CheckpointError(
                    f"{before}The model could not be written to {folder} ({type(error).__name__}: {error})."
                    " Free space there, and give the same command: it goes on from the last checkpoint."
                ) from error
        self.accelerator.wait_for_everyone()
        if problem is not None:
            raise problem


def pretrain(
    model: DinoSRForPreTraining,
    source: SpeechSource | SpeechStream,
    arguments: PretrainingArguments,
    accelerator: Accelerator,
    *,
    checkpoint: Checkpoint | None = None,
    held_out: HeldOut | None = None,
) -> DinoSRForPreTraining:
    """
    Train a model on a source, and leave it in `output_dir` with `metrics.jsonl` beside it.

    Args:
        model, source, arguments, accelerator, checkpoint, held_out: As for `Pretraining`.

    Returns:
        The trained model, without wrappers.

    Raises:
        ValueError: For data that the arguments do not fit.
        TrainingStopped: As `Pretraining.run`.
        RunInterrupted: After SIGTERM or SIGINT; a checkpoint was written.
        CheckpointError: If a checkpoint does not fit, or the last one or the model cannot be written.
    """
    return Pretraining(model, source, arguments, accelerator, checkpoint, held_out).run()
