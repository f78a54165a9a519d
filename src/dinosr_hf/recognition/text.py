"""
From transcripts to labels: a normalisation that is written down, a vocabulary, and a processor.

`L` labels of an utterance.
"""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoProcessor,
    PreTrainedTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)

from ..utils.model_folder import feature_extractor

NORMALIZATION_FILE = "text_normalization.json"
CASES = ("lower", "upper", "keep")
UNITS = ("characters", "phonemes")

# Their places are those that DinoSRConfig has for padding (which is the blank), begin and end.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
WORD_DELIMITER = "|"

_APOSTROPHES = {ord(mark): "'" for mark in "’ʼ`´"}


@dataclass(frozen=True)
class TextNormalization:
    """
    What happens to a transcript before it is learnt or scored, on both sides of the score.

    Args:
        units: "characters", or "phonemes": then a transcript is names of phones with spaces between them, which stay
            as they are, and `case` and `keep` count for nothing.
        case: "lower", "upper", or "keep".
        keep: Punctuation and symbols that stay; all others go. Dashes and slashes become spaces.

    Raises:
        ValueError: For another value of `units` or `case`.
    """

    units: str = "characters"
    case: str = "lower"
    keep: str = "'"

    def __post_init__(self) -> None:
        for name, allowed in (("units", UNITS), ("case", CASES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {', '.join(allowed)}.")

    def __call__(self, text: str) -> str:
        """The text in Unicode's form NFKC, of one case, without punctuation, single spaces between words."""
        if self.units == "phonemes":
            return " ".join(text.split())
        # In this order: NFKC makes a space and an accent of the last of them.
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
        text = text.lower() if self.case == "lower" else text.upper() if self.case == "upper" else text
        return " ".join("".join(map(self._kept, text)).split())

    def _kept(self, character: str) -> str:
        category = unicodedata.category(character)
        if character in self.keep or category[0] not in "PS":
            return character
        return " " if category in ("Pd", "Pc") or character in "/\\⁄" else ""

    def save(self, folder: str | os.PathLike) -> None:
        """Write it beside a model."""
        Path(folder, NORMALIZATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> TextNormalization | None:
        """
        What stands beside a model; None if there is nothing.

        Raises:
            ValueError: If the file is not what `save` writes.
        """
        file = Path(folder, NORMALIZATION_FILE)
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is no text normalisation ({error}). Remove it, or make the model again."
            ) from error


def labels_of(text: str, units: str) -> list[str]:
    """The labels that spell a normalised text, the word delimiter for spaces."""
    return text.split() if units == "phonemes" else list(text.replace(" ", WORD_DELIMITER))


def build_vocabulary(texts: Iterable[str], units: str = "characters") -> dict[str, int]:
    """
    The labels of normalised training transcripts, and of nothing else.

    Args:
        texts: Normalised transcripts.
        units: As in `TextNormalization`.

    Returns:
        Label -> number: special tokens first, then the word delimiter (of characters), then labels in order.

    Raises:
        ValueError: If there are none, or one of them is a special token.
    """
    delimiter = [] if units == "phonemes" else [WORD_DELIMITER]
    found = {label for text in texts for label in labels_of(text, units)}.difference(delimiter)
    if not found:
        raise ValueError("No transcript has a label in it after normalisation. Is it the right column?")
    if taken := sorted(found & set(SPECIAL_TOKENS)):
        raise ValueError(f"The transcripts have {', '.join(taken)}, which are special tokens. Rename them.")
    return {label: number for number, label in enumerate([*SPECIAL_TOKENS, *delimiter, *sorted(found)])}


def make_processor(vocabulary: dict[str, int], units: str = "characters") -> Wav2Vec2Processor:
    """
    A processor of audio and text: what `pipeline` and `AutoProcessor` want beside a recogniser.

    Args:
        vocabulary: As from `build_vocabulary`.
        units: As in `TextNormalization`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        if units == "phonemes":
            tokenizer: PreTrainedTokenizer = Wav2Vec2PhonemeCTCTokenizer(
                str(file), do_phonemize=False, phone_delimiter_token=" ", word_delimiter_token=None
            )
        else:
            tokenizer = Wav2Vec2CTCTokenizer(str(file), word_delimiter_token=WORD_DELIMITER)
    return Wav2Vec2Processor(feature_extractor=feature_extractor(), tokenizer=tokenizer)


def load_processor(name: str | os.PathLike) -> tuple[Wav2Vec2Processor, TextNormalization | None]:
    """
    The processor of a recogniser, and how its transcripts were normalised, if that is known.

    Args:
        name: A folder, or a name on the Hub.

    Raises:
        ValueError: If there is no tokenizer.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no processor with a tokenizer ({error}). Give a fine-tuned recogniser."
        ) from error
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{name} has a feature extractor, but no tokenizer. Give a fine-tuned recogniser.")
    return processor, TextNormalization.load(name)


def units_of(tokenizer: PreTrainedTokenizer) -> str:
    """Whether a tokenizer's labels are "phonemes" or "characters"."""
    return "phonemes" if isinstance(tokenizer, Wav2Vec2PhonemeCTCTokenizer) else "characters"


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizer) -> tuple[list[np.ndarray], Counter[str]]:
    """
    Normalised transcripts as labels. What is outside of the vocabulary is left out, and counted.

    Args:
        texts: Normalised transcripts.
        tokenizer: With the vocabulary.

    Returns:
        int64 (L,) of each transcript, and label -> count of what was left out.
    """
    vocabulary: dict[str, Any] = tokenizer.get_vocab()
    units = units_of(tokenizer)
    outside: Counter[str] = Counter()
    encoded = []
    for text in texts:
        labels = labels_of(text, units)
        outside.update(label for label in labels if label not in vocabulary)
        known = [vocabulary[label] for label in labels if label in vocabulary]
        encoded.append(np.array(known, dtype=np.int64))
    return encoded, outside


def frames_needed(labels: np.ndarray) -> int:
    """Frames that CTC needs for labels (L,): one each, and one between two that are the same."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())
