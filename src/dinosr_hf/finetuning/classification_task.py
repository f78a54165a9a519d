"""
Classification of utterances as a fine-tuning task: keyword, language, speaker, emotion.

The head is SUPERB's (arXiv 2105.01051, section 3): a weighted sum of all layers, a projection, the mean over time, a
linear layer. The metrics are scikit-learn's.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction

from ..data import LabelledSource
from ..model.modeling_dinosr import DinoSRForSequenceClassification
from ..training.shared_arguments import argument
from ..utils.command_line import ArgumentError, check_ranges
from ..utils.extras import import_extra
from ..utils.files import write_atomically
from ..utils.model_folder import open_dinosr_config
from ..utils.tables import markdown_table
from ..utils.visible_text import visible_text
from .task import Task

logger = logging.getLogger(__name__)

_NUM_SHOWN = 20  # names of classes in a message

# Above this number of classes the report lists the most frequent confusions instead of the whole table.
MAX_TABLE_CLASSES = 30
# The prediction for a recording that could not be read, and the reference for a class that training does not have. No
# label is equal to them, since labels have no space around them and are not empty.
UNREADABLE = ""
UNKNOWN = " unknown"


@dataclass
class ClassificationArguments:
    """Input of the head. Raises `ArgumentError` if a value is out of range."""

    use_weighted_layer_sum: bool = argument(
        True, "Whether the head reads a weighted sum of all layers, or only the last layer."
    )
    crop_seconds: float | None = argument(
        None,
        "Train on a random crop of this length of longer utterances, which max_seconds then does not leave out; if not"
        " given, on whole ones. Evaluation always takes whole ones.",
    )

    def __post_init__(self) -> None:
        is_allowed = self.crop_seconds is None or self.crop_seconds > 0
        check_ranges([(is_allowed, "crop_seconds", self.crop_seconds, "more than 0")])


class ClassMetrics(NamedTuple):
    """Metrics of one class, and its number of utterances in the references."""

    label: str
    num_utterances: int
    precision: float
    recall: float
    f1: float


class ClassificationReport(NamedTuple):
    """Metrics of a classification; unknown classes, which the model does not have, count as errors."""

    accuracy: float  # unreadable recordings count as errors
    macro_f1: float  # mean over the model's classes that occur in the references, with equal weights
    classes: list[ClassMetrics]  # the model's, followed by unknown ones in the references
    confusions: Counter[tuple[str, str]]  # (reference, prediction), also correct ones; "" for an unreadable recording
    num_unknown: int  # utterances of unknown classes

    @property
    def rates(self) -> dict[str, float]:
        """Accuracy and macro F1, by name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}

    def to_markdown(self, name: str) -> str:
        """Format the rates, the metrics of each class and the confusions as tables; `name` is that of the split."""
        total = sum(row.num_utterances for row in self.classes)
        totals = [f"{total:,}", f"{self.accuracy:.2%}", f"{self.macro_f1:.2%}", f"{self.num_unknown:,}"]
        rows = [
            (row.label, f"{row.num_utterances:,}", f"{row.recall:.2%}", f"{row.precision:.2%}", f"{row.f1:.2%}")
            for row in self.classes
        ]
        tables = [
            markdown_table(["utterances", "accuracy", "macro F1", "of unknown classes"], [totals]),
            markdown_table(["class", "utterances", "recall", "precision", "F1"], rows),
            self._confusion_table(),
        ]
        return f"# Classes on {name}\n\n" + "\n".join(tables)

    def _confusion_table(self) -> str:
        predictions = [row.label for row in self.classes]
        if any(prediction == UNREADABLE for _, prediction in self.confusions):
            predictions.append(UNREADABLE)
        if len(predictions) > MAX_TABLE_CLASSES:
            wrong = Counter({pair: count for pair, count in self.confusions.items() if pair[0] != pair[1]})
            most = wrong.most_common(MAX_TABLE_CLASSES)
            rows = [[f"{count:,}", reference, prediction or "(not read)"] for (reference, prediction), count in most]
            return markdown_table(["count", "reference", "prediction"], rows)
        references = [row.label for row in self.classes if row.num_utterances]
        rows = [[label, *(f"{self.confusions[label, other]:,}" for other in predictions)] for label in references]
        headings = ["reference \\ prediction", *(prediction or "(not read)" for prediction in predictions)]
        return markdown_table(headings, rows)


def score_classes(
    references: Sequence[str], predictions: Sequence[str], classes: Sequence[str]
) -> ClassificationReport:
    """
    Compare predicted classes, each one of `classes` or "" if the recording could not be read, with the references.

    The references may have classes that `classes`, those of the model, lacks.
    """
    confusions = Counter(zip(references, predictions, strict=True))
    num_utterances = Counter(references)
    names = [*classes, *sorted(set(references) - set(classes))]
    metrics = import_extra("sklearn.metrics", "asr", "Classification")
    rates = metrics.precision_recall_fscore_support(references, predictions, labels=names, zero_division=0.0)
    columns = zip(names, *rates[:3], strict=True)
    rows = [ClassMetrics(name, num_utterances[name], *map(float, row)) for name, *row in columns]
    known = [row.f1 for row in rows[: len(classes)] if row.num_utterances]
    return ClassificationReport(
        accuracy=sum(confusions[name, name] for name in names) / len(references),
        macro_f1=float(np.mean(known)) if known else 0.0,
        classes=rows,
        confusions=confusions,
        num_unknown=sum(row.num_utterances for row in rows[len(classes) :]),
    )


class Classification(Task):
    """
    Learn one class for each utterance; `prepare` sets `classes`, their sorted names.

    Raises `ImportError` if scikit-learn is not installed.
    """

    name = "audio-classification"
    model_class = DinoSRForSequenceClassification
    metric = "accuracy"
    greater_is_better = True

    def __init__(self, arguments: ClassificationArguments) -> None:
        import_extra("sklearn.metrics", "asr", "Classification")  # fail before the training, not after it
        self.arguments = arguments
        self.crop_seconds = arguments.crop_seconds
        self.classes: list[str] = []

    def prepare(self, train: LabelledSource) -> None:
        """
        Collect the classes: the labels of the training speech, as `visible_text` spells them.

        Raises `ArgumentError` if there is only one class, or no class has two utterances.
        """
        labels = self._references(train)
        counts = Counter(labels)
        if len(counts) == 1:
            raise ArgumentError(
                f"{train.name}: all {len(labels):,} utterances have the label {labels[0]!r}, but there must be at"
                " least two classes. Check label_column."
            )
        if max(counts.values()) == 1:
            raise ArgumentError(
                f"{train.name}: each of the {len(counts):,} labels occurs only once (one is {labels[0]!r}), so they"
                " are not classes. Check label_column. Regression on numbers is not supported."
            )
        self.classes = sorted(counts)
        logger.info("There are %d classes: %s", len(self.classes), _shorten(self.classes))

    def config_changes(self) -> dict[str, Any]:
        """Return number and names of the classes, and the input of the head."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: number for number, label in enumerate(self.classes)},
            "use_weighted_layer_sum": self.arguments.use_weighted_layer_sum,
        }

    def _references(self, source: LabelledSource) -> list[str]:
        return [visible_text(label) for label in source.labels]

    def labels(self) -> list[str]:
        """Return the classes."""
        return self.classes

    def labels_of(self, model: str) -> list[str] | None:
        """Return the classes of a classifier."""
        config: Any = open_dinosr_config(model)
        return [config.id2label[number] for number in range(config.num_labels)]

    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """Return the indices of the classes; -100 for classes that training speech does not have, with a warning."""
        indices = {label: index for index, label in enumerate(self.classes)}
        references = self._references(source)
        unknown = Counter(label for label in references if label not in indices)
        if unknown:
            shown = _shorten([f"{label!r} {count:,} times" for label, count in unknown.most_common()])
            logger.warning(
                f"{source.name}: {unknown.total():,} of {len(references):,} utterances have a label that training"
                f" speech does not have, and count as errors: {shown}."
            )
        return [indices.get(label, -100) for label in references]

    def exclusion_reason(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Exclude utterances that are too short for a frame."""
        return "without a frame" if num_frames < 1 else None

    def _labels_of(self, predictions: Any) -> list[str]:
        return [UNREADABLE if logits is None else self.classes[int(logits.argmax())] for logits in predictions]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return accuracy and macro F1; see `ClassificationReport`."""
        references = [self.classes[index] if index >= 0 else UNKNOWN for index in prediction.label_ids]
        return score_classes(references, self._labels_of(prediction.predictions), self.classes).rates

    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """
        Write `predictions-<name>.jsonl`, a line per utterance, and `classes-<name>.md`, tables for readers.

        The lines have id, reference, prediction (null if the recording could not be read) and the probability of each
        class, sorted by the probability of the reference, lowest first.
        """
        references, predicted = self._references(source), self._labels_of(predictions)
        lines = []
        for utterance_id, reference, label, logits in zip(source.ids, references, predicted, predictions, strict=True):
            probabilities: dict[str, float] = {}
            if logits is not None:
                values = torch.from_numpy(logits).double().softmax(dim=0).tolist()
                probabilities = dict(zip(self.classes, values, strict=True))
            line: dict[str, Any] = {"id": utterance_id, "reference": reference, "prediction": label or None}
            lines.append({**line, "probabilities": probabilities})
        lines.sort(key=lambda line: (line["probabilities"].get(line["reference"], 0.0), line["id"]))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / f"predictions-{name}.jsonl", text)
        report = score_classes(references, predicted, self.classes)
        write_atomically(folder / f"classes-{name}.md", report.to_markdown(name))
        return report.rates


def _shorten(words: Sequence[str]) -> str:
    rest = len(words) - _NUM_SHOWN
    return ", ".join(words[:_NUM_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")
