"""A spoken corpus made on the spot: a grammar's text, espeak-ng's voices, a channel from numpy, phones with times.

It exists so that demo, tests and documentation can measure real things (phone purity, word error rate) with no
network. espeak-ng is licensed under the GPL: it comes with the optional extra "dinosr-hf[demo]" and is never imported
unless an utterance is asked for.

    text  ->  espeak-ng (22.05 kHz, events)  ->  phones and words  ->  16 kHz, longer or shorter vocal tract
          ->  silence around it  ->  room, microphone, noise, level  ->  a row

Utterance i of (seed, split) is the same, bit for bit, in any order, in any number of processes, and whatever
`num_utterances` is. That holds for one build of espeak-ng, soxr and numpy. Splits share no speaker and no variant.

Labels of phones: "SIL" for silence, else espeak-ng's IPA name. With `strip_stress` (the default) the marks of stress
("ˈ", "ˌ") and length ("ː") are taken off, so that a stressed and an unstressed vowel are one phone. Diphthongs and
affricates are one phone, as in "aɪ" and "tʃ". The closure of a stop belongs to the stop. Where espeak-ng says two
phones as one ("l" of "whale", "w" of French "trois"), the label is that of the other. `SyntheticCorpus.phone_set`
lists the labels of a corpus.

Shapes: S samples.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import multiprocessing
import operator
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..utils.extras import import_extra
from ._espeak import ESPEAK_RATE, Event, synthesize, voice_variants
from ._grammar import GRAMMARS, digit_string, expand
from .audio import SAMPLING_RATE
from .workers import shielded_workers, watch_parent

if TYPE_CHECKING:
    import datasets


SILENCE = "SIL"
LANGUAGES = tuple(GRAMMARS)
SPLITS = ("train", "validation", "test")
TEXTS = ("sentences", "digits", "mixed")

# Seconds at each end of a text. With less of it around digits, recognisers get more of them right, and say them more
# nearly when they hear them (docs/experiments.md).
_SILENCE_SECONDS = (0.05, 0.3)
_DIGITS_SILENCE = (0.0, 0.1)
FORMATS = ("flac", "wav")

# espeak-ng is silent before a consonant: 20 to 70 ms for the closure of a stop, up to 40 ms elsewhere (at 130 words a
# minute, the slowest here). What is longer, and not within a word, is a pause. Pauses are 60 ms and more, and before a
# stop the closure adds to them, so that the two kinds never meet.
_MAX_CLOSURE_SECONDS = 0.075
_MAX_ONSET_SECONDS = 0.045
_STOPS = frozenset("ptkbdɡ")

# Loud enough to use the 16 bits, low enough that no voice reaches their end and is turned down while it speaks.
_VOLUME = 30
_CLEAN_DBFS = -23.0
_SNR_DB = (10.0, 40.0)

_T = TypeVar("_T")


def _import(name: str) -> Any:
    return import_extra(name, "demo", "The synthetic corpus")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


class Segment(NamedTuple):
    """A stretch of an utterance, in samples at one rate."""

    label: str
    start: int
    end: int


class Speaker(NamedTuple):
    """What stays the same over the utterances of one speaker."""

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


def _is_usable(settings: dict[str, list[str]]) -> bool:
    """Whether a variant is a human voice whose silences are exact zeros (their lengths are read off the samples)."""

    def number(key: str, default: float, position: int = 0) -> float:
        values = settings.get(key, [])
        return float(values[position]) if len(values) > position else default

    speaks_any_language = settings.get("language") == ["variant"]
    echoes = number("echo", 0) > 0 and number("echo", 0, 1) > 0
    is_robot = "klatt" in settings or "stresslength" in settings
    is_whispered_or_shouted = not 25 <= number("voicing", 64) <= 170
    has_human_formants = all(70 <= number(f"formant {formant}", 100) <= 140 for formant in (1, 2, 3))
    return speaks_any_language and not echoes and not is_robot and not is_whispered_or_shouted and has_human_formants


@functools.cache
def _usable_variants() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the low and of the high voices in espeak-ng's data folder, sorted."""
    low: list[str] = []
    high: list[str] = []
    for name, settings in voice_variants().items():
        if _is_usable(settings):
            pitches = [float(value) for value in settings.get("pitch", ["82", "118"])]
            (high if sum(pitches) / len(pitches) > 130 else low).append(name)
    return tuple(low), tuple(high)


def _variants_of_split(seed: int, split: str) -> list[list[str]]:
    """The low and the high voices of one split: 70 % train, 15 % validation, 15 % test of each kind."""
    pools = []
    shuffle = _generator(seed, SPLITS[0], "voices")  # the same for all splits
    for names in _usable_variants():
        order = [names[position] for position in shuffle.permutation(len(names))]
        held_out = max(1, round(0.15 * len(order)))
        bounds = (0, len(order) - 2 * held_out, len(order) - held_out, len(order))
        number = SPLITS.index(split)
        pools.append(order[bounds[number] : bounds[number + 1]])
    return pools


def _silent_run(is_silent: np.ndarray, end: int) -> int:
    """Number of silent samples just before `end`."""
    # Silences are shorter than a second; no need to look further back.
    window = is_silent[max(0, end - ESPEAK_RATE) : end][::-1]
    return int(len(window) if window.all() else np.argmin(window))


def _without_nameless_sounds(is_silent: np.ndarray, phones: list[Event]) -> list[Event]:
    """Leave out the events without a name that are not pauses: transitions, which belong to a phone beside them.

    The onset of a trill goes to the trill ("r" in Italian); a glide after "i" goes to the "i" (in "río").
    """
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


def _phone_segments(samples: np.ndarray, events: list[Event]) -> tuple[list[Segment], list[int]]:
    """Contiguous phones from the first sample to the last, at ESPEAK_RATE, and each one's text position (-1: silence).

    An event stands where the sound of its phone begins: after the closure of a stop, after a pause. Pauses have events
    of their own only at the end of a clause. The silence itself is exact zeros in the samples, whose run before an
    event tells what the events do not.
    """
    is_silent = samples == 0
    starts: list[tuple[str, int, int]] = [(SILENCE, 0, -1)]
    for event in _without_nameless_sounds(is_silent, [event for event in events if event.kind == "phone"]):
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

    segments: list[Segment] = []
    positions: list[int] = []
    ends = [begin for _, begin, _ in starts[1:]] + [len(samples)]
    for (label, begin, position), end in zip(starts, ends, strict=True):
        if end <= begin:  # a pause of no length, or two phones said as one
            continue
        if segments and label == SILENCE == segments[-1].label:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(Segment(label, begin, end))
            positions.append(position)
    return segments, positions


def _label(name: str, strip_stress: bool) -> str:
    name = re.sub(r"(\w)\1", r"\1ː", name.removesuffix("-"))  # "a-" is a shade of "a", "ss" is a long "s"
    return re.sub("[ˈˌː]", "", name) if strip_stress else name


def _word_segments(text: str, phones: list[Segment], positions: list[int]) -> list[Segment]:
    """The words of a text, each from its first phone to its last."""
    words = []
    for match in re.finditer(r"\w+", text):
        own = [phone for phone, position in zip(phones, positions, strict=True) if position == match.start()]
        assert own, f"espeak-ng runs {match[0]!r} in {text!r} together with the word before it"
        words.append(Segment(match[0], own[0].start, own[-1].end))
    return words


class _Speech(NamedTuple):
    """A clean utterance at SAMPLING_RATE, before the channel."""

    samples: np.ndarray  # (S,) float32, at espeak-ng's own level
    phones: list[Segment]
    words: list[Segment]
    speaker: Speaker


def _say(
    text: str,
    speaker: Speaker,
    strip_stress: bool,
    silence_seconds: tuple[float, float],
    generator: np.random.Generator,
) -> _Speech:
    """A text as one speaker says it this time, with a little silence around it."""
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

    # Played at another speed, a voice has another length of vocal tract (and another pitch and tempo).
    scaled = samples.astype(np.float32) / 32_768
    resampled = _import("soxr").resample(scaled, ESPEAK_RATE / speaker.tract, SAMPLING_RATE)
    ratio = speaker.tract * SAMPLING_RATE / ESPEAK_RATE
    before, after = (int(seconds * SAMPLING_RATE) for seconds in generator.uniform(*silence_seconds, size=2))
    end = before + len(resampled) + after

    def moved(segment: Segment, label: str) -> Segment:
        return Segment(label, before + round(segment.start * ratio), before + round(segment.end * ratio))

    phones = [moved(phone, _label(phone.label, strip_stress)) for phone in phones]
    if phones[0].label == SILENCE:
        del phones[0]
    if phones[-1].label == SILENCE:
        del phones[-1]
    return _Speech(
        samples=np.pad(resampled, (before, after)),
        phones=[Segment(SILENCE, 0, phones[0].start), *phones, Segment(SILENCE, phones[-1].end, end)],
        words=[moved(word, word.label) for word in words],
        speaker=speaker,
    )


def _one_after_the_other(pieces: list[_Speech]) -> _Speech:
    """One utterance out of several of a speaker; the silence around them becomes the pauses between them."""
    phones: list[Segment] = []
    words: list[Segment] = []
    offset = 0
    for piece in pieces:
        for phone in piece.phones:
            moved = Segment(phone.label, phone.start + offset, phone.end + offset)
            if phones and phones[-1].label == moved.label == SILENCE:
                moved = Segment(SILENCE, phones.pop().start, moved.end)
            phones.append(moved)
        words += [Segment(word.label, word.start + offset, word.end + offset) for word in piece.words]
        offset += len(piece.samples)
    return _Speech(np.concatenate([piece.samples for piece in pieces]), phones, words, pieces[0].speaker)


def _room(generator: np.random.Generator, num_bins: int, num_samples: int) -> np.ndarray:
    """Frequency response of a small room: the direct sound, then noise that dies away."""
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
    """Smooth gain over frequency, about +-4 dB, with no delay."""
    knots = np.array([0.0, 150.0, 400.0, 1000.0, 2500.0, 5000.0, 8000.0])
    gains_db = generator.normal(0.0, 2.0, len(knots)) + generator.normal(0.0, 1.0) * np.linspace(-2, 2, len(knots))
    return (10 ** (np.interp(frequencies, knots, gains_db) / 20)).astype(np.float32)


def _coloured_noise(generator: np.random.Generator, frequencies: np.ndarray) -> np.ndarray:
    """Noise (S,) of unit power whose spectrum falls with frequency: 0 dB an octave (white) to 6 (brown)."""
    slope = generator.uniform(0.0, 1.0)  # of the amplitude
    shape = np.maximum(frequencies, 50.0).astype(np.float32) ** np.float32(-slope)
    spectrum = generator.standard_normal((len(frequencies), 2), dtype=np.float32).view(np.complex64)[:, 0] * shape
    noise = np.fft.irfft(spectrum).astype(np.float32)
    return noise / np.sqrt(np.mean(noise**2))


def _active_rms(waveform: np.ndarray, phones: list[Segment]) -> float:
    """Root mean square of a waveform (S,) over the phones, without the silences."""
    square = sum(float(np.sum(waveform[p.start : p.end] ** 2)) for p in phones if p.label != SILENCE)
    return math.sqrt(square / sum(p.end - p.start for p in phones if p.label != SILENCE))


def _through_channel(
    waveform: np.ndarray, phones: list[Segment], snr_db: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """Room, microphone, noise and level on a waveform (S,). Times stay: nothing here delays the direct sound."""
    num_room = SAMPLING_RATE // 4
    length = 1 << (len(waveform) + num_room - 1).bit_length()  # a power of two: fast, and no tail comes round
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    response = _room(generator, len(frequencies), num_room) * _microphone(generator, frequencies)
    waveform = np.fft.irfft(np.fft.rfft(waveform, length) * response)[: len(waveform)].astype(np.float32)
    noise = _coloured_noise(generator, frequencies)[: len(waveform)]
    noise_rms = _active_rms(waveform, phones) * 10 ** (-generator.uniform(*snr_db) / 20)
    waveform = waveform + noise * np.float32(noise_rms)
    return _to_level(waveform, phones, generator.uniform(-35.0, -17.0))


def _to_level(waveform: np.ndarray, phones: list[Segment], dbfs: float) -> np.ndarray:
    """Scale a waveform (S,) to a level of its phones in dB below full scale, or lower where it would clip."""
    gain = 10 ** (dbfs / 20) / _active_rms(waveform, phones)
    gain = min(gain, 0.99 / float(np.abs(waveform).max()))
    return (waveform * np.float32(gain)).astype(np.float32)


def _in_seconds(segments: list[Segment]) -> list[dict[str, Any]]:
    return [{"label": s.label, "start": s.start / SAMPLING_RATE, "end": s.end / SAMPLING_RATE} for s in segments]


def _in_order(make: Callable[[int], _T], num_items: int, num_proc: int | None) -> Iterator[_T]:
    """`make(0)`, `make(1)`, ... from this process (None) or from `num_proc` new ones."""
    if num_proc is None:
        yield from map(make, range(num_items))
        return
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, or None for this process, got {num_proc}.")
    # Spawned, not forked: threads of torch and of others do not live through a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=watch_parent) as executor:
        with shielded_workers("spawn"):
            results = executor.map(make, range(num_items), chunksize=16)
        yield from results


def _record_batch(rows: list[dict[str, Any]], schema: Any) -> Any:
    """Rows as one Arrow batch. (datasets' own way from arrays inside of dicts takes longer than the synthesis.)"""
    pyarrow = _import("pyarrow")
    arrays = [row["audio"]["array"] for row in rows]
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    samples = pyarrow.ListArray.from_arrays(offsets, np.concatenate(arrays))
    rates = pyarrow.array([row["audio"]["sampling_rate"] for row in rows], pyarrow.int32())
    columns = [
        pyarrow.StructArray.from_arrays([samples, rates], ["array", "sampling_rate"])
        if field.name == "audio"
        else pyarrow.array([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _write_utterance(
    corpus: SyntheticCorpus, folder: Path, format: str, index: int
) -> tuple[list[Any], dict[str, Any]]:
    """Write the audio of one utterance; its rows of the two tables."""
    row = corpus[index]
    file_name = f"{row['id']}.{format}"
    _import("soundfile").write(folder / file_name, row["audio"]["array"], SAMPLING_RATE, subtype="PCM_16")
    duration = row["num_samples"] / SAMPLING_RATE
    return (
        [file_name, row["text"], row["speaker_id"], row["language"], duration],
        {"name": row["id"], "phones": row["phones"], "words": row["words"]},
    )


@dataclass(frozen=True)
class SyntheticCorpus:
    """Spoken utterances of made-up speakers, each made when it is asked for.

    `corpus[i]` is a dict: "id", "audio" ({"array": float32 (S,) at 16 kHz, "sampling_rate": 16000}), "text"
    (lower-case words without punctuation), "speaker_id", "language", "num_samples", "phones" (a list of {"label",
    "start", "end"}, in seconds, one after the other from 0 to the end) and "words" (the same; one for each word of
    the text, from its first phone to its last).

    Speakers differ in voice variant, pitch and its range, speed and length of the vocal tract. Half of them have high
    voices. A speaker speaks one language.

    Args:
        num_utterances: How many there are.
        seed: Of everything: other seeds, other speakers and other utterances. Not negative.
        languages: Of "en", "de", "es", "fr", "it". Speakers take turns with them.
        num_speakers: How many speakers there are to draw from, at least one a language.
        split: "train", "validation" or "test".
        noise: Whether each utterance goes through a room, a microphone and noise of its own and has its own level.
            Without, it is as espeak-ng says it, with digital silence, at one level. What is said stays the same.
        text: "sentences" (4 to 12 words), "digits" (3 to 8 of them), or "mixed", either with equal chance. There are
            50 to 300 ms of silence around each, and 0 to 100 ms around those of "digits".
        num_texts: Least and greatest number of such texts in an utterance, with pauses between them.
        strip_stress: Whether labels of phones lose their marks of stress and length.
        snr_db: Lowest and highest signal-to-noise ratio in dB, measured over the phones.

    Raises:
        ValueError: A value is not allowed.
        ImportError: When the first utterance is asked for and espeakng-loader or soxr is not installed.

    Example:
        corpus = SyntheticCorpus(1000, languages=("en", "de"), text="mixed")
        dataset = corpus.to_dataset()
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
    strip_stress: bool = True
    snr_db: tuple[float, float] = _SNR_DB

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):
            raise ValueError(f"languages is a sequence of languages: pass ({self.languages!r},).")
        object.__setattr__(self, "languages", tuple(self.languages))
        object.__setattr__(self, "snr_db", tuple(self.snr_db))
        object.__setattr__(self, "num_texts", tuple(self.num_texts))
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages must be one or more of {LANGUAGES}, each once, got {self.languages}.")
        if self.num_utterances < 0:
            raise ValueError(f"num_utterances must be 0 or more, got {self.num_utterances}.")
        if self.num_speakers < len(self.languages):
            raise ValueError(
                f"num_speakers must be at least 1 a language, {len(self.languages)} here, got {self.num_speakers}."
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")
        _check_choice("split", self.split, SPLITS)
        _check_choice("text", self.text, TEXTS)
        if len(self.num_texts) != 2 or not 1 <= self.num_texts[0] <= self.num_texts[1]:
            raise ValueError(
                f"num_texts must be the least and the greatest number of texts, at least 1, got {self.num_texts}."
            )
        if len(self.snr_db) != 2 or not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(
                f"snr_db must be the lowest and the highest ratio in dB, in this order: got {self.snr_db}."
            )
        if self.snr_db != _SNR_DB and not self.noise:
            warnings.warn("snr_db has no effect with noise=False.", UserWarning, stacklevel=3)

    def __len__(self) -> int:
        return self.num_utterances

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is out of range: the corpus has {len(self)} utterances.")
        number %= len(self)
        speech = self._speak(number)
        if self.noise:
            channel = _generator(self.seed, self.split, "channel", number)
            waveform = _through_channel(speech.samples, speech.phones, self.snr_db, channel)
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
        """Speaker `number`, from 0 to `num_speakers` - 1."""
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

    def phone_set(self) -> list[str]:
        """The labels of the corpus, sorted, `SILENCE` among them. (It speaks every utterance, without the channel.)"""
        return sorted({phone.label for index in range(len(self)) for phone in self._speak(index).phones})

    def to_dataset(self, num_proc: int | None = None) -> datasets.Dataset:
        """All rows as a `datasets.Dataset` in memory (about 240 MB an hour of speech).

        Args:
            num_proc: How many processes make the rows (None: this one). They are started afresh, which takes them some
                seconds, and a script that passes a number must do so below `if __name__ == "__main__":`.

        Raises:
            ValueError: `num_proc` is below 1.
            ImportError: datasets, soxr or espeakng-loader is not installed.
        """
        datasets = _import("datasets")
        value = datasets.Value
        segments = [{"label": value("string"), "start": value("float64"), "end": value("float64")}]
        features = datasets.Features(
            {
                "id": value("string"),
                "audio": {"array": datasets.Sequence(value("float32")), "sampling_rate": value("int32")},
                "text": value("string"),
                "speaker_id": value("string"),
                "language": value("string"),
                "num_samples": value("int64"),
                "phones": segments,
                "words": segments,
            }
        )
        rows = _in_order(self.__getitem__, len(self), num_proc)
        blocks = iter(lambda: list(itertools.islice(rows, 500)), [])
        batches = [_record_batch(block, features.arrow_schema) for block in blocks]
        table = _import("pyarrow").Table.from_batches(batches, schema=features.arrow_schema)
        return datasets.Dataset(table)

    def export(self, folder: str | os.PathLike[str], *, format: str = "flac", num_proc: int | None = None) -> Path:
        """Write the corpus as `folder/<split>/`: an audio file (16 bits) an utterance and two tables.

        metadata.csv has file_name, transcription, speaker_id, language, duration (seconds), as 🤗 Datasets' audio
        folders want it; phones.jsonl has {"name": id, "phones": [{"label", "start", "end"}], "words": [...]}. The
        folder takes its name when everything is in it, so what carries the name is whole.

        Args:
            folder: Where the folder of the split goes; made if need be.
            format: "flac" or "wav".
            num_proc: As in `to_dataset`.

        Returns:
            The folder of the split.

        Raises:
            ValueError: The folder of the split exists, the format is unknown, or `num_proc` is below 1.
            ImportError: soundfile, soxr or espeakng-loader is not installed.
        """
        _check_choice("format", format, FORMATS)
        _import("soundfile")
        target = Path(folder, self.split)
        if target.exists():
            raise ValueError(f"{target} exists. Remove it or choose another folder; nothing is written over.")
        unfinished = target.with_name(f".{self.split}-unfinished-{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            write = functools.partial(_write_utterance, self, unfinished, format)
            with (
                open(unfinished / "metadata.csv", "w", encoding="utf-8", newline="") as metadata_file,
                open(unfinished / "phones.jsonl", "w", encoding="utf-8") as phones_file,
            ):
                metadata = csv.writer(metadata_file, lineterminator="\n")
                metadata.writerow(["file_name", "transcription", "speaker_id", "language", "duration"])
                for fields, phones in _in_order(write, len(self), num_proc):
                    metadata.writerow(fields)
                    phones_file.write(json.dumps(phones, ensure_ascii=False) + "\n")
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
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
            pieces.append(_say(text, speaker, self.strip_stress, silence, generator))
        return _one_after_the_other(pieces)
