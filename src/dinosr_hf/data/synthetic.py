"""
A synthetic speech corpus: texts of a grammar, voices of espeak-ng, a channel of numpy, and phones with times.

Demo, tests and documentation use it to measure real quantities (phone purity, word error rate) without a network.
espeak-ng is licensed under the GPL: it comes with the optional extra "dinosr-hf[demo]" and is never imported unless an
utterance is requested.

    text  ->  espeak-ng (22.05 kHz, events)  ->  phones and words  ->  16 kHz, longer or shorter vocal tract
          ->  silence around it  ->  room, microphone, noise, level  ->  a row

Utterance i of (seed, split) is the same, bit for bit, in any order, in any number of processes, and for any
`num_utterances`. That holds for one build of espeak-ng, soxr and numpy. Splits share no speaker and no voice variant.

Labels of phones are "SIL" for silence, else espeak-ng's IPA name without marks of stress ("ˈ", "ˌ") and length ("ː"),
so that a stressed and an unstressed vowel are one phone. Diphthongs and affricates are one phone, as in "aɪ" and "tʃ".
The closure of a stop belongs to the stop. Where espeak-ng speaks two phones as one ("l" of "whale", "w" of French
"trois"), the label is that of the other.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..utils.files import atomic_folder
from ._espeak import ESPEAK_RATE, Event, require, synthesize
from ._grammar import GRAMMARS, digit_string, expand
from .audio import SAMPLING_RATE
from .workers import block_signals_in_workers, initialize_worker

if TYPE_CHECKING:
    import datasets

SILENCE = "SIL"
LANGUAGES = tuple(GRAMMARS)
SPLITS = ("train", "validation", "test")
TEXTS = ("sentences", "digits", "mixed")
FORMATS = ("flac", "wav")

# Seconds at each end of a text. With less around digits, recognisers get more of them right, and time them better
# (docs/experiments-2026-11.md).
_SILENCE_SECONDS = (0.05, 0.3)
_DIGITS_SILENCE = (0.0, 0.1)

# espeak-ng is silent before a consonant: 20 to 70 ms for the closure of a stop, up to 40 ms elsewhere (at 130 words a
# minute, the slowest here). A longer silence, not within a word, is a pause. Pauses are 60 ms and more, and before a
# stop the closure adds to them, so the two kinds cannot be confused.
_MAX_CLOSURE_SECONDS = 0.075
_MAX_ONSET_SECONDS = 0.045
_STOPS = frozenset("ptkbdɡ")

# Loud enough to use the 16 bits, low enough that no voice reaches their limit and is attenuated while it speaks.
_VOLUME = 30
_CLEAN_DBFS = -23.0
_SNR_DB = (10.0, 40.0)

# The variants of espeak-ng that are human voices, and silent with exact zeros, which `_phone_segments` measures: for
# any language, no echo, not of the Klatt synthesiser, not whispered or shouted (voicing 25 to 170), formants 1 to 3 at
# 70 to 140 %. A high voice has a mean pitch above 130.
_LOW_VOICES = (
    "Alex, Denis, Diogo, Gene, Gene2, Henrique, Hugo, Mario, Mike, Mr serious, croak, ed, fast, grandpa, ian, iven3,"
    " iven4, john, m1, m3, m4, m5, m6, m7, m8, max, michel, miguel, norbert, quincy, rob, robert, sandro, victor"
)
_HIGH_VOICES = "Annie, Nguyen, aunty, belinda, f1, grandma, linda, shelby, steph, steph2"

_T = TypeVar("_T")


class _Span(NamedTuple):
    """A labelled segment of an utterance, in samples at one rate."""

    label: str
    start: int
    end: int

    def moved(self, offset: int, ratio: float = 1, label: str | None = None) -> _Span:
        """Return the segment on another time scale, `ratio` times as long and `offset` samples later."""
        start, end = offset + round(self.start * ratio), offset + round(self.end * ratio)
        return _Span(self.label if label is None else label, start, end)


class Speaker(NamedTuple):
    """The properties of a speaker, which all its utterances share."""

    id: str
    language: str
    variant: str  # espeak-ng's voice variant
    pitch: int  # 0 to 99, 50 is the variant's own
    pitch_range: int  # 0 is monotone, 50 is the variant's own
    rate: int  # words a minute
    tract: float  # length of the vocal tract relative to the variant's: all frequencies are divided by it


def _generator(seed: int, split: str, purpose: str, number: int = 0) -> np.random.Generator:
    purposes = ("voices", "speaker", "speech", "channel")
    return np.random.default_rng([seed, SPLITS.index(split), purposes.index(purpose), number])


def _variants_of_split(seed: int, split: str) -> list[list[str]]:
    """Return the low and the high voices of a split: 70 % train, 15 % validation, 15 % test of each kind."""
    pools = []
    shuffle = _generator(seed, SPLITS[0], "voices")  # the same for all splits
    for names in (_LOW_VOICES.split(", "), _HIGH_VOICES.split(", ")):
        order = [names[position] for position in shuffle.permutation(len(names))]
        size = max(1, round(0.15 * len(order)))
        parts = (order[: -2 * size], order[-2 * size : -size], order[-size:])
        pools.append(parts[SPLITS.index(split)])
    return pools


def _silent_run(is_silent: np.ndarray, end: int) -> int:
    """Return the number of silent samples just before `end`."""
    window = is_silent[max(0, end - ESPEAK_RATE) : end][::-1]  # silences are shorter than a second
    return int(len(window) if window.all() else np.argmin(window))


def _without_nameless_sounds(is_silent: np.ndarray, phones: list[Event]) -> list[Event]:
    """Give nameless sounds to a phone beside them: a trill's onset to the "r", a glide after "i" to the "i" (río)."""
    kept: list[Event] = []
    onset: int | None = None
    ends = [phone.sample for phone in phones[1:]] + [len(is_silent)]
    for phone, end in zip(phones, ends, strict=True):
        if not phone.name and end > phone.sample and not is_silent[phone.sample : end].mean() > 0.5:
            onset = phone.sample
            continue
        if onset is not None and phone.name == "r":
            phone = phone._replace(sample=onset)
        onset = None
        kept.append(phone)
    return kept


def _phone_segments(samples: np.ndarray, events: list[Event]) -> tuple[list[_Span], list[int]]:
    """
    Return contiguous phones over all samples, at ESPEAK_RATE, and the text position of each (-1: silence).

    An event is where the sound of its phone begins: after the closure of a stop, after a pause. Pauses have events of
    their own only at the end of a clause; others are found as runs of exact zeros before an event.
    """
    is_silent = samples == 0
    starts: list[tuple[str, int, int]] = [(SILENCE, 0, -1)]
    for event in _without_nameless_sounds(is_silent, events):
        silence = _silent_run(is_silent, event.sample)
        begin = event.sample - silence
        if not event.name:
            starts.append((SILENCE, begin, -1))
            continue
        longest = _MAX_CLOSURE_SECONDS if event.name.lstrip("ˈˌ")[:1] in _STOPS else _MAX_ONSET_SECONDS
        in_word = starts[-1][2] == event.text_position  # a double stop, held for long, as in Italian
        if silence > longest * ESPEAK_RATE and not in_word:
            starts.append((SILENCE, begin, -1))
            begin = event.sample
        starts.append((event.name, begin, event.text_position))
    starts.append((SILENCE, len(samples) - _silent_run(is_silent, len(samples)), -1))

    segments: list[_Span] = []
    positions: list[int] = []
    ends = [begin for _, begin, _ in starts[1:]] + [len(samples)]
    for (label, begin, position), end in zip(starts, ends, strict=True):
        if end <= begin:  # a pause of no length, or two phones said as one
            continue
        if segments and label == SILENCE == segments[-1].label:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(_Span(label, begin, end))
            positions.append(position)
    return segments, positions


def _label(name: str) -> str:
    name = re.sub(r"(\w)\1", r"\1", name.removesuffix("-"))  # "a-" is a shade of "a", "ss" is a long "s"
    return re.sub("[ˈˌː]", "", name)


def _word_segments(text: str, phones: list[_Span], positions: list[int]) -> list[_Span]:
    """Return the words of a text, each from its first phone to its last."""
    words = []
    for match in re.finditer(r"\w+", text):
        own = [phone for phone, position in zip(phones, positions, strict=True) if position == match.start()]
        assert own, f"espeak-ng runs {match[0]!r} in {text!r} together with the word before it"
        words.append(_Span(match[0], own[0].start, own[-1].end))
    return words


class _Speech(NamedTuple):
    """A clean utterance at SAMPLING_RATE, before the channel."""

    samples: np.ndarray  # (S,) float32, at espeak-ng's own level
    phones: list[_Span]
    words: list[_Span]
    speaker: Speaker


def _say(
    text: str,
    speaker: Speaker,
    silence_seconds: tuple[float, float],
    generator: np.random.Generator,
) -> _Speech:
    """Speak a text, with the speaker's random variation and a little silence around it."""
    samples, events = synthesize(
        text,
        voice=f"{speaker.language}+{speaker.variant}",
        pitch=speaker.pitch + int(generator.integers(-3, 4)),
        pitch_range=speaker.pitch_range,
        rate=speaker.rate + int(generator.integers(-5, 6)),
        volume=_VOLUME,
        seed=int(generator.integers(2**31 - 1)),
    )
    phones, positions = _phone_segments(samples, events)
    words = _word_segments(text, phones, positions)

    # Played at another speed, a voice has a vocal tract of another length (and another pitch and tempo).
    scaled = samples.astype(np.float32) / 32_768
    resampled = require("soxr").resample(scaled, ESPEAK_RATE / speaker.tract, SAMPLING_RATE)
    ratio = speaker.tract * SAMPLING_RATE / ESPEAK_RATE
    before, after = (int(seconds * SAMPLING_RATE) for seconds in generator.uniform(*silence_seconds, size=2))
    end = before + len(resampled) + after

    phones = [phone.moved(before, ratio, _label(phone.label)) for phone in phones]
    phones = phones[phones[0].label == SILENCE : len(phones) - (phones[-1].label == SILENCE)]
    phones = [_Span(SILENCE, 0, phones[0].start), *phones, _Span(SILENCE, phones[-1].end, end)]
    words = [word.moved(before, ratio) for word in words]
    return _Speech(np.pad(resampled, (before, after)), phones, words, speaker)


def _concatenate(pieces: list[_Speech]) -> _Speech:
    """Join several texts of a speaker to one utterance; the silences around them become the pauses between them."""
    phones: list[_Span] = []
    words: list[_Span] = []
    offset = 0
    for piece in pieces:
        for phone in piece.phones:
            phone = phone.moved(offset)
            if phones and phones[-1].label == phone.label == SILENCE:
                phone = phone._replace(start=phones.pop().start)
            phones.append(phone)
        words += [word.moved(offset) for word in piece.words]
        offset += len(piece.samples)
    return _Speech(np.concatenate([piece.samples for piece in pieces]), phones, words, pieces[0].speaker)


def _room(generator: np.random.Generator, num_bins: int, num_samples: int) -> np.ndarray:
    """Return the frequency response of a small room: the direct sound, then decaying noise."""
    reverberation_seconds = generator.uniform(0.1, 0.4)
    direct_to_reverberant_db = generator.uniform(3.0, 20.0)
    times = np.arange(num_samples, dtype=np.float32) / SAMPLING_RATE
    tail = generator.standard_normal(num_samples, dtype=np.float32)
    tail *= 10 ** (-3 * times / np.float32(reverberation_seconds))  # -60 dB after the reverberation time
    tail[: SAMPLING_RATE // 500] = 0
    tail *= 10 ** (-direct_to_reverberant_db / 20) / np.linalg.norm(tail)
    tail[0] = 1
    return np.fft.rfft(tail, 2 * (num_bins - 1)).astype(np.complex64)


def _microphone(generator: np.random.Generator, frequencies: np.ndarray) -> np.ndarray:
    """Return a smooth gain over frequency, about +-4 dB, without delay."""
    knots = np.array([0.0, 150.0, 400.0, 1000.0, 2500.0, 5000.0, 8000.0])
    gains_db = generator.normal(0.0, 2.0, len(knots)) + generator.normal(0.0, 1.0) * np.linspace(-2, 2, len(knots))
    return (10 ** (np.interp(frequencies, knots, gains_db) / 20)).astype(np.float32)


def _coloured_noise(generator: np.random.Generator, frequencies: np.ndarray) -> np.ndarray:
    """Return noise (S,) of unit power whose spectrum falls by 0 (white) to 6 dB (brown) per octave."""
    slope = generator.uniform(0.0, 1.0)  # of the amplitude
    shape = np.maximum(frequencies, 50.0).astype(np.float32) ** np.float32(-slope)
    spectrum = generator.standard_normal((len(frequencies), 2), dtype=np.float32).view(np.complex64)[:, 0] * shape
    noise = np.fft.irfft(spectrum).astype(np.float32)
    return noise / np.sqrt(np.mean(noise**2))


def _active_rms(waveform: np.ndarray, phones: list[_Span]) -> float:
    """Return the root mean square of a waveform (S,) over the phones, without the silences."""
    active = [phone for phone in phones if phone.label != SILENCE]
    square = sum(float(np.sum(waveform[phone.start : phone.end] ** 2)) for phone in active)
    return math.sqrt(square / sum(phone.end - phone.start for phone in active))


def _through_channel(waveform: np.ndarray, phones: list[_Span], generator: np.random.Generator) -> np.ndarray:
    """Apply room, microphone, noise and level to a waveform (S,), without delaying the direct sound."""
    num_room = SAMPLING_RATE // 4
    length = 1 << (len(waveform) + num_room - 1).bit_length()  # a power of two: fast, and no tail wraps around
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    response = _room(generator, len(frequencies), num_room) * _microphone(generator, frequencies)
    waveform = np.fft.irfft(np.fft.rfft(waveform, length) * response)[: len(waveform)].astype(np.float32)
    noise = _coloured_noise(generator, frequencies)[: len(waveform)]
    noise_rms = _active_rms(waveform, phones) * 10 ** (-generator.uniform(*_SNR_DB) / 20)
    waveform = waveform + noise * np.float32(noise_rms)
    return _to_level(waveform, phones, generator.uniform(-35.0, -17.0))


def _to_level(waveform: np.ndarray, phones: list[_Span], dbfs: float) -> np.ndarray:
    """Scale a waveform (S,) so that its phones have a level in dB below full scale, or less if it would clip."""
    gain = 10 ** (dbfs / 20) / _active_rms(waveform, phones)
    gain = min(gain, 0.99 / float(np.abs(waveform).max()))
    return (waveform * np.float32(gain)).astype(np.float32)


def _in_seconds(segments: list[_Span]) -> list[dict[str, Any]]:
    return [{"label": s.label, "start": s.start / SAMPLING_RATE, "end": s.end / SAMPLING_RATE} for s in segments]


def _in_order(make: Callable[[int], _T], num_items: int, num_proc: int | None) -> Iterator[_T]:
    """Yield `make(0)`, `make(1)`, ... from this process (None) or from `num_proc` new ones."""
    if num_proc is None:
        yield from map(make, range(num_items))
        return
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, or None for this process, got {num_proc}.")
    # Spawned, not forked: threads of torch and others do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=initialize_worker) as executor:
        with block_signals_in_workers("spawn"):
            results = executor.map(make, range(num_items), chunksize=16)
        yield from results


@dataclass(frozen=True)
class SyntheticCorpus:
    """
    Spoken utterances of artificial speakers, each made on demand.

    `corpus[i]` is a dict: "id", "audio" ({"array": float32 (S,) at 16 kHz, "sampling_rate": 16000}), "text"
    (lower-case words without punctuation), "speaker_id", "language", "num_samples", "phones" (a list of {"label",
    "start", "end"}, in seconds, contiguous from 0 to the end) and "words" (the same; one for each word of the text,
    from its first phone to its last).

    Speakers differ in voice variant, pitch and its range, speed and length of the vocal tract. Half of them have high
    voices. A speaker speaks one language.

    Args:
        num_utterances: Number of utterances.
        seed: Seed of everything: other seeds make other speakers and other utterances. Not negative.
        languages: Languages out of "en", "de", "es", "fr", "it". Speakers are assigned to them in turn.
        num_speakers: Number of speakers to draw from, at least one per language.
        split: "train", "validation" or "test".
        noise: Whether each utterance goes through a room, a microphone and noise of its own and has its own level.
            Otherwise it is as espeak-ng speaks it, with digital silence, at one level. The texts are the same.
        text: "sentences" (4 to 12 words), "digits" (3 to 8 of them), or "mixed", either with equal probability. There
            are 50 to 300 ms of silence around each, and 0 to 100 ms around those of "digits".
        num_texts: Minimum and maximum number of such texts in an utterance, with pauses between them.

    Raises `ImportError` when the first utterance is requested, if espeakng-loader or soxr is not installed.
    """

    num_utterances: int
    _: KW_ONLY
    seed: int = 0
    languages: Sequence[str] = ("en",)
    num_speakers: int = 40
    split: str = "train"
    noise: bool = True
    text: str = "sentences"
    num_texts: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):
            raise ValueError(f"languages is a sequence of languages: pass ({self.languages!r},).")
        for name in ("languages", "num_texts"):  # tuples, so that a corpus given lists is hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count = len(self.languages)
        are_known = 0 < count == len(set(self.languages) & set(LANGUAGES))
        are_numbers = len(self.num_texts) == 2 and 1 <= self.num_texts[0] <= self.num_texts[1]
        for name, holds, allowed in (
            ("languages", are_known, f"one or more of {LANGUAGES}, each once"),
            ("num_utterances", self.num_utterances >= 0, "0 or more"),
            ("num_speakers", self.num_speakers >= count, f"at least 1 per language, {count} here"),
            ("seed", self.seed >= 0, "0 or more"),
            ("split", self.split in SPLITS, f"one of {SPLITS}"),
            ("text", self.text in TEXTS, f"one of {TEXTS}"),
            ("num_texts", are_numbers, "the minimum and the maximum number of texts, at least 1"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}.")

    def __len__(self) -> int:
        return self.num_utterances

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the corpus has {len(self)} utterances.")
        number = range(len(self))[index]
        speech = self._speak(number)
        if self.noise:
            channel = _generator(self.seed, self.split, "channel", number)
            waveform = _through_channel(speech.samples, speech.phones, channel)
        else:
            waveform = _to_level(speech.samples, speech.phones, _CLEAN_DBFS)
        return {
            "id": f"synthetic-{self.seed}-{self.split}-{number:06d}",
            "audio": {"array": waveform, "sampling_rate": SAMPLING_RATE},
            "text": " ".join(word.label for word in speech.words),
            "speaker_id": speech.speaker.id,
            "language": speech.speaker.language,
            "num_samples": len(waveform),
            "phones": _in_seconds(speech.phones),
            "words": _in_seconds(speech.words),
        }

    def speaker(self, number: int) -> Speaker:
        """Return speaker `number`, from 0 to `num_speakers` - 1."""
        if not 0 <= number < self.num_speakers:
            raise ValueError(f"speaker must be 0 to {self.num_speakers - 1}, got {number}.")
        generator = _generator(self.seed, self.split, "speaker", number)
        turn, language = divmod(number, len(self.languages))
        pool = _variants_of_split(self.seed, self.split)[turn % 2]
        return Speaker(
            id=f"synthetic-{self.seed}-{self.split}-speaker-{number:03d}",
            language=self.languages[language],
            variant=pool[turn // 2 % len(pool)],
            pitch=int(generator.integers(20, 81)),
            pitch_range=int(generator.integers(25, 76)),
            rate=int(generator.integers(135, 213)),
            tract=round(generator.uniform(0.88, 1.12), 3),
        )

    def to_dataset(self, num_proc: int | None = None) -> datasets.Dataset:
        """
        Return all rows as a `datasets.Dataset` in memory (about 240 MB per hour of speech).

        `num_proc` processes make the rows (None: this one). They are spawned, which takes some seconds, and a script
        that passes a number must do so below `if __name__ == "__main__":`.
        """
        datasets = require("datasets")
        value = datasets.Value
        segments = [{"label": value("string"), "start": value("float64"), "end": value("float64")}]
        audio = {"array": datasets.Sequence(value("float32")), "sampling_rate": value("int32")}
        columns = {"id": value("string"), "audio": audio}
        columns |= {name: value("string") for name in ("text", "speaker_id", "language")}
        columns |= {"num_samples": value("int64"), "phones": segments, "words": segments}
        rows = _in_order(self.__getitem__, len(self), num_proc)
        blocks = iter(lambda: list(itertools.islice(rows, 500)), [])
        schema, pyarrow = datasets.Features(columns).arrow_schema, require("pyarrow")
        batches = [pyarrow.RecordBatch.from_pylist(block, schema=schema) for block in blocks]
        return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=schema))

    def export(self, folder: str | os.PathLike[str], *, format: str = "flac", num_proc: int | None = None) -> Path:
        """
        Write the corpus to `folder/<split>/`: one audio file (16 bits) per utterance, and two tables.

        metadata.csv has file_name, transcription, speaker_id, language, duration (seconds), as 🤗 Datasets' audio
        folders require; phones.jsonl has {"name": id, "phones": [{"label", "start", "end"}], "words": [...]}. The
        folder of the split is written atomically, and returned. `format` is "flac" or "wav", `num_proc` as in
        `to_dataset`. Raises `ValueError` if the folder exists or the format is unknown, and `ImportError` if
        soundfile, soxr or espeakng-loader is not installed.
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
        soundfile = require("soundfile")
        target = Path(folder, self.split)
        if target.exists():
            raise ValueError(f"{target} exists. Remove it or choose another folder; nothing is overwritten.")
        with (
            atomic_folder(target) as unfinished,
            open(unfinished / "metadata.csv", "w", encoding="utf-8", newline="") as metadata_file,
            open(unfinished / "phones.jsonl", "w", encoding="utf-8") as phones_file,
        ):
            metadata = csv.writer(metadata_file, lineterminator="\n")
            metadata.writerow(["file_name", "transcription", "speaker_id", "language", "duration"])
            for row in _in_order(self.__getitem__, len(self), num_proc):
                file_name, seconds = f"{row['id']}.{format}", row["num_samples"] / SAMPLING_RATE
                soundfile.write(unfinished / file_name, row["audio"]["array"], SAMPLING_RATE, subtype="PCM_16")
                metadata.writerow([file_name, row["text"], row["speaker_id"], row["language"], seconds])
                phones = {"name": row["id"], "phones": row["phones"], "words": row["words"]}
                phones_file.write(json.dumps(phones, ensure_ascii=False) + "\n")
        return target

    def _speak(self, number: int) -> _Speech:
        generator = _generator(self.seed, self.split, "speech", number)
        speaker = self.speaker(int(generator.integers(self.num_speakers)))
        grammar = GRAMMARS[speaker.language]
        pieces = []
        for _ in range(int(generator.integers(self.num_texts[0], self.num_texts[1] + 1))):
            says_digits = self.text == "digits" or (self.text == "mixed" and generator.random() < 0.5)
            text = digit_string(grammar, generator) if says_digits else expand(grammar, "sentence", generator)
            silence = _DIGITS_SILENCE if self.text == "digits" else _SILENCE_SECONDS
            pieces.append(_say(text, speaker, silence, generator))
        return _concatenate(pieces)
