"""Fine-tuning with `transformers.Trainer`: what recognition and classification share."""

from .batches import LabelledCollator, LabelledDataset, LengthBatchSampler, StepBatchSampler
from .classification_task import Classification, ClassificationArguments
from .ctc_task import Recognition, RecognitionArguments
from .finetuning_arguments import FinetuningArguments, InitialModelArguments, LabelledDataArguments
from .initial_model import load_initial_model
from .run import finetune
from .splits import open_splits
from .task import Task
from .trainer import SpeechTrainer

__all__ = [
    "FinetuningArguments",
    "LabelledDataArguments",
    "InitialModelArguments",
    "LabelledDataset",
    "LabelledCollator",
    "StepBatchSampler",
    "LengthBatchSampler",
    "open_splits",
    "Task",
    "Recognition",
    "RecognitionArguments",
    "Classification",
    "ClassificationArguments",
    "load_initial_model",
    "SpeechTrainer",
    "finetune",
]
