"""Fine-tuning with `transformers.Trainer`: what recognition and classification share."""

from .arguments import FinetuningArguments, LabelledDataArguments, StartArguments
from .batches import LabelledCollator, LabelledDataset, LengthBatchSampler, StepBatchSampler
from .run import finetune
from .splits import Splits, open_splits
from .start import load_model
from .task import Task
from .trainer import FreezeCallback, SpeechTrainer

__all__ = [
    "FinetuningArguments",
    "LabelledDataArguments",
    "StartArguments",
    "LabelledDataset",
    "LabelledCollator",
    "StepBatchSampler",
    "LengthBatchSampler",
    "Splits",
    "open_splits",
    "Task",
    "load_model",
    "SpeechTrainer",
    "FreezeCallback",
    "finetune",
]
