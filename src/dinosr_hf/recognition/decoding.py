"""
Decoding of CTC emissions: greedy and beam search, the best hypotheses, times of words.

`B` batch, `T` frames, `V` labels. Emissions are natural logarithms of probabilities: `logits.log_softmax(-1)`. A path
has one label per frame; it is read by merging repetitions and then dropping the *blank*. If a *word delimiter* is
among the labels, it separates words. If not (phonemes), each label is a word. Words are joined by one space. Special
labels (`<s>`, `</s>`, `<unk>`) are never output. Beam search maximises

    log p(emissions) + lm_weight * log10 p(text) + word_score * words + silence_score * frames of the delimiter

where the first logarithm is natural, and that of the language model has base 10, as KenLM returns it and flashlight
uses it. The weights in wav2vec 2.0 (arXiv 2006.11477) and DinoSR are for this sum.
"""

import copy
import dataclasses
import itertools
import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizer

from ..data.audio import SAMPLING_RATE
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import argument_errors, check_ranges, refuse_unknown
from ..utils.digests import file_digest, value_digest
from ..utils.files import write_atomically
from ..utils.model_folder import find_file
from ..utils.text_files import read_json
from ..utils.visible_text import visible_text
from .language_models import SPECIAL_WORDS, check_language_model_file, flashlight, load_language_model, read_lexicon
from .text import label_pattern, units_of
from .timing import stored_emission_delay

logger = logging.getLogger(__name__)

# Score of a label that must not be taken while any other path is left; finite, so that differences are numbers.
_EXCLUDED_SCORE = -1e9

# What a language model is over -> the share of them that it must know, and advice if it knows fewer.
_MUST_KNOW = {
    "labels": (
        0.5,
        "Without a lexicon, the language model must be over labels, built from lines such as `h e l l o | y o u`, in"
        " the case of the labels. With a language model over words, give a lexicon.",
    ),
    "words of the lexicon": (
        0.1,
        "The usual cause is upper case in one and lower case in the other: write both as the labels are. With a"
        " language model over labels, leave out the lexicon.",
    ),
}


class TimedWord(NamedTuple):
    """A word with its start and end, in seconds from the first sample."""

    word: str
    start: float
    end: float


class Hypothesis(NamedTuple):
    """A possible transcript; its score is the path's log probability (greedy search) or the sum above (beam)."""

    text: str
    score: float
    words: list[TimedWord]


@dataclass(frozen=True)
class DecodingOptions:
    """
    Options of beam search. Without `language_model` and `lexicon` it searches over labels alone.

    The paper's ablations have `lm_weight` 2 and a word insertion penalty of 1; wav2vec 2.0 tunes both on a development
    set and keeps 1,500 hypotheses in the beam with a 4-gram. No paper gives the other values.

    Attributes:
        language_model: Path to an ARPA file (may be `.gz`) or KenLM binary: over words with a lexicon, else labels.
        lexicon: Path to a file of the words that may be output, see `read_lexicon`.
        lm_weight: Factor of log10 p(text).
        word_score: Added for each word of a search with a lexicon; negative is a penalty.
        beam_size: Number of hypotheses kept after each frame.
        beam_size_token: Number of labels tried in each frame, the most probable ones; None: all.
        beam_threshold: Hypotheses that score worse than the best one by more than this are dropped.
        silence_score: Added for each frame of the word delimiter.
        log_add: Whether to score a hypothesis by the sum of its paths' probabilities instead of its best path.
    """

    language_model: str | None = None
    lexicon: str | None = None
    lm_weight: float = 2.0
    word_score: float = -1.0
    beam_size: int = 1500
    beam_size_token: int | None = None
    beam_threshold: float = 50.0
    silence_score: float = 0.0
    log_add: bool = False

    def __post_init__(self) -> None:
        values, numbers = dataclasses.asdict(self), ("lm_weight", "word_score", "beam_threshold", "silence_score")
        check_ranges((math.isfinite(values[name]), name, values[name], "a finite number") for name in numbers)
        sizes = [(name, values[name]) for name in ("beam_size", "beam_size_token")]
        check_ranges((value is None or value >= 1, name, value, "at least 1") for name, value in sizes)
        check_ranges([(self.beam_threshold > 0, "beam_threshold", self.beam_threshold, "more than 0")])

    def save(self, path: str | Path) -> Path:
        """Write the options as JSON, with paths in the file's folder relative to it, so that it can be moved."""
        path, values = Path(path), dataclasses.asdict(self)
        folder = path.parent.resolve()
        for name in ("language_model", "lexicon"):
            if values[name] is not None:
                file = Path(values[name]).resolve()
                values[name] = (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
        return write_atomically(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `ValueError` for a missing or invalid file or option."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is not a file. Write it with `dinosr tune` or DecodingOptions.save.")
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} must contain an object of options, but contains a {type(values).__name__}.")
        refuse_unknown(values, [field.name for field in dataclasses.fields(cls)], "option", where=path)
        for name, kind in get_type_hints(cls).items():
            value, allowed = values.get(name, getattr(cls, name)), int | float if kind is float else kind
            if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
                wanted = str(getattr(kind, "__name__", kind)).replace("None", "null")
                raise ValueError(f"{path}: {name} is {value!r}, but must be of the type {wanted}.")
        with argument_errors(f"{path}: ", (OverflowError, ValueError)):
            for name in ("language_model", "lexicon"):
                if values.get(name) is not None:
                    values[name] = str(path.parent / values[name])
            options = cls(**values)
        return options


def find_decoding(name: str | Path) -> DecodingOptions | None:
    """
    Read the `decoding.json` of a recogniser in a folder or on the Hub; None: there is none.

    The language model and lexicon that it names come from there as well. Raises `ValueError` for an invalid file or
    option.
    """
    file = find_file(name, "decoding.json")
    if file is None:
        return None
    options = DecodingOptions.load(file)
    for path in filter(None, (options.language_model, options.lexicon)):
        if Path(path).is_relative_to(file.parent):
            find_file(name, Path(path).relative_to(file.parent).as_posix())  # downloads it
    return options


class _WordSpan(NamedTuple):
    """A word, and the first and last frame of its labels."""

    text: str
    first: int
    last: int


class CTCDecoder(ABC):
    """
    Base of greedy and beam search: labels, checks, and times of words.

    The time of frame `i` is the centre of what it sees, `first_center + i * frame_seconds`, minus `delay_seconds`. CTC
    models emit the first label of a word soon after it begins, the last one well before it ends. So a word starts
    `lead_seconds` before its first label, but not before the last label of the word before it. It ends `tail_seconds`
    after its last label, but not after the start of the next word. The defaults were measured with a recogniser of
    synthetic digits (docs/transcribing.md).

    Args:
        labels: The V labels, in the order of the model's outputs; those that may be output must differ.
        blank_id: Index of the CTC blank.
        word_delimiter_id: Index of the label between words; None: each label is a word.
        special_ids: Indices of labels that are never output.
        lowercase: Whether labels are in upper case and words in lower case (`do_lower_case` of a tokenizer).
        frame_seconds: Seconds from one frame to the next.
        first_center: Centre of the first frame, in seconds.
        lead_seconds, tail_seconds: See above.
        delay_seconds: Seconds by which this model's labels come after their sound (`recognition.timing`).
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        blank_id: int,
        word_delimiter_id: int | None = None,
        special_ids: Sequence[int] = (),
        lowercase: bool = False,
        frame_seconds: float = 320 / SAMPLING_RATE,
        first_center: float = 200 / SAMPLING_RATE,
        lead_seconds: float = 0.03,
        tail_seconds: float = 0.16,
        delay_seconds: float = 0.0,
    ) -> None:
        self.labels = list(labels)
        named = {"blank_id": blank_id, "word_delimiter_id": word_delimiter_id}
        for name, index in [*named.items(), *(("special_ids", index) for index in special_ids)]:
            if index is not None and not 0 <= index < len(self.labels):
                raise ValueError(f"{name}={index} is out of range: labels has {len(self.labels)} entries.")
        self.blank_id, self.word_delimiter_id, self.lowercase = blank_id, word_delimiter_id, lowercase
        self.special_ids = sorted(set(special_ids) - {blank_id, word_delimiter_id})
        self.frame_seconds, self.first_center = frame_seconds, first_center
        self.lead_seconds, self.tail_seconds, self.delay_seconds = lead_seconds, tail_seconds, delay_seconds
        unread = {*self.special_ids, blank_id}
        self._readable = {index: label for index, label in enumerate(self.labels) if index not in unread}
        duplicates = [repr(label) for label, count in Counter(self._readable.values()).items() if count > 1]
        if duplicates:
            raise ValueError(f"labels has {', '.join(duplicates)} more than once. Add all but one to special_ids.")

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizer, config: DinoSRConfig, **options: Any) -> Self:
        """
        Create a decoder for a model from its tokenizer and configuration; `options` are arguments of the class.

        The tokenizer's padding token is the blank, its `word_delimiter_token` separates words if the vocabulary has
        it, its other special tokens are never output, and its settings have the emission delay. Raises `ValueError` if
        it does not fit the model.
        """
        blank = tokenizer.pad_token_id
        if blank is None or not 0 <= blank < config.vocab_size or blank != config.pad_token_id:
            raise ValueError(
                f"The tokenizer's padding token {tokenizer.pad_token!r} is label {blank}, but the model's blank is"
                f" label {config.pad_token_id} of {config.vocab_size} (in its config). Load both from the same folder."
            )
        labels = [str(tokenizer.convert_ids_to_tokens(index)) for index in range(config.vocab_size)]
        delimiter = None if units_of(tokenizer) == "phonemes" else tokenizer.word_delimiter_token
        special = {*tokenizer.all_special_tokens} - {delimiter}
        arguments: dict[str, Any] = {
            "blank_id": blank,
            "word_delimiter_id": labels.index(delimiter) if delimiter in labels else None,
            "special_ids": [index for index, label in enumerate(labels) if label in special and index != blank],
            "lowercase": getattr(tokenizer, "do_lower_case", False),  # phoneme tokenizers have no such attribute
            "frame_seconds": config.inputs_to_logits_ratio / SAMPLING_RATE,
            "first_center": config.receptive_field / 2 / SAMPLING_RATE,
            "delay_seconds": stored_emission_delay(tokenizer),
        }
        return cls(labels, **{**arguments, **options})

    @property
    def settings(self) -> dict[str, Any]:
        """What transcripts depend on, as JSON can express it; files by their digests, so they can be moved."""
        labels = [self.labels, self.blank_id, self.word_delimiter_id, self.special_ids, self.lowercase]
        names = ("frame_seconds", "first_center", "lead_seconds", "tail_seconds", "delay_seconds")
        times = {name: getattr(self, name) for name in names}
        return {"search": type(self).__name__, "labels_sha256": value_digest(labels), **times}

    @abstractmethod
    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """
        Decode an utterance into at most `num_best` hypotheses of different texts, the best first.

        `log_probs` is float (T, V), natural logarithms of probabilities that sum to 1 in each frame. Raises
        `ValueError` if it has another shape or other values, or `num_best` is out of range.
        """

    def decode_batch(
        self, log_probs: ArrayLike, num_frames: Sequence[int] | NDArray[np.integer], num_best: int = 1
    ) -> list[list[Hypothesis]]:
        """Decode the utterances of a padded batch (B, T, V), of `num_frames` (B,) each, as `decode` does."""
        batch, lengths = np.asarray(log_probs), np.asarray(num_frames)
        if batch.ndim != 3 or lengths.shape != batch.shape[:1] or np.any((lengths < 0) | (lengths > batch.shape[1])):
            raise ValueError(
                f"log_probs is {batch.shape} and num_frames is {lengths.tolist()}, but they must be (B, T, V) and B"
                " numbers from 0 to T."
            )
        return [self.decode(rows[:length], num_best) for rows, length in zip(batch, lengths, strict=True)]

    def _emissions(self, log_probs: ArrayLike) -> NDArray[np.float32]:
        """Check and copy emissions, and exclude special labels."""
        array = np.array(log_probs, dtype=np.float32, order="C")
        if array.ndim != 2 or array.shape[1] != len(self.labels):
            raise ValueError(
                f"log_probs is {array.shape}, but must be (T, {len(self.labels)}): frames by labels of this decoder."
                " Check that the tokenizer is the model's."
            )
        if not np.isfinite(array).all():
            raise ValueError("log_probs contains NaN or infinity. Apply log_softmax in float32, and check the audio.")
        totals = np.logaddexp.reduce(array, axis=1)
        if len(array) and np.abs(totals).max() > 0.05:  # more than half precision explains
            raise ValueError(
                "log_probs must be log probabilities, but those of a frame add up to"
                f" {np.exp(np.float64(totals[np.abs(totals).argmax()])):.3g} instead of 1. Apply log_softmax(-1)."
            )
        array[:, self.special_ids] = _EXCLUDED_SCORE
        return array

    def _word_spans(self, path: NDArray[np.integer]) -> list[_WordSpan]:
        """Read the words of a path (T,)."""
        words: list[list[tuple[int, int, int]]] = [[]]  # (label, first frame, last frame) of each label of each word
        end = 0
        for label, run in itertools.groupby(path.tolist()):
            first, end = end, end + len(list(run))
            if label == self.word_delimiter_id:
                words.append([])
            elif label != self.blank_id:
                words[-1].append((label, first, end - 1))
                if self.word_delimiter_id is None:
                    words.append([])
        spans = []
        for word in filter(None, words):
            text = "".join(self.labels[label] for label, _, _ in word)
            spans.append(_WordSpan(text.lower() if self.lowercase else text, word[0][1], word[-1][2]))
        return spans

    def path_times(self, path: NDArray[np.integer]) -> list[tuple[float, float]]:
        """Return start and end, in seconds, of each word of a path, int (T,)."""
        return [(start, end) for _, start, end in self._timed(self._word_spans(path), len(path))]

    def word_times(self, first: ArrayLike, last: ArrayLike, num_frames: int) -> list[tuple[float, float]]:
        """
        Return start and end, in seconds, of words in a recording of `num_frames` frames; words do not overlap.

        `first` and `last` have the first frame of each word's first label and the last frame of its last, in order.
        """
        # The last frame sees as much after its centre as the first frame sees before its own.
        limit = (num_frames - 1) * self.frame_seconds + 2 * self.first_center
        earliest = self.first_center - self.delay_seconds
        frames = np.array([first, last], dtype=np.float64)
        begins, finishes = (frames * self.frame_seconds + earliest).clip(0.0, limit)
        starts = np.maximum(begins - self.lead_seconds, np.append(0.0, finishes)[: len(begins)])
        ends = np.minimum(finishes + self.tail_seconds, np.append(starts, limit)[1:])
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def _timed(self, spans: Sequence[_WordSpan], num_frames: int) -> list[TimedWord]:
        times = self.word_times([span.first for span in spans], [span.last for span in spans], num_frames)
        return [TimedWord(span.text, *time) for span, time in zip(spans, times, strict=True)]

    def _hypothesis(self, score: float, spans: Sequence[_WordSpan], num_frames: int) -> Hypothesis:
        return Hypothesis(" ".join(span.text for span in spans), float(score), self._timed(spans, num_frames))


class GreedyDecoder(CTCDecoder):
    """Takes the most probable label of each frame."""

    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """Decode an utterance, as `CTCDecoder.decode` does; `num_best` must be 1."""
        if num_best != 1:
            raise ValueError(f"num_best={num_best}, but greedy search has a single hypothesis. Use BeamSearchDecoder.")
        emissions = self._emissions(log_probs)
        path = emissions.argmax(axis=1)
        score = np.take_along_axis(emissions, path[:, None], axis=1).sum(dtype=np.float64)
        return [self._hypothesis(score, self._word_spans(path), len(path))]


def _examples(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")


class BeamSearchDecoder(CTCDecoder):
    """
    Beam search by flashlight-text, with an n-gram language model by KenLM.

    With a lexicon, only its words are output, and the language model is over words. The last word needs no delimiter
    after it: a frame that is certainly a delimiter is appended. But the labels must have a delimiter: without one,
    flashlight lets the last label of a word last a single frame only. Without a lexicon, any text may be output, and
    the language model, if any, is over labels (`h e l l o | y o u`); the score of a text then is the sum or maximum
    (`log_add`) over all label sequences that read as this text.

    The arguments are those of `CTCDecoder`, and `words`, those that may be output, instead of a file
    `options.lexicon`. Raises `ImportError` if flashlight-text is not installed; `ValueError` if a file is invalid, no
    word can be spelled, or the language model does not know what it scores.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        options: DecodingOptions | None = None,
        words: Sequence[str] | None = None,
        **label_options: Any,
    ) -> None:
        super().__init__(labels, **label_options)
        self.options = options or DecodingOptions()
        self._library = flashlight("decoder")
        self._words: list[str] = []
        self._trie: Any = None
        if self.options.language_model is not None:
            check_language_model_file(self.options.language_model)
        if words is not None and self.options.lexicon is not None:
            raise ValueError("words and options.lexicon both give the words that may be output. Leave out one.")
        if self.options.silence_score and self.word_delimiter_id is None:
            raise ValueError(
                f"silence_score={self.options.silence_score} needs a word delimiter, and none is among the labels."
                " Leave it at 0."
            )
        if words is None and self.options.lexicon is None:
            # Every index needs a name; labels that are never output are never scored.
            names = [self._readable.get(index, f"<unread {index}>") for index in range(len(self.labels))]
            self._language_model = self._open_language_model(names, list(self._readable), "labels")
        else:
            entries = [(word, None) for word in words or ()]
            self._build_lexicon(read_lexicon(self.options.lexicon) if self.options.lexicon else entries)
        self._search = self._new_search()

    @property
    def settings(self) -> dict[str, Any]:
        """What transcripts depend on; see `CTCDecoder.settings`."""
        options = dataclasses.asdict(self.options)
        for name in ("language_model", "lexicon"):
            path = options.pop(name)
            options[f"{name}_sha256"] = None if path is None else file_digest(path)
        return {**super().settings, **options, "words_sha256": value_digest(self._words)}

    def reweighted(self, lm_weight: float, word_score: float) -> Self:
        """Return a copy with other weights that shares language model and lexicon; nothing is read again."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, lm_weight=lm_weight, word_score=word_score)
        other._search = other._new_search()
        return other

    def _open_language_model(self, names: Sequence[str], scored: Sequence[int], what: str) -> Any:
        """Load the language model for names, and check that it knows those with the indices `scored`."""
        path = self.options.language_model
        if path is None:
            return self._library.ZeroLM()
        model, known = load_language_model(path, names)
        unknown = [names[index] for index in scored if not known[index]]
        if not unknown:
            return model
        num_known, share = len(scored) - len(unknown), 1 - len(unknown) / len(scored)
        min_share, advice = _MUST_KNOW[what]
        shown = f"{num_known:,} of the {len(scored):,} {what} ({share:.0%}), and not {_examples(unknown)}."
        needs_delimiter = what == "labels" and self.word_delimiter_id is not None
        if share < min_share or (needs_delimiter and not known[self.word_delimiter_id]):
            raise ValueError(f"{path} does not fit: it knows {shown} {advice}")
        logger.warning("%s knows %s", path, shown)
        return model

    def _spell(self, word: str) -> list[int] | None:
        """Spell a word, always with the longest label that fits, as the tokenizer does; None if that fails."""
        for form in (word, visible_text(word)):
            text = form.upper() if self.lowercase else form
            labels = self._label_pattern.findall(text)
            if "".join(labels) == text:
                return [self._index_of[label] for label in labels]
        return None

    def _spelled(self, entries: Sequence[tuple[str, list[str] | None]]) -> dict[tuple[int, ...], dict[str, None]]:
        """Map each spelling, with a delimiter at its end, to the words that have it."""
        delimiter = self.word_delimiter_id
        if delimiter is None:
            raise ValueError(
                "A lexicon needs a word delimiter among the labels, and this vocabulary has none. Leave out the"
                " lexicon: each label then is a word, and the language model is over labels."
            )
        if not entries:
            raise ValueError("The lexicon is empty. Give the words that may be output, or no lexicon.")
        self._index_of = {label: index for index, label in self._readable.items()}
        alike = {visible_text(label): index for label, index in self._index_of.items()} | self._index_of
        spellable = (label for index, label in self._readable.items() if index != delimiter)
        self._label_pattern = re.compile(label_pattern(spellable))
        spelled: dict[tuple[int, ...], dict[str, None]] = defaultdict(dict)
        failed: dict[str, None] = {}
        for word, labels in entries:
            given = [alike.get(label, alike.get(visible_text(label))) for label in labels or ()]
            indices = self._spell(word) if labels is None else given
            while indices and indices[-1] == delimiter:
                indices.pop()
            if not indices or None in indices or indices[0] == delimiter or word in SPECIAL_WORDS:
                failed[word] = None
            else:
                spelled[*indices, delimiter][word] = None
        examples = _examples([*failed])
        if not spelled:
            raise ValueError(
                f"None of the {len(failed):,} words of the lexicon can be spelled with the labels: {examples}. The"
                f" labels are {' '.join(self._index_of)}. The usual cause is upper case against lower case."
            )
        if failed:
            logger.warning("Skipped %d words of the lexicon that the labels cannot spell: %s.", len(failed), examples)
        crowded = max(spelled.values(), key=len)
        if len(crowded) > 6:
            raise ValueError(
                f"{len(crowded)} words of the lexicon have the same labels, but flashlight keeps at most 6 of them:"
                f" {', '.join(crowded)}. Remove some."
            )
        return spelled

    def _build_lexicon(self, entries: Sequence[tuple[str, list[str] | None]]) -> None:
        """Set the words, their language model, and the trie of their spellings."""
        spelled = self._spelled(entries)
        self._words = list(dict.fromkeys(word for words in spelled.values() for word in words))
        model = self._open_language_model(self._words, range(len(self._words)), "words of the lexicon")
        start, index_of = model.start(True), {word: index for index, word in enumerate(self._words)}
        self._language_model, self._trie = model, self._library.Trie(len(self.labels), self.word_delimiter_id)
        for indices, words in spelled.items():
            for word in words:
                _, score = model.score(start, index_of[word])
                self._trie.insert(list(indices), index_of[word], score)
        # Within a word, score the best word that it may become, so that pruning is fair.
        self._trie.smear(self._library.SmearingMode.MAX)

    def _new_search(self) -> Any:
        options, library = self.options, self._library
        arguments = {
            "beam_size": options.beam_size,
            "beam_size_token": min(options.beam_size_token or len(self.labels), len(self.labels)),
            "beam_threshold": options.beam_threshold,
            "lm_weight": options.lm_weight,
            "sil_score": 0.0,  # silence_score is added to the emissions, in both kinds of search
            "log_add": options.log_add,
            "criterion_type": library.CriterionType.CTC,
        }
        if self._trie is None:
            # The blank stands for silence: the search assumes that label before the first frame.
            return library.LexiconFreeDecoder(
                library.LexiconFreeDecoderOptions(**arguments), self._language_model, self.blank_id, self.blank_id, []
            )
        # No unknown words: flashlight lets each of their labels last a single frame only.
        word_options = library.LexiconDecoderOptions(**arguments, word_score=options.word_score, unk_score=-math.inf)
        labels = (self.word_delimiter_id, self.blank_id, len(self._words))  # silence, blank, unknown word
        return library.LexiconDecoder(word_options, self._trie, self._language_model, *labels, [], False)

    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """Decode an utterance; a word that a small beam does not finish is left out."""
        if num_best < 1:
            raise ValueError(f"num_best={num_best} must be at least 1.")
        emissions = self._emissions(log_probs)
        num_frames = len(emissions)
        if self.word_delimiter_id is not None:
            emissions[:, self.word_delimiter_id] += np.float32(self.options.silence_score)
        if self._trie is not None:
            end = np.full((1, len(self.labels)), _EXCLUDED_SCORE, dtype=np.float32)
            end[0, self.word_delimiter_id] = 0.0
            emissions = np.concatenate([emissions, end])
        spans: dict[str, list[_WordSpan]] = {}
        scores: dict[str, float] = {}
        for result in self._search.decode(emissions.ctypes.data, *emissions.shape):
            found = self._spans_of(result, num_frames)
            text, score = " ".join(span.text for span in found), result.score
            score -= _EXCLUDED_SCORE if score < _EXCLUDED_SCORE / 2 else 0.0  # ended within a word
            spans.setdefault(text, found)
            add = np.logaddexp if self.options.log_add else max
            scores[text] = float(add(scores.get(text, -math.inf), score))
            if self._trie is not None and len(spans) == num_best:
                break  # with a lexicon, texts differ and are in order
        best = sorted(spans, key=lambda text: -scores[text])[:num_best]
        return [self._hypothesis(scores[text], spans[text], num_frames) for text in best]

    def _spans_of(self, result: Any, num_frames: int) -> list[_WordSpan]:
        """Read the words of a result, which has a delimiter before the first frame and one or two after the last."""
        path = np.array(result.tokens[1 : num_frames + 1], dtype=np.int64)
        if self._trie is None:
            return self._word_spans(path)
        spans, begin = [], 0
        for frame, index in enumerate(result.words[1 : num_frames + 2]):
            if index >= 0:
                labels = path[begin:frame]
                spoken = begin + np.flatnonzero((labels != self.blank_id) & (labels != self.word_delimiter_id))
                spans.append(_WordSpan(visible_text(self._words[index]), int(spoken[0]), int(spoken[-1])))
                begin = frame
        return spans
