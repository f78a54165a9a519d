"""
From the emissions of a CTC model to text: greedy and beam search, the best hypotheses, word times.

`B` batch, `T` frames, `V` labels. Emissions are natural logarithms of probabilities: `logits.log_softmax(-1)`.

A *label* is one output of the model. A *path* has one label a frame; it is read by dropping repetitions, then the
*blank*. With a *word delimiter* among the labels, words are what stands between delimiters. Without one (phonemes)
each label is a word. Words are joined by one space. Special labels (`<s>`, `</s>`, `<unk>`) are never read.

The score of a hypothesis in beam search, the higher the better, is

    log p(emissions) + lm_weight * log10 p(text) + word_score * words + silence_score * frames of the delimiter

where the first logarithm is natural, and that of the language model has base 10: KenLM gives such, and flashlight does
not convert it. The weights in wav2vec 2.0 (arXiv 2006.11477) and DinoSR are for this sum.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data.audio import SAMPLING_RATE
from ..utils.command_line import refuse_unknown
from .language_models import (
    SPECIAL_WORDS,
    check_language_model_file,
    flashlight,
    load_language_model,
    read_lexicon,
)
from .text import units_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer

    from ..model.configuration_dinosr import DinoSRConfig

logger = logging.getLogger(__name__)

# No path takes a label of this log probability while another is left; finite, so that differences are numbers.
_IMPOSSIBLE = -1e9

# flashlight keeps at most so many words of one spelling.
_MAX_WORDS_OF_SPELLING = 6

# Less than this share known to the language model is a mistake rather than a small model.
_MIN_SHARE_OF_WORDS = 0.1
_MIN_SHARE_OF_LABELS = 0.5


class TimedWord(NamedTuple):
    """A word and when it is spoken, in seconds from the first sample."""

    word: str
    start: float
    end: float


class Hypothesis(NamedTuple):
    """
    What may have been said.

    Attributes:
        text: The words, joined by one space.
        score: Greedy search: the sum of the path's log probabilities. Beam search: the sum at the top of this file.
        words: The words with their times.
    """

    text: str
    score: float
    words: list[TimedWord]


@dataclass(frozen=True)
class DecodingOptions:
    """
    What beam search can be told. Without `language_model` and `lexicon` it is a search over labels alone.

    The paper's ablations have `lm_weight` 2 and a word insertion penalty of 1; wav2vec 2.0 tunes both on a development
    set and has 1,500 hypotheses in the beam with a 4-gram. No paper gives the other values.

    Attributes:
        language_model: Path of an n-gram model, ARPA (may be `.gz`) or KenLM binary: over words if there is a lexicon,
            else over labels.
        lexicon: Path of a file that has the words that may come out: one a line, or `word<TAB>labels`, or an ARPA
            file, whose words are taken.
        lm_weight: Factor of log10 p(text).
        word_score: Added for each word of a search with a lexicon; negative is a penalty.
        beam_size: Hypotheses kept after each frame.
        beam_size_token: Labels tried in each frame, the most probable ones; None: all.
        beam_threshold: Hypotheses further than this under the best one are dropped.
        silence_score: Added for each frame of the word delimiter.
        log_add: Whether a hypothesis has the sum of its paths' probabilities, not that of its best path.
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
        for name in ("lm_weight", "word_score", "beam_threshold", "silence_score"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number.")
        for name in ("beam_size", "beam_size_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.beam_threshold <= 0:
            raise ValueError(f"beam_threshold={self.beam_threshold} must be more than 0, or nothing is left.")

    def save(self, path: str | Path) -> Path:
        """
        Write the options as JSON, `decoding.json` by habit.

        Paths of files in its folder or below are written relative to it, so that they can be moved together; others as
        absolute ones.
        """
        path, values = Path(path), dataclasses.asdict(self)
        folder = path.parent.resolve()
        for name in ("language_model", "lexicon"):
            if values[name] is not None:
                file = Path(values[name]).resolve()
                values[name] = (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Read what `save` wrote.

        Raises:
            ValueError: If there is no such file, it is no JSON object, or it has an unknown or a wrong option.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is not a file. Tune the decoding first, or give the options one by one.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold an object of options, but holds a {type(values).__name__}.")
        known = [field.name for field in dataclasses.fields(cls)]
        refuse_unknown(values, known, "option", where=path)
        for name in ("language_model", "lexicon"):
            if values.get(name) is not None:
                values[name] = str(path.parent / values[name])
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


class _Span(NamedTuple):
    """A label or word, and the first and last frame of its path."""

    text: str
    first: int
    last: int


class CTCDecoder(ABC):
    """
    What greedy and beam search have in common: labels, checks, and word times.

    The time of frame `i` is the centre of what it sees, `first_center + i * frame_seconds`, less `delay_seconds`. CTC
    models emit a label for a frame or two: the first of a word soon after it begins, the last well before it ends. So
    a word begins `lead_seconds` before the time of the first frame of its first label, but not before that of the last
    frame of the word before it; and ends `tail_seconds` after that of the last frame of its last label, but not after
    the next word begins. The defaults are from a recogniser of synthetic digits (docs/transcribing.md).

    Args:
        labels: The V labels, in the order of the model's outputs.
        blank_id: The label that is not read.
        word_delimiter_id: The label between words; None: each label is a word.
        special_ids: Labels that never come out.
        lowercase: Whether labels are in upper case and words in lower case (`do_lower_case` of a tokenizer).
        frame_seconds: From one frame to the next.
        first_center: Centre of the first frame, in seconds.
        lead_seconds: See above.
        tail_seconds: See above.
        delay_seconds: By which this model's labels come after their sound (`config.emission_delay`).

    Raises:
        ValueError: If an id is none of the labels, or labels that may come out are equal.
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
                raise ValueError(f"{name}={index} is none of the {len(self.labels)} labels (0 and up).")
        self.blank_id, self.word_delimiter_id, self.lowercase = blank_id, word_delimiter_id, lowercase
        self.special_ids = sorted(set(special_ids) - {blank_id, word_delimiter_id})
        self.frame_seconds, self.first_center = frame_seconds, first_center
        self.lead_seconds, self.tail_seconds, self.delay_seconds = lead_seconds, tail_seconds, delay_seconds
        unread = {*self.special_ids, blank_id}
        self._readable = {index: label for index, label in enumerate(self.labels) if index not in unread}
        twice = [label for label, count in Counter(self._readable.values()).items() if count > 1]
        if twice:
            raise ValueError(
                f"labels has {', '.join(map(repr, twice))} more than once. Add all but one to special_ids."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizer, config: DinoSRConfig, **options: Any) -> Self:
        """
        A decoder for a model.

        Args:
            tokenizer: Of the model, a `Wav2Vec2CTCTokenizer` or `Wav2Vec2PhonemeCTCTokenizer`. Its padding is the
                blank, its `word_delimiter_token` stands between words if the vocabulary has it, and its other special
                tokens never come out.
            config: Of the model: number of labels, time of a frame.
            options: Further arguments of the class.

        Raises:
            ValueError: If the tokenizer does not fit the model.
        """
        blank = tokenizer.pad_token_id
        if blank is None or not 0 <= blank < config.vocab_size or blank != config.pad_token_id:
            raise ValueError(
                f"The tokenizer's padding, {tokenizer.pad_token!r}, is label {blank}, but the model's blank is label"
                f" {config.pad_token_id} of {config.vocab_size} (config.pad_token_id, config.vocab_size). They belong"
                " to different models: load both from one folder."
            )
        labels = [str(tokenizer.convert_ids_to_tokens(index)) for index in range(config.vocab_size)]
        delimiter = None if units_of(tokenizer) == "phonemes" else tokenizer.word_delimiter_token
        special = {*tokenizer.all_special_tokens} - {delimiter}
        arguments: dict[str, Any] = {
            "blank_id": blank,
            "word_delimiter_id": labels.index(delimiter) if delimiter in labels else None,
            "special_ids": [index for index, label in enumerate(labels) if label in special and index != blank],
            "lowercase": getattr(tokenizer, "do_lower_case", False),  # that of phonemes has none
            "frame_seconds": config.inputs_to_logits_ratio / SAMPLING_RATE,
            "first_center": config.receptive_field / 2 / SAMPLING_RATE,
            "delay_seconds": config.emission_delay,
        }
        return cls(labels, **{**arguments, **options})

    @abstractmethod
    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """
        Read an utterance.

        Args:
            log_probs: float (T, V), natural logarithms that add up to one in each frame.
            num_best: How many hypotheses to return at most.

        Returns:
            Hypotheses of different texts, the best first.

        Raises:
            ValueError: If `log_probs` is of another shape, not finite, or no log probabilities, or `num_best` is not
                possible.
        """

    def decode_batch(
        self, log_probs: ArrayLike, num_frames: Sequence[int] | NDArray[np.integer], num_best: int = 1
    ) -> list[list[Hypothesis]]:
        """
        Read a padded batch, each utterance by itself.

        Args:
            log_probs: float (B, T, V).
            num_frames: Frames of each utterance (B,), as `config.num_frames(num_samples)` gives them.
            num_best: As for `decode`.

        Raises:
            ValueError: As `decode` does, or if `num_frames` does not fit.
        """
        batch, lengths = np.asarray(log_probs), [int(length) for length in num_frames]
        if batch.ndim != 3 or len(batch) != len(lengths):
            raise ValueError(
                f"log_probs is {batch.shape}, but must be (B, T, V) with B={len(lengths)} as in num_frames."
            )
        if any(not 0 <= length <= batch.shape[1] for length in lengths):
            raise ValueError(
                f"num_frames holds {lengths}, but must be between 0 and the {batch.shape[1]} of log_probs."
            )
        return [self.decode(rows[:length], num_best) for rows, length in zip(batch, lengths, strict=True)]

    def _emissions(self, log_probs: ArrayLike) -> NDArray[np.float32]:
        """Checked, copied, and without special labels."""
        array = np.array(log_probs, dtype=np.float32, order="C")
        if array.ndim != 2 or array.shape[1] != len(self.labels):
            raise ValueError(
                f"log_probs is {array.shape}, but must be (T, {len(self.labels)}): frames by labels of this decoder."
                " Is the tokenizer the model's?"
            )
        if not np.isfinite(array).all():
            raise ValueError("log_probs holds NaN or infinity. Apply log_softmax to float32, and look at the audio.")
        totals = np.logaddexp.reduce(array, axis=1)
        if len(array) and np.abs(totals).max() > 0.05:  # what is left by half precision is less
            raise ValueError(
                "log_probs are no log probabilities: in a frame they add up to"
                f" {np.exp(np.float64(totals[np.abs(totals).argmax()])):.3g} instead of 1. Apply log_softmax(-1)."
            )
        array[:, self.special_ids] = _IMPOSSIBLE
        return array

    def _label_spans(self, path: NDArray[np.integer]) -> list[tuple[int, int, int]]:
        """(label, first frame, last frame) of what is read of a path (T,)."""
        if not len(path):
            return []
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(path)) + 1])
        lasts = np.concatenate([firsts[1:], [len(path)]]) - 1
        runs = zip(path[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True)
        return [run for run in runs if run[0] != self.blank_id]

    def _word_spans(self, path: NDArray[np.integer]) -> list[_Span]:
        words: list[list[tuple[int, int, int]]] = [[]]
        for run in self._label_spans(path):
            if self.word_delimiter_id is None:
                words.append([run])
            elif run[0] == self.word_delimiter_id:
                words.append([])
            else:
                words[-1].append(run)
        return [_Span(self._read(label for label, _, _ in word), word[0][1], word[-1][2]) for word in words if word]

    def path_times(self, path: NDArray[np.integer]) -> list[tuple[float, float]]:
        """Start and end, in seconds, of each word that is read of the best labels of frames, int (T,)."""
        spans = self._word_spans(path)
        return self.word_times([span.first for span in spans], [span.last for span in spans], len(path))

    def _read(self, indices: Iterator[int]) -> str:
        text = "".join(self.labels[index] for index in indices)
        return text.lower() if self.lowercase else text

    def word_times(self, first: ArrayLike, last: ArrayLike, num_frames: int) -> list[tuple[float, float]]:
        """
        When words are spoken, as said at the top of this class.

        Args:
            first: The frame of each word's first label, in order.
            last: The last frame of each word's last label.
            num_frames: Frames of the recording.

        Returns:
            Start and end of each word, in seconds. None overlap.
        """
        # What the last frame sees ends as far behind its centre as the recording begins before the first centre.
        limit = (num_frames - 1) * self.frame_seconds + 2 * self.first_center
        earliest = self.first_center - self.delay_seconds
        begins = (np.asarray(first, dtype=np.float64) * self.frame_seconds + earliest).clip(0.0, limit)
        finishes = (np.asarray(last, dtype=np.float64) * self.frame_seconds + earliest).clip(0.0, limit)
        starts = np.maximum(begins - self.lead_seconds, np.append(0.0, finishes)[: len(begins)])
        ends = np.minimum(finishes + self.tail_seconds, np.append(starts, limit)[1:])
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def _hypothesis(self, score: float, spans: Sequence[_Span], num_frames: int) -> Hypothesis:
        times = self.word_times([span.first for span in spans], [span.last for span in spans], num_frames)
        words = [TimedWord(span.text, *time) for span, time in zip(spans, times, strict=True)]
        return Hypothesis(" ".join(span.text for span in spans), float(score), words)


class GreedyDecoder(CTCDecoder):
    """The most probable label of each frame, read. Its arguments are those of `CTCDecoder`."""

    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """As `CTCDecoder.decode` says; there is one hypothesis only."""
        if num_best != 1:
            raise ValueError(f"num_best={num_best}, but greedy search has one hypothesis. Use BeamSearchDecoder.")
        emissions = self._emissions(log_probs)
        path = emissions.argmax(axis=1)
        score = np.take_along_axis(emissions, path[:, None], axis=1).sum(dtype=np.float64)
        return [self._hypothesis(score, self._word_spans(path), len(path))]


def _examples(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")


class BeamSearchDecoder(CTCDecoder):
    """
    The best texts that a beam search finds, by flashlight-text, with an n-gram language model by KenLM.

    With a lexicon, only its words come out, and the language model is over words. The last word needs no delimiter
    behind it: the search is given one more frame that is certainly a delimiter. Without a lexicon, any text may come
    out, and the language model, if any, is over labels (`h e l l o | y o u`); the score of a text then is the sum or
    best, as `log_add` says, of all label sequences that are read as this text.

    A lexicon needs a word delimiter. Without one, flashlight lets the last label of a word last a single frame only.

    Args:
        labels: As for `CTCDecoder`.
        options: Language model, lexicon, weights and beam.
        words: The words that may come out, instead of the file `options.lexicon`.
        label_options: Further arguments of `CTCDecoder`.

    Raises:
        ImportError: If flashlight-text is not installed.
        ValueError: If a file is missing or not what it should be, no word can be spelled with the labels, or the
            language model does not know what is to be scored.
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
            raise ValueError("There are words and options.lexicon, but one of both decides what comes out. Drop one.")
        if self.options.silence_score and self.word_delimiter_id is None:
            raise ValueError(
                f"silence_score={self.options.silence_score} is added to frames of the word delimiter, but there is"
                " none among the labels. Leave it at 0."
            )
        if words is None and self.options.lexicon is None:
            self._language_model = self._open_label_model()
        else:
            entries = read_lexicon(self.options.lexicon) if self.options.lexicon else [(w, None) for w in words or ()]
            self._language_model = self._build_lexicon(entries)
        self._search = self._new_search()

    def reweighted(self, lm_weight: float, word_score: float) -> Self:
        """The same decoder with other weights. Nothing is read again, and language model and lexicon are shared."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, lm_weight=lm_weight, word_score=word_score)
        other._search = other._new_search()
        return other

    def _open_label_model(self) -> Any:
        if self.options.language_model is None:
            return self._library.ZeroLM()
        # Every index has a word; those of labels that never come out are never scored.
        names = [self._readable.get(index, f"<unread {index}>") for index in range(len(self.labels))]
        model, known = load_language_model(self.options.language_model, names)
        unknown = [label for index, label in self._readable.items() if not known[index]]
        share = 1 - len(unknown) / max(1, len(self._readable))
        if share < _MIN_SHARE_OF_LABELS or (self.word_delimiter_id is not None and not known[self.word_delimiter_id]):
            raise ValueError(
                f"{self.options.language_model} does not fit: it knows {share:.0%} of the labels, and not"
                f" {_examples(unknown)}. Without a lexicon the language model is over labels, made from lines such as"
                f" `{' '.join(list(self._readable.values())[:4])}`. For one over words give a lexicon; and upper and"
                " lower case must be as in the labels."
            )
        if unknown:
            logger.warning("%s does not know the labels %s.", self.options.language_model, _examples(unknown))
        return model

    def _spell(self, word: str) -> list[int] | None:
        """Labels of a word, each time the longest one that fits, as the tokenizer does; None if some part has none."""
        text, indices = word.upper() if self.lowercase else word, []
        while text:
            for length in range(min(len(text), self._longest), 0, -1):
                index = self._index_of.get(text[:length])
                if index is not None and index != self.word_delimiter_id:
                    indices.append(index)
                    text = text[length:]
                    break
            else:
                return None
        return indices

    def _spelled(self, entries: Sequence[tuple[str, list[str] | None]]) -> dict[tuple[int, ...], list[str]]:
        """Spelling, with a delimiter at its end, to the words that have it."""
        delimiter = self.word_delimiter_id
        if delimiter is None:
            raise ValueError(
                "A lexicon needs a word delimiter among the labels, and this vocabulary has none. Leave the lexicon"
                " out: each label then is a word, and a language model is over labels."
            )
        if not entries:
            raise ValueError("The lexicon is empty. Give the words that may come out, or no lexicon.")
        self._index_of = {label: index for index, label in self._readable.items()}
        self._longest = max(map(len, self._index_of))
        spelled: dict[tuple[int, ...], list[str]] = {}
        failed: dict[str, None] = {}
        for word, given in entries:
            indices = self._spell(word) if given is None else [self._index_of.get(label) for label in given]
            while indices and indices[-1] == delimiter:
                indices.pop()
            if not indices or None in indices or indices[0] == delimiter or word in SPECIAL_WORDS:
                failed[word] = None
                continue
            sharing = spelled.setdefault((*indices, delimiter), [])
            if word not in sharing:
                sharing.append(word)
        if not spelled:
            raise ValueError(
                f"None of the {len(failed):,} words of the lexicon can be spelled with the labels:"
                f" {_examples([*failed])}. The labels are {' '.join(self._index_of)}. The usual cause is upper case"
                " against lower case."
            )
        if failed:
            logger.warning(
                "%d words of the lexicon are left out, which the labels cannot spell: %s.",
                len(failed),
                _examples([*failed]),
            )
        return spelled

    def _build_lexicon(self, entries: Sequence[tuple[str, list[str] | None]]) -> Any:
        spelled = self._spelled(entries)
        crowded = next((words for words in spelled.values() if len(words) > _MAX_WORDS_OF_SPELLING), None)
        if crowded is not None:
            raise ValueError(
                f"{len(crowded)} words of the lexicon have the same labels, but flashlight has at most"
                f" {_MAX_WORDS_OF_SPELLING} of a kind: {', '.join(crowded)}. Drop some."
            )
        self._words = list(dict.fromkeys(word for words in spelled.values() for word in words))
        index_of = {word: index for index, word in enumerate(self._words)}
        model = self._open_word_model()
        start = model.start(True)
        self._trie = self._library.Trie(len(self.labels), self.word_delimiter_id)
        for indices, words in spelled.items():
            for word in words:
                _, score = model.score(start, index_of[word])
                self._trie.insert(list(indices), index_of[word], score)
        # Inside a word, the probability of the best word that it may become counts, so that pruning is fair.
        self._trie.smear(self._library.SmearingMode.MAX)
        return model

    def _open_word_model(self) -> Any:
        if self.options.language_model is None:
            return self._library.ZeroLM()
        model, known = load_language_model(self.options.language_model, self._words)
        unknown = [word for word, is_known in zip(self._words, known, strict=True) if not is_known]
        share = known.mean()
        counted = f"{known.sum():,} of the {len(known):,} words of the lexicon ({share:.0%})"
        if share < _MIN_SHARE_OF_WORDS:
            raise ValueError(
                f"{self.options.language_model} does not fit: it knows {counted}, and not {_examples(unknown)}. The"
                " usual cause is upper case in one and lower case in the other: write both as the labels are. If it is"
                " over labels, leave the lexicon out."
            )
        if unknown:
            logger.warning("%s knows %s, and not %s.", self.options.language_model, counted, _examples(unknown))
        return model

    def _new_search(self) -> Any:
        options, library = self.options, self._library
        arguments = {
            "beam_size": options.beam_size,
            "beam_size_token": min(options.beam_size_token or len(self.labels), len(self.labels)),
            "beam_threshold": options.beam_threshold,
            "lm_weight": options.lm_weight,
            "sil_score": 0.0,  # silence_score is added to the emissions, in both kinds of search alike
            "log_add": options.log_add,
            "criterion_type": library.CriterionType.CTC,
        }
        if self._trie is None:
            # The blank stands for silence: the search takes that label as there before the first frame.
            return library.LexiconFreeDecoder(
                library.LexiconFreeDecoderOptions(**arguments), self._language_model, self.blank_id, self.blank_id, []
            )
        # Of an unknown word flashlight lets each label last a single frame, so there are none.
        word_options = library.LexiconDecoderOptions(**arguments, word_score=options.word_score, unk_score=-math.inf)
        delimiter, unknown = self.word_delimiter_id, len(self._words)
        return library.LexiconDecoder(
            word_options, self._trie, self._language_model, delimiter, self.blank_id, unknown, [], False
        )

    def decode(self, log_probs: ArrayLike, num_best: int = 1) -> list[Hypothesis]:
        """
        Read an utterance, as `CTCDecoder.decode` says.

        With a lexicon, a search that ends within a word, because the beam is too small for anything else, leaves that
        word out.
        """
        if num_best < 1:
            raise ValueError(f"num_best={num_best} must be at least 1.")
        emissions = self._emissions(log_probs)
        num_frames = len(emissions)
        if self.word_delimiter_id is not None:
            emissions[:, self.word_delimiter_id] += np.float32(self.options.silence_score)
        if self._trie is not None:
            end = np.full((1, len(self.labels)), _IMPOSSIBLE, dtype=np.float32)
            end[0, self.word_delimiter_id] = 0.0
            emissions = np.concatenate([emissions, end])
        results = self._search.decode(emissions.ctypes.data, *emissions.shape)
        spans: dict[str, list[_Span]] = {}
        scores: dict[str, float] = {}
        for result in results:
            found = self._spans_of(result, num_frames)
            text, score = " ".join(span.text for span in found), result.score
            score -= _IMPOSSIBLE if score < _IMPOSSIBLE / 2 else 0.0  # ended within a word
            spans.setdefault(text, found)
            if self.options.log_add:
                score = float(np.logaddexp(scores.get(text, -math.inf), score))
            scores[text] = max(scores.get(text, -math.inf), score)
            if self._trie is not None and len(spans) == num_best:
                break  # there, texts differ and come in order
        best = sorted(spans, key=lambda text: -scores[text])[:num_best]
        return [self._hypothesis(scores[text], spans[text], num_frames) for text in best]

    def _spans_of(self, result: Any, num_frames: int) -> list[_Span]:
        """Words of a result, which has a delimiter before the first frame and one or two after the last."""
        path = np.array(result.tokens[1 : num_frames + 1], dtype=np.int64)
        if self._trie is None:
            return self._word_spans(path)
        spans, begin = [], 0
        for frame, index in enumerate(result.words[1 : num_frames + 2]):
            if index >= 0:
                read = np.flatnonzero(
                    (path[begin:frame] != self.blank_id) & (path[begin:frame] != self.word_delimiter_id)
                )
                spans.append(_Span(self._words[index], begin + int(read[0]), begin + int(read[-1])))
                begin = frame
        return spans
