"""Speech recognition as a task of fine-tuning: vocabulary, labels, what is too short for them, error rates."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, Wav2Vec2Processor

from ..data import LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForCTC
from ..recognition.decoding import GreedyDecoder
from ..recognition.scoring import score, speech_errors_metric, texts_of
from ..recognition.text import (
    CASES,
    UNITS,
    TextNormalization,
    build_vocabulary,
    encode,
    frames_needed,
    load_processor,
    make_processor,
    units_of,
)
from ..recognition.timing import emission_delay
from ..utils.command_line import ArgumentError
from .task import Task

logger = logging.getLogger(__name__)


@dataclass
class RecognitionArguments:
    """Transcripts and the loss."""

    processor: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a recogniser whose vocabulary is to be used; left out: one is made from the"
            " training transcripts, and from nothing else."
        },
    )
    units: str = field(
        default="characters",
        metadata={"choices": list(UNITS), "help": "What transcripts consist of: letters, or names of phones."},
    )
    case: str = field(default="lower", metadata={"choices": list(CASES), "help": "Case of normalised transcripts."})
    keep_punctuation: str = field(default="'", metadata={"help": "Punctuation and symbols that stay in transcripts."})
    ctc_loss_reduction: str = field(
        default="sum",
        metadata={
            "choices": ["sum", "mean"],
            "help": "Of an utterance's loss: as it is (the paper), or divided by its number of labels.",
        },
    )


class Recognition(Task):
    """
    Learns transcripts with CTC.

    Args:
        arguments: What the transcripts are, and what becomes of them.

    Attributes:
        processor: Of audio and text; there after `prepare`.
        normalization: Applied to transcripts of all splits, and so to both sides of the score.
    """

    name = "automatic-speech-recognition"
    model_class = DinoSRForCTC
    metric = "wer"
    greater_is_better = False

    def __init__(self, arguments: RecognitionArguments) -> None:
        self.arguments = arguments
        self._metric = speech_errors_metric()
        self.processor: Wav2Vec2Processor | None = None
        self.normalization = TextNormalization(arguments.units, arguments.case, arguments.keep_punctuation)

    @property
    def _tokenizer(self) -> Any:
        assert self.processor is not None, "prepare comes first"
        return self.processor.tokenizer

    def prepare(self, train: LabelledSource) -> None:
        """The vocabulary: an existing processor's, with its normalisation, or that of the training transcripts."""
        if self.arguments.processor is not None:
            try:
                self.processor, known = load_processor(self.arguments.processor)
            except ValueError as error:
                raise ArgumentError(
                    f"processor={error} Without processor, a vocabulary is made from the training transcripts."
                ) from error
            self.normalization = self._agreed(known)
            return
        vocabulary = build_vocabulary(map(self.normalization, train.labels), self.normalization.units)
        self.processor = make_processor(vocabulary, self.normalization.units)
        logger.info("The vocabulary has %d labels: %s", len(vocabulary), " ".join(vocabulary))

    def _agreed(self, known: TextNormalization | None) -> TextNormalization:
        """The processor's normalisation, if it has one. Raises `ArgumentError` if the run was told another."""
        told = self.normalization
        known = known or dataclasses.replace(told, units=units_of(self._tokenizer))
        if told not in (known, TextNormalization()):
            raise ArgumentError(
                f"processor={self.arguments.processor} has units={known.units}, case={known.case} and"
                f" keep_punctuation={known.keep}, but this run was told units={told.units}, case={told.case},"
                f" keep_punctuation={told.keep}. Leave these out."
            )
        return known

    def config_changes(self) -> dict[str, Any]:
        """Sizes and special labels of the vocabulary, and the loss."""
        tokenizer = self._tokenizer
        return {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "ctc_loss_reduction": self.arguments.ctc_loss_reduction,
            "emission_delay": 0.0,  # of another head, if this one starts from a recogniser
            "ctc_zero_infinity": True,  # evaluation has utterances that are too short for their labels
        }

    def _references(self, source: LabelledSource) -> list[str]:
        return [self.normalization(label) for label in source.labels]

    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """Labels int64 (L,) of the normalised transcripts; characters outside of the vocabulary are reported."""
        encoded, outside = encode(self._references(source), self._tokenizer)
        if outside:
            shown = ", ".join(f"{label!r} {count:,} times" for label, count in outside.most_common(10))
            logger.warning("%s: %d labels are not in the vocabulary: %s.", source.name, sum(outside.values()), shown)
        return list(encoded)

    def unusable(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Empty transcripts, and utterances with fewer frames than CTC needs for theirs."""
        assert isinstance(target, np.ndarray)
        if len(target) == 0:
            return "with an empty transcript"
        return "too short for their transcript" if frames_needed(target) > num_frames else None

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word and character error rate, against what the vocabulary can spell of the references."""
        references = [self._tokenizer.decode(labels, group_tokens=False) for labels in prediction.label_ids]
        found = self._metric.compute(
            predictions=texts_of(prediction.predictions, self._tokenizer), references=references
        )
        return {"wer": found["wer"], "cer": found["cer"]}

    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """Against the whole references, characters outside of the vocabulary too; see `ErrorReport.save`."""
        errors = score(self._references(source), texts_of(predictions, self._tokenizer), source.ids)
        errors.save(folder, name)
        return {"wer": errors.wer, "cer": errors.cer}

    def calibrate(self, config: DinoSRConfig, source: LabelledSource, predictions: Any) -> None:
        """Set `config.emission_delay` to that of the first 200 utterances; see `timing.emission_delay`."""
        decoder = GreedyDecoder.from_tokenizer(self._tokenizer, config, delay_seconds=0.0)
        paths = [(position, path) for position, path in enumerate(predictions) if path is not None][:200]
        delay = emission_delay((source.load(position), decoder.path_times(path)) for position, path in paths)
        if delay is not None:
            config.emission_delay = delay
            logger.info("Labels come %.2f s after their sound; times of words allow for it (emission_delay).", delay)

    def save(self, folder: Path) -> None:
        """Processor and normalisation."""
        assert self.processor is not None
        self.processor.save_pretrained(folder)
        self.normalization.save(folder)
