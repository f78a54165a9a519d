"""Everything that changes while a run trains, in one object that checkpoints save and restore."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..data import SpeechSource, SpeechStream
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.resume import CheckpointError
from ..training.run_record import public_values
from ..utils.compat import enable_gradient_checkpointing
from ..utils.names import one_line
from .anchor import Anchor, anchor_digest
from .checkpoint import Checkpoint, CheckpointWriter, load_model_weights, load_training_state
from .checkpoint_manifest import RunProgress
from .feed import StepFeed
from .metrics import MetricSums
from .monitor import CollapseMonitor
from .pretraining_arguments import ARCHITECTURE, PretrainingArguments, RunArguments

logger = logging.getLogger(__name__)


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
    writer: CheckpointWriter
    is_front_end_frozen: bool
    anchor_digest: str | None = None  # None: no anchor
    origin: str | None = None  # path of the checkpoint that `resume` named when the run began, if any
    timed_until: float = field(default_factory=time.perf_counter)  # clock up to which `progress` has counted the time

    def count_time(self) -> None:
        """Add the time since the last call to the counters."""
        now = time.perf_counter()
        self.progress.elapsed_seconds += now - self.timed_until
        self.progress.interval_seconds += now - self.timed_until
        self.timed_until = now

    def save(self, arguments: PretrainingArguments) -> None:
        """Begin to write a checkpoint; all processes together."""
        self.count_time()
        self.writer.begin(
            self.progress.step,
            self.model,
            self.optimizer,
            process_state={"sums": self.sums.state_dict(), "held": self.model.codebooks.held},
            manifest={
                "progress": dataclasses.asdict(self.progress),
                "feed": self.feed.state_dict(),
                "monitor": self.monitor.state_dict(),
                "architecture": _architecture(self.model.config.to_dict()),
                "arguments": public_values(arguments.to_dict()),
                "origin": self.origin,
                "anchor": self.anchor_digest,
            },
            spare_before=self.monitor.since,  # the run may have to go back there
        )

    def restore(self, checkpoint: Checkpoint, options: RunArguments, accelerator: Accelerator) -> None:
        """Restore what is not in the model: optimizer, random states, position in the data, sums, monitor."""
        before, now = checkpoint.manifest["num_processes"], accelerator.num_processes
        if before != now:
            logger.warning(
                f"The checkpoint is of {before} process(es), but there are {now} now. Steps and masks stay the same;"
                " dropout and layerdrop draw other random numbers, and sums are rounded differently. The run is not"
                " bit for bit what it would have been."
            )
        self.feed.load_state_dict(checkpoint.manifest["feed"])
        self.origin, self.writer.step = checkpoint.manifest["origin"], self.progress.step
        _restore(checkpoint, self.model, self.optimizer, self.sums, self.monitor, accelerator)
        for group in self.optimizer.param_groups:  # the saved ones have the options of the run before
            group |= _adam_options(options)


def _restore(
    checkpoint: Checkpoint,
    model: DinoSRForPreTraining,
    optimizer: Any,
    sums: MetricSums,
    monitor: CollapseMonitor,
    accelerator: Accelerator,
) -> None:
    """Restore all that can fail, besides the weights. Raises `CheckpointError` if it does."""
    try:
        monitor.load_state_dict(checkpoint.manifest["monitor"])
        process_state = load_training_state(checkpoint, optimizer, accelerator)
        sums.load_state_dict(process_state["sums"])
        model.codebooks.held = _checked_held(process_state["held"], model)
    except Exception as error:  # torch, pickle and zip files each raise their own
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{checkpoint.path} cannot be restored: {reason}.") from error


def _checked_held(held: torch.Tensor | None, model: DinoSRForPreTraining) -> torch.Tensor | None:
    """Return what the codebooks have gathered, (N, V, D + 1); raise `ValueError` if it is of other codebooks."""
    num_codebooks, codebook_size, hidden_size = model.codebooks.sums.shape
    if held is not None and held.shape != (num_codebooks, codebook_size, hidden_size + 1):
        raise ValueError(f"what the codebooks gathered has the shape {tuple(held.shape)}")
    return held


def check_fits(checkpoint: Checkpoint, arguments: PretrainingArguments, accelerator: Accelerator) -> None:
    """
    Raise `CheckpointError` unless a run can go on from a checkpoint, by restoring it into a model without memory.

    What is not in the model, such as random states and loss scale, is really changed.
    """
    config, options = arguments.model_config(), arguments.run
    saved, now = checkpoint.manifest["architecture"], _architecture(config.to_dict())
    differing = [
        f"{name} {saved.get(name)} instead of {value}" for name, value in now.items() if saved.get(name) != value
    ]
    if differing:
        raise CheckpointError(f"{checkpoint.path} is of another model: {', '.join(differing)}.")
    with torch.device("meta"):
        model = DinoSRForPreTraining(config)
    load_model_weights(checkpoint, model)
    sums = MetricSums(config, torch.device("cpu"), has_anchor=options.anchor is not None)
    monitor = CollapseMonitor(config, options)
    _restore(checkpoint, model, _make_optimizer(model, options), sums, monitor, accelerator)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that a run cannot change."""
    return {name: config[name] for name in ARCHITECTURE}


def _make_optimizer(model: DinoSRForPreTraining, options: RunArguments) -> torch.optim.AdamW:
    """Make the optimizer of all parameters, also of those that a resumed run has frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = {parameter.device.type for parameter in trained} <= {"cpu", "cuda"}
    return torch.optim.AdamW(trained, lr=options.learning_rate, fused=fused, **_adam_options(options))


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
    optimizer = _make_optimizer(model, options)
    if checkpoint is not None:
        load_model_weights(checkpoint, model)
        progress = RunProgress(**checkpoint.manifest["progress"])
    is_front_end_frozen = model.apply_freeze(progress.step)
    wrapped_model, wrapped_optimizer = accelerator.prepare(model, optimizer)
    sums = MetricSums(model.config, accelerator.device, has_anchor=anchor is not None)
    monitor = CollapseMonitor(model.config, options)
    writer = CheckpointWriter(options.output_dir, accelerator, options.keep_checkpoints)
    wrapped = (wrapped_model, wrapped_optimizer)
    state = TrainState(model, *wrapped, feed, sums, monitor, progress, writer, is_front_end_frozen)
    state.anchor_digest = None if anchor is None else anchor_digest(anchor)
    if checkpoint is not None:
        state.restore(checkpoint, options, accelerator)
    return state
