"""Speech recognition with CTC as a fine-tuning task: vocabulary, labels, error rates, emission delay."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, Wav2Vec2Processor

from ..data import LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForCTC
from ..recognition.decoding import GreedyDecoder
from ..recognition.scoring import score, texts_of
from ..recognition.text import (
    CASES,
    NORMALIZATION_FILE,
    UNITS,
    TextNormalization,
    build_vocabulary,
    encode,
    frames_needed,
    load_processor,
    make_processor,
    units_of,
)
from ..recognition.timing import measure_emission_delay, store_emission_delay
from ..training.shared_arguments import argument
from ..utils.command_line import ArgumentError
from ..utils.extras import import_extra
from ..utils.model_folder import feature_extractor
from .task import Task, shorten_labels

logger = logging.getLogger(__name__)


@dataclass
class RecognitionArguments:
    """Transcripts and the loss."""

    processor: str | None = argument(
        None,
        "Folder or Hub name of a recogniser whose vocabulary to use. Default: a vocabulary of the training transcripts"
        " alone.",
    )
    units: str = argument("characters", "Whether transcripts are characters or names of phones.", UNITS)
    case: str = argument(
        "lower", "Case of normalised transcripts; lower_turkic where I and ı, İ and i are pairs, as in Turkish.", CASES
    )
    keep_punctuation: str = argument("'", "Punctuation and symbols to keep in transcripts.")
    ctc_loss_reduction: str = argument(
        "sum",
        "Whether to divide an utterance's loss by its number of labels (mean) or not (sum, the paper).",
        ["sum", "mean"],
    )


class Recognition(Task):
    """Fine-tuning on transcripts with CTC, with a `processor` that `prepare` sets."""

    name = "automatic-speech-recognition"
    model_class = DinoSRForCTC
    metric = "ranking"
    greater_is_better = False
    keep_head_advice = " To train it further with its vocabulary, give its folder as --processor."

    def __init__(self, arguments: RecognitionArguments) -> None:
        self.arguments = arguments
        import_extra("jiwer", "asr", "Scoring")  # fail before the training
        self.processor: Wav2Vec2Processor | None = None
        self.normalization = TextNormalization(arguments.units, arguments.case, arguments.keep_punctuation)

    @property
    def _tokenizer(self) -> Any:
        assert self.processor is not None, "call prepare first"
        return self.processor.tokenizer

    def prepare(self, train: LabelledSource) -> None:
        """Load the given processor with its normalisation, or build a vocabulary from the training transcripts."""
        if self.arguments.processor is not None:
            try:
                self.processor, known = load_processor(self.arguments.processor)
            except ValueError as error:
                raise ArgumentError(
                    f"processor={error} Without processor, the vocabulary is built from the training transcripts."
                ) from error
            self.normalization = self._processor_normalization(known)
            self._check_vocabulary(train)
            self.processor.feature_extractor = feature_extractor()  # that of the training, whatever theirs does
        else:
            vocabulary = build_vocabulary(map(self.normalization, train.labels), self.normalization.units)
            self.processor = make_processor(vocabulary, self.normalization.units)
            logger.info("The vocabulary has %d labels: %s", len(vocabulary), " ".join(vocabulary))
        store_emission_delay(self._tokenizer, 0.0)  # a delay of the processor's own recogniser does not apply

    def _processor_normalization(self, known: TextNormalization | None) -> TextNormalization:
        """Return the processor's normalisation if it has one; `ArgumentError` if explicit arguments differ from it."""
        explicit = self.normalization
        known = known or dataclasses.replace(explicit, units=units_of(self._tokenizer))
        if explicit not in (known, TextNormalization()):
            raise ArgumentError(
                f"processor={self.arguments.processor} has units={known.units}, case={known.case} and"
                f" keep_punctuation={known.keep}, but the arguments are units={explicit.units},"
                f" case={explicit.case} and keep_punctuation={explicit.keep}. Leave them out."
            )
        return known

    def _check_vocabulary(self, train: LabelledSource) -> None:
        """Raise `ArgumentError` if the processor's vocabulary lacks most labels of the training transcripts."""
        encoded, unknown = encode(self._references(train), self._tokenizer)
        if unknown.total() > sum(map(len, encoded)):
            shown = " ".join(label for label, _ in unknown.most_common(10))
            raise ArgumentError(
                f"processor={self.arguments.processor} lacks most labels of the transcripts of {train.name}, such as"
                f" {shown}. Its labels are {shorten_labels(self.labels())}. Give a"
                f" processor that has them; if it has no {NORMALIZATION_FILE}, another case may be enough, which is"
                f" {self.normalization.case}."
            )

    def config_changes(self) -> dict[str, Any]:
        """Return the vocabulary's size and special labels, and the settings of the loss."""
        tokenizer = self._tokenizer
        return {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "ctc_loss_reduction": self.arguments.ctc_loss_reduction,
            "ctc_zero_infinity": True,  # evaluation may have utterances that are too short for their labels
        }

    def labels(self) -> list[str]:
        """Return the vocabulary."""
        return _vocabulary_of(self._tokenizer)

    def labels_of(self, model: str) -> list[str] | None:
        """Return the vocabulary of a recogniser; None if it has no tokenizer."""
        try:
            return _vocabulary_of(load_processor(model)[0].tokenizer)
        except ValueError:
            return None

    def _references(self, source: LabelledSource) -> list[str]:
        return [self.normalization(label) for label in source.labels]

    def targets(self, source: LabelledSource) -> list[np.ndarray | int]:
        """Encode the transcripts as labels int64 (L,); warn of characters that are not in the vocabulary."""
        encoded, unknown = encode(self._references(source), self._tokenizer)
        if unknown:
            shown = ", ".join(f"{label!r} {count:,} times" for label, count in unknown.most_common(10))
            logger.warning("%s: %d labels are not in the vocabulary: %s.", source.name, sum(unknown.values()), shown)
        if not any(map(len, encoded)):
            raise ArgumentError(
                f"{source.name}: none of its {len(source):,} transcripts has a label of the vocabulary, which is"
                f" {shorten_labels(self.labels())}. Is --case or --label_column wrong?"
            )
        return list(encoded)

    def exclusion_reason(self, target: np.ndarray | int, num_frames: int) -> str | None:
        """Reject empty transcripts, and utterances with fewer frames than CTC needs."""
        assert isinstance(target, np.ndarray)
        if len(target) == 0:
            return "with an empty transcript"
        return "too short for their transcript" if frames_needed(target) > num_frames else None

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute error rates, and what ranks checkpoints, for the references as the vocabulary can spell them."""
        references = [self._tokenizer.decode(labels, group_tokens=False) for labels in prediction.label_ids]
        errors = score(references, texts_of(prediction.predictions, self._tokenizer))
        return {"wer": errors.wer, "cer": errors.cer, "ranking": errors.ranking}

    def report(self, source: LabelledSource, predictions: Any, folder: Path, name: str) -> Mapping[str, float]:
        """Write an `ErrorReport` against the complete references, also of characters outside the vocabulary."""
        texts = map(self.normalization, texts_of(predictions, self._tokenizer))  # of labels of an older vocabulary
        errors = score(self._references(source), list(texts), source.ids)
        errors.save(folder, name)
        return {"wer": errors.wer, "cer": errors.cer}

    def calibrate(self, config: DinoSRConfig, source: LabelledSource, predictions: Any) -> None:
        """Measure the emission delay on the first 200 utterances, and store it in the tokenizer's settings."""
        decoder = GreedyDecoder.from_tokenizer(self._tokenizer, config, delay_seconds=0.0)
        paths = [(position, path) for position, path in enumerate(predictions) if path is not None][:200]
        delay = measure_emission_delay((source.load(position), decoder.path_times(path)) for position, path in paths)
        if delay is not None:
            store_emission_delay(self._tokenizer, delay)
            logger.info("Labels come %.2f s after their sound; times of words allow for it (emission_delay).", delay)

    def save(self, folder: Path) -> None:
        """Write the processor, with the emission delay in its tokenizer's settings, and the normalisation."""
        assert self.processor is not None
        self.processor.save_pretrained(folder)
        self.normalization.save(folder)


def _vocabulary_of(tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
