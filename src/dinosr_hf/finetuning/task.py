"""The interface of a fine-tuning task: its head, targets, metrics, reports and files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..data import LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRPreTrainedModel


def shorten_labels(labels: Iterable[str]) -> str:
    """Return labels as a line of at most 200 letters."""
    return shorten(" ".join(labels), 200, placeholder=" ...")


class Task(ABC):
    """A head and what it learns. Call `prepare` before the other methods."""

    arguments: Any  # a dataclass
    name: str  # on the Hub
    model_class: type[DinoSRPreTrainedModel]
    metric: str  # among those of `metrics`, that selects the best checkpoint
    greater_is_better: bool
    keep_head_advice = ""  # for whoever wants to train a head further; empty: there is none
    crop_seconds: float | None = None  # crop longer training utterances at random, if labels belong to the whole

    @abstractmethod
    def prepare(self, train: LabelledSource) -> None:
        """Collect the labels of the training speech, and of nothing else."""

    @abstractmethod
    def config_changes(self) -> dict[str, Any]:
        """Return the fields of the configuration that follow from the labels."""

    @abstractmethod
    def labels(self) -> list[str]:
        """Return the labels that the head learns, in the order of their numbers."""

    @abstractmethod
    def labels_of(self, model: str) -> list[str] | None:
        """Return the labels of a model with this head, a folder or Hub name, in their order; None if not known."""

    @abstractmethod
    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """Return the target of each utterance: int64 (L,) labels, or a class; -100 for a class that is unknown."""

    @abstractmethod
    def exclusion_reason(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Return why an utterance of `num_frames` frames cannot be trained on, or None if it can."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of an evaluation by `SpeechTrainer`."""

    @abstractmethod
    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """Write the predictions, one per utterance, and their errors to the folder; return the metrics."""

    def calibrate(self, config: DinoSRConfig, source: LabelledSource, predictions: Any) -> None:  # noqa: B027
        """Measure settings of inference on evaluation data after training; nothing by default."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what belongs beside the weights and the feature extractor; nothing by default."""
