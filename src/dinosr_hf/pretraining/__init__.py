"""Pre-training with Accelerate: arguments, plan, loop, checkpoints, metrics and held-out evaluation."""

from ..training.resume import CheckpointError, find_checkpoints
from ..training.signals import RunInterrupted
from ..utils.command_line import ArgumentError
from .checkpoint import Checkpoint, read_checkpoint
from .held_out import HeldOut
from .loop import Pretraining, TrainingStopped
from .monitor import CollapseMonitor
from .plan import RunPlan, plan_figure
from .pretraining_arguments import DataArguments, PretrainingArguments, RunArguments, parse_arguments
from .runner import open_data, open_held_out, run, synthetic_corpus
from .scaling import scale_to_batch

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "CollapseMonitor",
    "DataArguments",
    "HeldOut",
    "Pretraining",
    "PretrainingArguments",
    "RunArguments",
    "RunInterrupted",
    "RunPlan",
    "TrainingStopped",
    "find_checkpoints",
    "open_data",
    "open_held_out",
    "parse_arguments",
    "plan_figure",
    "read_checkpoint",
    "run",
    "scale_to_batch",
    "synthetic_corpus",
]
