"""
Classes of utterances as a task of fine-tuning: keyword, language, speaker, emotion.

The head is SUPERB's (arXiv 2105.01051, section 3): a learnt sum of all layers, a projection, the mean over time, a
linear layer. Figures are those of scikit-learn.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction

from ..data import LabelledSource
from ..model.modeling_dinosr import DinoSRForSequenceClassification
from ..utils.command_line import ArgumentError, check_ranges
from ..utils.extras import import_extra
from .task import Task

logger = logging.getLogger(__name__)

# Larger tables of confusions nobody reads: the most frequent ones are listed instead.
MAX_TABLE_CLASSES = 30
# Predicted where a recording could not be read; the class of what training did not have. No label is like them.
NOTHING = ""
UNKNOWN = " unknown"


@dataclass
class ClassificationArguments:
    """
    What the head reads, and how much of an utterance.

    Raises:
        ArgumentError: For a value that is out of range.
    """

    use_weighted_layer_sum: bool = field(
        default=True, metadata={"help": "Whether the head reads a learnt sum of all layers, or only the last one."}
    )
    crop_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Train on a random part of this length of longer utterances, which max_seconds then does not leave"
            " out; left out: on whole ones. Evaluation takes whole ones."
        },
    )

    def __post_init__(self) -> None:
        if self.crop_seconds is not None:
            check_ranges([(self.crop_seconds > 0, "crop_seconds", self.crop_seconds, "more than 0")])


class ClassFigures(NamedTuple):
    """Of one class: utterances that have it, those of them that were found, those it was given to, and rates."""

    label: str
    num_utterances: int
    num_right: int
    num_predicted: int
    precision: float
    recall: float
    f1: float


class ClassReport(NamedTuple):
    """
    How well classes were told apart.

    Attributes:
        accuracy: Share of utterances whose class was found. Unknown classes and unreadable recordings are errors.
        macro_f1: Mean F1 over the classes of the model that occur in the references, each with the same weight.
        classes: Figures of the classes of the model, then of unknown ones in the references.
        confusions: (reference, prediction) -> utterances, right ones too; "" as a prediction: could not be read.
        num_unknown: Utterances of classes that the model does not have.
    """

    accuracy: float
    macro_f1: float
    classes: list[ClassFigures]
    confusions: Counter[tuple[str, str]]
    num_unknown: int

    def to_markdown(self, name: str) -> str:
        """Rates, figures of each class, and the confusions, as tables."""
        total = sum(row.num_utterances for row in self.classes)
        text = (
            f"# Classes on {name}\n\n| utterances | accuracy | macro F1 | of unknown classes |\n|---|---|---|---|\n"
            f"| {total:,} | {self.accuracy:.2%} | {self.macro_f1:.2%} | {self.num_unknown:,} |\n\n"
            "| class | utterances | recall | precision | F1 |\n|---|---|---|---|---|\n"
        )
        for row in self.classes:
            rates = f"{row.recall:.2%} | {row.precision:.2%} | {row.f1:.2%}"
            text += f"| {_cell(row.label)} | {row.num_utterances:,} | {rates} |\n"
        return text + "\n" + self._confusion_table()

    def _confusion_table(self) -> str:
        references = [row.label for row in self.classes if row.num_utterances]
        predictions = [row.label for row in self.classes]
        if any(prediction == NOTHING for _, prediction in self.confusions):
            predictions.append(NOTHING)
        if len(predictions) > MAX_TABLE_CLASSES:
            wrong = Counter({pair: count for pair, count in self.confusions.items() if pair[0] != pair[1]})
            text = "| count | reference | prediction |\n|---|---|---|\n"
            for (reference, prediction), count in wrong.most_common(MAX_TABLE_CLASSES):
                text += f"| {count:,} | {_cell(reference)} | {_cell(prediction)} |\n"
            return text
        text = f"| reference \\ prediction | {' | '.join(map(_cell, predictions))} |\n"
        text += "|---" * (len(predictions) + 1) + "|\n"
        for reference in references:
            counts = " | ".join(f"{self.confusions[reference, prediction]:,}" for prediction in predictions)
            text += f"| {_cell(reference)} | {counts} |\n"
        return text


def _cell(label: str) -> str:
    return label.replace("|", "\\|") or "(not read)"


def score_classes(references: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> ClassReport:
    """
    Compare the classes that were found with those that are right.

    Args:
        references: The right class of each utterance; it may be one that is not of `classes`.
        predictions: What was found, one of `classes`; "": it could not be read.
        classes: Those of the model.

    Raises:
        ValueError: If their numbers differ or there are none, or a prediction is no class.
        ImportError: Without scikit-learn.
    """
    if len(references) != len(predictions) or not references:
        raise ValueError(f"{len(references)} references, {len(predictions)} predictions: give one each, and some.")
    strange = sorted(set(predictions) - {*classes, NOTHING})
    if strange:
        raise ValueError(f"predictions has {strange[0]!r}, which is none of the {len(classes)} classes.")
    confusions = Counter(zip(references, predictions, strict=True))
    occurring, found = Counter(references), Counter(predictions)
    names = [*classes, *sorted(set(references) - set(classes))]
    metrics = import_extra("sklearn.metrics", "asr", "Figures of classes")
    rates = metrics.precision_recall_fscore_support(references, predictions, labels=names, zero_division=0.0)
    rows = [
        ClassFigures(name, occurring[name], confusions[name, name], found[name], *map(float, row))
        for name, *row in zip(names, *rates[:3], strict=True)
    ]
    known = [row.f1 for row in rows[: len(classes)] if row.num_utterances]
    return ClassReport(
        accuracy=sum(row.num_right for row in rows) / len(references),
        macro_f1=float(np.mean(known)) if known else 0.0,
        classes=rows,
        confusions=confusions,
        num_unknown=sum(row.num_utterances for row in rows[len(classes) :]),
    )


def _classes_of(labels: Sequence[str], name: str) -> list[str]:
    """The classes, sorted; refuses what cannot be told apart or learnt."""
    counts = Counter(labels)
    if len(counts) == 1:
        raise ArgumentError(
            f"{name}: all {len(labels):,} utterances have the label {labels[0]!r}, but there must be at least two"
            " classes. Is label_column right?"
        )
    if max(counts.values()) == 1:
        raise ArgumentError(
            f"{name}: none of the {len(counts):,} labels occurs twice (one is {labels[0]!r}), so that they are no"
            " classes. Is label_column right? Regression, of numbers, is not offered."
        )
    return sorted(counts)


def _probabilities(logits: np.ndarray | None, classes: Sequence[str]) -> dict[str, float]:
    if logits is None:
        return {}
    return dict(zip(classes, torch.from_numpy(logits).double().softmax(dim=0).tolist(), strict=True))


class Classification(Task):
    """
    Learns one class for each utterance.

    Args:
        arguments: What the head reads, and how much of an utterance.

    Attributes:
        classes: Names of the classes, sorted; there after `prepare`.

    Raises:
        ImportError: Without scikit-learn.
    """

    name = "audio-classification"
    model_class = DinoSRForSequenceClassification
    metric = "accuracy"
    greater_is_better = True

    def __init__(self, arguments: ClassificationArguments) -> None:
        import_extra("sklearn.metrics", "asr", "Figures of classes")  # before the training, not after it
        self.arguments = arguments
        self.crop_seconds = arguments.crop_seconds
        self.classes: list[str] = []

    def prepare(self, train: LabelledSource) -> None:
        """
        The classes are the labels of the training speech, without space around them.

        Raises:
            ArgumentError: If there is one class only, or no class has two utterances.
        """
        self.classes = _classes_of(self._references(train), train.name)
        logger.info("There are %d classes: %s", len(self.classes), _first(self.classes))

    def config_changes(self) -> dict[str, Any]:
        """Number and names of the classes, and what the head reads."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: number for number, label in enumerate(self.classes)},
            "use_weighted_layer_sum": self.arguments.use_weighted_layer_sum,
        }

    def _references(self, source: LabelledSource) -> list[str]:
        return [label.strip() for label in source.labels]

    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """Numbers of the classes; -100 for those that training did not have, which are reported."""
        numbers = {label: number for number, label in enumerate(self.classes)}
        references = self._references(source)
        unknown = Counter(label for label in references if label not in numbers)
        if unknown:
            logger.warning(
                "%s: %s of %s utterances have a label that training speech does not have, and count as errors: %s.",
                *(source.name, f"{sum(unknown.values()):,}", f"{len(references):,}"),
                _first([f"{label!r} {count:,} times" for label, count in unknown.most_common()]),
            )
        return [numbers.get(label, -100) for label in references]

    def unusable(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Utterances without a frame."""
        return "without a frame" if num_frames < 1 else None

    def _found(self, predictions: Any) -> list[str]:
        return [NOTHING if row is None else self.classes[int(row.argmax())] for row in predictions]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and macro F1; see `ClassReport`."""
        references = [self.classes[number] if number >= 0 else UNKNOWN for number in prediction.label_ids]
        return _rates(score_classes(references, self._found(prediction.predictions), self.classes))

    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """
        Write `predictions-<name>.jsonl`, an utterance a line, and `classes-<name>.md`, tables to read.

        Lines have id, reference, prediction (null: could not be read) and the probability of each class, the least
        probable references first.
        """
        references, found = self._references(source), self._found(predictions)
        lines = []
        for row in zip(source.ids, references, found, predictions, strict=True):
            utterance_id, reference, prediction, logits = row
            probabilities = _probabilities(logits, self.classes)
            line = {"id": utterance_id, "reference": reference, "prediction": prediction or None}
            lines.append((probabilities.get(reference, 0.0), utterance_id, {**line, "probabilities": probabilities}))
        lines.sort(key=lambda line: line[:2])
        with open(Path(folder, f"predictions-{name}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for *_, line in lines)
        classes = score_classes(references, found, self.classes)
        Path(folder, f"classes-{name}.md").write_text(classes.to_markdown(name), encoding="utf-8")
        return _rates(classes)

    def save(self, folder: Path) -> None:
        """Nothing: the configuration has the classes, and the feature extractor comes with every model."""


def _rates(report: ClassReport) -> dict[str, float]:
    return {"accuracy": report.accuracy, "macro_f1": report.macro_f1}


def _first(words: Sequence[str], num_shown: int = 20) -> str:
    rest = len(words) - num_shown
    return ", ".join(words[:num_shown]) + (f" and {rest:,} more" if rest > 0 else "")
