"""Fine-tuning with `transformers.Trainer`: what recognition and classification share."""

from .batches import LabelledCollator, LabelledDataset, LengthBatchSampler, StepBatchSampler
from .classification_task import Classification, ClassificationArguments
from .ctc_task import Recognition, RecognitionArguments
from .finetuning_arguments import FinetuningArguments, LabelledDataArguments, StartArguments
from .initial_model import load_model
from .run import finetune
from .splits import Splits, open_splits
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
    "Recognition",
    "RecognitionArguments",
    "Classification",
    "ClassificationArguments",
    "load_model",
    "SpeechTrainer",
    "FreezeCallback",
    "finetune",
]
