"""Everything that changes while a run trains, in one object that checkpoints save and restore."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..data import SpeechSource, SpeechStream
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..utils.compat import enable_gradient_checkpointing
from .anchor import Anchor, anchor_digest
from .checkpoint import Checkpoint, load_model_weights, load_training_state, save_checkpoint
from .feed import StepFeed
from .metrics import MetricSums
from .monitor import CollapseMonitor
from .pretraining_arguments import ARCHITECTURE, PretrainingArguments, RunArguments


@dataclass
class RunProgress:
    """Counters of a run, over all processes and sessions."""

    step: int = 0  # number of completed updates
    skipped_steps: int = 0  # because gradients or targets were not finite
    skipped_in_row: int = 0  # of those, since the last update
    skipped_files: int = 0  # recordings that could not be read
    utterances: int = 0  # recordings asked for
    recent_skipped: float = 0.0  # these two are halved every 10,000 recordings, so that only recent ones count
    recent_utterances: float = 0.0
    logged_step: int = 0  # of the last line of metrics
    interval_seconds: float = 0.0  # spent training since that line
    audio_seconds: float = 0.0  # trained on, without padding
    elapsed_seconds: float = 0.0  # spent training


@dataclass
class TrainState:
    """The state of the loop. What a checkpoint cannot hold is derived from the rest."""

    model: DinoSRForPreTraining  # without wrappers
    wrapped_model: Any  # by Accelerate, for the forward pass
    optimizer: Any  # AdamW, as Accelerate wrapped it
    feed: StepFeed
    sums: MetricSums  # since the last line of metrics
    monitor: CollapseMonitor
    progress: RunProgress
    is_frozen: bool  # whether the teacher is
    anchor_digest: str | None = None  # None: no anchor
    origin: str | None = None  # path of the checkpoint that `resume` named when the run began, if any
    saved_step: int = 0  # of the newest checkpoint; 0: none
    timed_until: float = field(default_factory=time.perf_counter)  # clock up to which `progress` has counted the time

    def count_time(self) -> None:
        """Add the time since the last call to the counters."""
        now = time.perf_counter()
        self.progress.elapsed_seconds += now - self.timed_until
        self.progress.interval_seconds += now - self.timed_until
        self.timed_until = now

    def save(self, arguments: PretrainingArguments, accelerator: Accelerator) -> None:
        """Write a checkpoint; all processes together. Raises `CheckpointError` if it cannot be written."""
        self.count_time()
        config = self.model.config.to_dict()
        save_checkpoint(
            arguments.run.output_dir,
            self.progress.step,
            self.model,
            self.optimizer,
            accelerator,
            process_state={"sums": self.sums.state_dict(), "held": self.model.codebooks.held},
            manifest={
                "progress": dataclasses.asdict(self.progress),
                "feed": self.feed.state_dict(),
                "monitor": self.monitor.state_dict(),
                "architecture": {name: config[name] for name in ARCHITECTURE},
                "arguments": arguments.to_dict(),
                "origin": self.origin,
                "anchor": self.anchor_digest,
            },
            keep=arguments.run.keep_checkpoints,
        )
        self.saved_step = self.progress.step

    def restore(self, checkpoint: Checkpoint, options: RunArguments, accelerator: Accelerator) -> None:
        """Restore what is not in the model: optimizer, random states, position in the data, sums, monitor."""
        manifest = checkpoint.manifest
        self.feed.load_state_dict(manifest["feed"])
        self.monitor.load_state_dict(manifest["monitor"])
        self.origin, self.saved_step = manifest["origin"], self.progress.step
        process_state = load_training_state(checkpoint, self.optimizer, accelerator)
        self.sums.load_state_dict(process_state["sums"])
        self.model.codebooks.held = process_state["held"]
        for group in self.optimizer.param_groups:  # the saved ones have the options of the run before
            group |= _adam_options(options)


def _adam_options(options: RunArguments) -> dict[str, Any]:
    betas = (options.adam_beta1, options.adam_beta2)
    return {"betas": betas, "eps": options.adam_epsilon, "weight_decay": options.weight_decay}


def make_train_state(
    model: DinoSRForPreTraining,
    source: SpeechSource | SpeechStream,
    arguments: PretrainingArguments,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None = None,
    anchor: Anchor | None = None,
) -> TrainState:
    """Build the state of a run at its first step, or restore it. Raises `CheckpointError` if that does not fit."""
    options, progress = arguments.run, RunProgress()
    feed = StepFeed(
        source,
        arguments.data,
        model.config,
        seed=options.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        anchor=anchor,
    )
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if options.torch_compile:
        model.compile(backend=options.torch_compile_backend)
    # Of all parameters, also those that a resumed run has frozen.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = {parameter.device.type for parameter in trained} <= {"cpu", "cuda"}
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, fused=fused, **_adam_options(options))
    if checkpoint is not None:
        load_model_weights(checkpoint, model)
        progress = RunProgress(**checkpoint.manifest["progress"])
    is_frozen = model.apply_freeze(progress.step)
    wrapped_model, wrapped_optimizer = accelerator.prepare(model, optimizer)
    sizes, has_anchor = (model.config.num_codebooks, model.config.codebook_size), anchor is not None
    sums = MetricSums(*sizes, accelerator.device, has_anchor=has_anchor)
    monitor = CollapseMonitor(model.config, options)
    state = TrainState(model, wrapped_model, wrapped_optimizer, feed, sums, monitor, progress, is_frozen)
    state.anchor_digest = None if anchor is None else anchor_digest(anchor)
    if checkpoint is not None:
        state.restore(checkpoint, options, accelerator)
    return state
