"""Transcripts and labels: text normalisation saved with the model, vocabulary, and processor."""

import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import regex
from transformers import (
    AutoProcessor,
    PreTrainedTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2PhonemeCTCTokenizer,
    Wav2Vec2Processor,
)

from ..utils.command_line import argument_errors, check_choice
from ..utils.files import write_atomically
from ..utils.model_folder import feature_extractor, find_file, open_config, opening
from ..utils.text_files import read_json
from ..utils.visible_text import remove_invisible, visible_text

NORMALIZATION_FILE = "text_normalization.json"
CASES = ("lower", "upper", "keep", "lower_turkic")
UNITS = ("characters", "phonemes")

# In the order of DinoSRConfig's default ids for padding (which is the CTC blank), begin and end.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
WORD_DELIMITER = "|"

# Signs that look alike; and selectors of emoji, which only change how a sign looks.
_ALIKE = str.maketrans(
    dict.fromkeys("’‘ʼʻ`´׳՚", "'") | dict.fromkeys("‐\u2011−", "-") | dict.fromkeys("\ufe0e\ufe0f") | {"ŉ": "'n"}
)
# Removed before NFKC, which makes letters of some emoji (ℹ, ™) and combining marks of accents without a letter (¨).
_EMOJI = regex.compile(r"(?V1)[\p{Emoji}\p{Sk}ͺ‗‾--[0-9#*]]")
# Text without the letters of which NFKC would make others: Thai and Lao am, Lao ho no and ho mo, Armenian yev, the
# Tamazight labialisation mark, modifier letters, and letters of Korean that stand alone.
_NFKC_RUN = regex.compile("[^\u0e33\u0eb3\u0edc\u0edd\u0587\u2d6f\u02b0-\u02b8\u02e0-\u02e4\u3131-\u318e]+")
# Dashes, slashes, what stands between the words of scripts such as Ethiopic, Tibetan and Devanagari, and what can only
# end a sentence or clause, in any script; two dots or more are an ellipsis, as NFKC has it.
_SEPARATOR = regex.compile(r"(?V1)[\p{Pd}\p{Pc}/\\⁄[[\p{P}\p{S}]&&[\p{lb=BA}\p{lb=EX}\p{Sentence_Terminal}]]--.]|\.\.")
_PUNCTUATION = regex.compile(r"\.{2,}|[\p{P}\p{S}\p{Me}]")  # Me: the frame of a keycap
# The dot of "İ" that `str.lower` leaves: "i" has one already. Lithuanian has it below another accent.
_SECOND_DOT = regex.compile(r"(?<=[ij])\u0307(?!\p{ccc=230})")


def _words(text: str, keep: str) -> str:
    """Return the NFKC form of a text without what is not spoken, but with characters of `keep` that NFKC makes."""

    def replacement(sign: regex.Match[str]) -> str:
        return sign[0] if sign[0][0] in keep else " " if _SEPARATOR.match(sign[0]) else ""

    text = _NFKC_RUN.sub(lambda run: unicodedata.normalize("NFKC", run[0]), _EMOJI.sub("", text))
    return _PUNCTUATION.sub(replacement, remove_invisible(text))


@dataclass(frozen=True)
class TextNormalization:
    """
    Normalisation of transcripts before training, and of references and predictions before scoring.

    Args:
        units: "characters", or "phonemes" for transcripts of phone names separated by spaces, of which only invisible
            characters are removed; then `case` and `keep` have no effect.
        case: "lower", "upper", "keep", or "lower_turkic" for Turkish, Azerbaijani and others with a dotless i: there
            I is ı in lower case and İ is i, but "lower" makes i of both.
        keep: Punctuation, symbols, emoji and invisible characters to keep. Dashes, slashes, signs between words and
            those that end a sentence (! ? …) become spaces, all others are removed. All apostrophes count as ', all
            hyphens as -.
    """

    units: str = "characters"
    case: str = "lower"
    keep: str = "'"

    def __post_init__(self) -> None:
        check_choice("units", self.units, UNITS)
        check_choice("case", self.case, CASES)

    def __call__(self, text: str) -> str:
        """
        Return the text in one case, without punctuation and invisible characters, with single spaces between words.

        Its Unicode form is NFKC, except for what is kept and for letters of which NFKC makes others; that of phonemes
        is NFC. For what is invisible, see `remove_invisible`.
        """
        if self.units == "phonemes":
            return visible_text(text)
        text, keep = text.translate(_ALIKE), self.keep.translate(_ALIKE)
        parts = regex.split(f"([{regex.escape(keep)}])", text) if keep else [text]  # the odd ones are kept
        parts[::2] = [_words(part, keep) for part in parts[::2]]
        text = _SECOND_DOT.sub("", unicodedata.normalize("NFC", "".join(parts)))
        text = text.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")  # am, typed as two signs
        if self.case == "lower_turkic":
            text = text.replace("İ", "i").replace("I", "ı")
        text = text.upper() if self.case == "upper" else text if self.case == "keep" else text.lower()
        return " ".join(_SECOND_DOT.sub("", unicodedata.normalize("NFC", text)).split())

    def save(self, folder: str | os.PathLike) -> None:
        """Write text_normalization.json to a model's folder."""
        write_atomically(Path(folder, NORMALIZATION_FILE), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, name: str | os.PathLike) -> Self | None:
        """
        Read what `save` wrote, in a model's folder or on the Hub; None if there is no file.

        Raises `ValueError` for an invalid file.
        """
        file = find_file(name, NORMALIZATION_FILE)
        if file is None:
            return None
        with argument_errors(f"{file} is not a text normalisation. Remove or replace it: ", (TypeError, ValueError)):
            normalization = cls(**read_json(file))
        return normalization


def labels_of(text: str, units: str) -> list[str]:
    """Return the labels that spell a normalised text, with the word delimiter for spaces."""
    return text.split() if units == "phonemes" else list(text.replace(" ", WORD_DELIMITER))


def build_vocabulary(texts: Iterable[str], units: str = "characters") -> dict[str, int]:
    """
    Build a vocabulary from normalised training transcripts: special tokens, the word delimiter, then sorted labels.

    Returns label -> index. Raises `ValueError` if there are no labels, or one of them is a special token.
    """
    delimiter = [] if units == "phonemes" else [WORD_DELIMITER]
    found = {label for text in texts for label in labels_of(text, units)}.difference(delimiter)
    if not found:
        raise ValueError("All transcripts are empty after normalisation. Check that column names the transcripts.")
    if taken := sorted(found & set(SPECIAL_TOKENS)):
        raise ValueError(f"The transcripts contain the special tokens {', '.join(taken)}. Rename them.")
    return {label: number for number, label in enumerate([*SPECIAL_TOKENS, *delimiter, *sorted(found)])}


def make_processor(vocabulary: dict[str, int], units: str = "characters") -> Wav2Vec2Processor:
    """Create a recogniser's processor, as `pipeline` and `AutoProcessor` load it, from label -> index."""
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
    Load a recogniser's processor, from a folder or the Hub, and the normalisation of its transcripts if it was saved.

    Raises `ValueError` if there is no tokenizer.
    """
    advice = "Give a fine-tuned recogniser."
    if Path(name, "tokenizer_config.json").is_file() and not Path(name, "vocab.json").is_file():
        raise ValueError(f"{name} lacks vocab.json, the labels of its tokenizer. Download it again. {advice}")
    if Path(name, "config.json").is_file():
        open_config(name, advice)  # AutoProcessor would say less of what is wrong with it
    with opening(name, advice):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{name} has a feature extractor but no tokenizer. {advice}")
    return processor, TextNormalization.load(name)


def units_of(tokenizer: PreTrainedTokenizer) -> str:
    """Return whether a tokenizer's labels are "phonemes" or "characters"."""
    return "phonemes" if isinstance(tokenizer, Wav2Vec2PhonemeCTCTokenizer) else "characters"


def label_pattern(labels: Iterable[str]) -> str:
    """Return a regular expression for any of the labels, the longest that fits first."""
    return "|".join(map(re.escape, sorted(filter(None, labels), key=len, reverse=True)))


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizer) -> tuple[list[np.ndarray], Counter[str]]:
    """
    Encode normalised transcripts as labels, int64 (L,) each, without those that the vocabulary lacks; empty if only
    word delimiters are left.

    Returns the labels, and the number of times that each label that is not in the vocabulary was dropped.
    """
    known_labels: dict[str, Any] = tokenizer.get_vocab()
    # Vocabularies of other programs may have phones in another Unicode form.
    vocabulary = {visible_text(label): index for label, index in known_labels.items()} | known_labels
    delimiter = None
    if units_of(tokenizer) == "phonemes":
        spelled = [text.split() for text in texts]
    else:
        delimiter = tokenizer.word_delimiter_token or " "
        labels = vocabulary.keys() - {*tokenizer.all_special_tokens} | {delimiter}
        # Always the longest label that fits, as the tokenizer does; but that loses spaces beside labels of several
        # characters. What no label fits is dropped, by characters.
        pattern = re.compile(f"{label_pattern(labels)}|.", re.DOTALL)
        spelled = [pattern.findall(text.replace(" ", delimiter)) for text in texts]
    dropped = Counter(label for labels in spelled for label in labels if label not in vocabulary)
    known = ([label for label in labels if label in vocabulary] for labels in spelled)
    kept = (labels if {*labels} - {delimiter} else [] for labels in known)
    return [np.array([vocabulary[label] for label in labels], dtype=np.int64) for labels in kept], dropped


def frames_needed(labels: np.ndarray) -> int:
    """Return the number of frames that CTC needs for labels (L,): one each, and one between two equal neighbours."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())
