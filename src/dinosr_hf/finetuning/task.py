"""What fine-tuning a head needs to know of its task: targets, what is usable, how it is scored, what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..data import LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRPreTrainedModel


class Task(ABC):
    """
    A head and what it learns. `prepare` comes first; then the other methods may be called.

    Attributes:
        arguments: What it was told, a dataclass.
        name: As the Hub names tasks.
        model_class: The head.
        metric: What the best checkpoint is chosen by, of the names that `metrics` gives.
        greater_is_better: Whether it should rise.
        crop_seconds: Training takes a random part of this length of longer utterances; None: all of them, where a
            label belongs to the whole.
    """

    arguments: Any
    name: str
    model_class: type[DinoSRPreTrainedModel]
    metric: str
    greater_is_better: bool
    crop_seconds: float | None = None

    @abstractmethod
    def prepare(self, train: LabelledSource) -> None:
        """Learn labels from the training speech, and from nothing else."""

    @abstractmethod
    def config_changes(self) -> dict[str, Any]:
        """Fields of the configuration that follow from the labels."""

    @abstractmethod
    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """What the model is to give for each utterance: int64 (L,) labels, or a class; -100 for none that it knows."""

    @abstractmethod
    def unusable(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Why an utterance of so many frames cannot be trained on; None if it can."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Figures of an evaluation, of what `SpeechTrainer` gives for each utterance."""

    @abstractmethod
    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """Write predictions, one an utterance, and their errors to the folder; returns the figures."""

    def calibrate(self, config: DinoSRConfig, source: LabelledSource, predictions: Any) -> None:  # noqa: B027
        """Set what of the configuration is measured on evaluation data once training is over; nothing by default."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what belongs beside the weights: processor, normalisation."""


def describe_unusable(reasons: Mapping[str, Sequence[str]], total: int) -> str:
    """A line that counts what is left out, and why, with an example of each."""
    counts = ", ".join(f"{len(ids):,} {reason} (as {ids[0]})" for reason, ids in sorted(reasons.items()))
    return f"{sum(map(len, reasons.values())):,} of {total:,} utterances are not trained on: {counts}."


def num_frames_of(config: DinoSRConfig, num_samples: Sequence[int]) -> list[int]:
    """Frames of utterances of so many samples."""
    return [config.num_frames(int(length)) for length in num_samples]
