"""Pre-training with Accelerate: arguments, schedules, the loop, what it measures and what it leaves behind."""

from .arguments import ArgumentError, DataArguments, PretrainingArguments, RunArguments, parse_arguments
from .loop import pretrain, run, synthetic_corpus
from .schedules import tri_stage

__all__ = [
    "ArgumentError",
    "DataArguments",
    "PretrainingArguments",
    "RunArguments",
    "parse_arguments",
    "pretrain",
    "run",
    "synthetic_corpus",
    "tri_stage",
]
