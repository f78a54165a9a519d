"""Pre-training with Accelerate: arguments, schedules, loop, checkpoints, what is measured and what is left behind."""

from ..training.schedules import constant, cosine, make_schedule, tri_stage
from ..utils.command_line import ArgumentError
from .checkpoint import Checkpoint, CheckpointError, choose_checkpoint, find_checkpoints, read_checkpoint
from .held_out import HeldOut, row_labels
from .loop import Pretraining, Progress, TrainingStopped, pretrain
from .monitor import CollapseMonitor
from .plan import RunPlan, describe_plan, plan_figure
from .pretraining_arguments import DataArguments, PretrainingArguments, RunArguments, parse_arguments
from .runner import open_data, open_held_out, run, synthetic_corpus
from .scaling import Change, changes_table, scale_to_batch
from .signals import RunInterrupted

__all__ = [
    "ArgumentError",
    "Change",
    "Checkpoint",
    "CheckpointError",
    "CollapseMonitor",
    "DataArguments",
    "HeldOut",
    "Pretraining",
    "PretrainingArguments",
    "Progress",
    "RunArguments",
    "RunInterrupted",
    "RunPlan",
    "TrainingStopped",
    "changes_table",
    "choose_checkpoint",
    "constant",
    "cosine",
    "describe_plan",
    "find_checkpoints",
    "make_schedule",
    "open_data",
    "open_held_out",
    "parse_arguments",
    "plan_figure",
    "pretrain",
    "read_checkpoint",
    "row_labels",
    "run",
    "scale_to_batch",
    "synthetic_corpus",
    "tri_stage",
]
