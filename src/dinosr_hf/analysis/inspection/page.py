"""The page: metrics, plots, codewords and sounds of an inspection as one self-contained HTML file. `S` samples."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...data import SAMPLING_RATE, AudioFileError, SpeechSource
from ...utils.command_line import check_choice, check_ranges
from ...utils.extras import import_extra
from .._figures import data_uri, png_uri
from ..alignment import FIELD, STRIDE
from ..plots import class_confusion_figure, code_usage_figure, phone_class, phone_codeword_figure, unit_strip_figure
from ..plots.phones import phone_position
from ..quality import UnitQuality, code_perplexity
from .codewords import Inspection, Moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_FILES = Path(__file__).parent
# The filter finds a codeword by its most frequent phone, and by phones with this share of its frames.
_FOUND_BY_SHARE = 0.2
_STRIP_SECONDS = 2.5
_MIN_STRIP_SECONDS = 0.1

# Name of a format -> media type, and soundfile's names of container and encoding.
AUDIO_FORMATS = {"flac": ("audio/flac", "FLAC", "PCM_16"), "ogg": ("audio/ogg", "OGG", "VORBIS")}

_MAX_MOMENT_SECONDS = 1.0  # a longer moment, such as a pause, is cut
_NUM_BARS = 60


class Page(NamedTuple):
    """An HTML page."""

    html: str
    num_clips: int  # moments that can be heard
    num_left_out: int  # moments for which there was no room


class Clip(NamedTuple):
    """A moment that can be heard."""

    moment: Moment
    start: float  # of the moment, in seconds of the recording
    end: float
    source: str  # the sound as a data: URI
    first: float  # start of the moment in the clip, from 0 to 1
    last: float  # end of the moment in the clip, at most 1
    bars: Sequence[float]  # height of the waveform at equal steps of the clip, from 0 to 1


def _encode_audio(samples: NDArray[np.float32], audio: str) -> str:
    kind, container, subtype = AUDIO_FORMATS[audio]
    stream = io.BytesIO()
    soundfile = import_extra("soundfile", "analysis")
    soundfile.write(stream, np.clip(samples, -1, 1), SAMPLING_RATE, format=container, subtype=subtype)
    return data_uri(stream.getvalue(), kind)


def _bars(samples: NDArray[np.float32]) -> list[float]:
    parts = np.array_split(np.abs(samples), min(_NUM_BARS, len(samples)))
    peaks = np.array([part.max() for part in parts])
    return (peaks / max(float(peaks.max()), 1e-9)).tolist()


def _make_clips(
    inspection: Inspection,
    recordings: SpeechSource,
    stride: int,
    field: int,
    audio: str,
    context: int,
    max_bytes: float,
) -> tuple[dict[int, list[Clip]], int]:
    """
    Cut the best moment of each codeword, frequent codewords first, then the second best, up to a size of all clips.

    `context` samples are added on both sides. Returns clips by code, and the number of moments without room. Moments
    of recordings that can no longer be read are left out with a warning.
    """
    index = {utterance.id: number for number, utterance in enumerate(recordings.utterances)}
    clips: dict[int, list[Clip]] = {codeword.code: [] for codeword in inspection.codewords}
    moments = [
        (rank, -codeword.num_frames, codeword.code, moment)
        for codeword in inspection.codewords
        for rank, moment in enumerate(codeword.moments)
    ]
    used = 0
    for place, (_, _, code, moment) in enumerate(sorted(moments, key=itemgetter(0, 1))):
        # A frame extends half a stride to both sides of its centre.
        begin = max((field - stride) // 2 + stride * moment.first, 0)
        end = begin + stride * moment.num_frames
        heard = min(end, begin + round(_MAX_MOMENT_SECONDS * SAMPLING_RATE))
        start, number = max(begin - context, 0), index[moment.recording]
        stop = min(heard + context, recordings.utterances[number].num_samples)
        try:
            samples = recordings.load(number, start, stop - start)
        except AudioFileError as error:
            logger.warning("No moment of %s can be heard: %s", moment.recording, error)
            continue
        source = _encode_audio(samples, audio)
        used += len(source)
        if used > max_bytes:
            return clips, len(moments) - place
        first, last = (begin - start) / len(samples), min((heard - start) / len(samples), 1.0)
        times = (begin / SAMPLING_RATE, end / SAMPLING_RATE)
        clips[code].append(Clip(moment, *times, source, first, last, _bars(samples)))
    return clips, 0


def _picture(figure: Figure, alt: str, caption: str) -> dict[str, str]:
    return {"source": png_uri(figure, dpi=160), "alt": alt, "caption": caption}


def _strip(
    inspection: Inspection, recordings: SpeechSource, name: str, stride: int, field: int
) -> list[dict[str, str]]:
    """Some seconds from the middle of the example; nothing if it is too short, or can no longer be read."""
    example = inspection.example
    place = recordings.ids.index(example.recording)
    length = len(example.codes) * stride / SAMPLING_RATE
    seconds = min(_STRIP_SECONDS, length)
    if seconds < _MIN_STRIP_SECONDS:
        return []
    start = round((length - seconds) / 2, 1)
    stop = min(round((start + seconds) * SAMPLING_RATE), recordings.utterances[place].num_samples)
    try:
        samples = recordings.load(place, 0, stop)
    except AudioFileError as error:
        logger.warning("%s is not drawn: %s", example.recording, error)
        return []
    tiers: dict[str, Any] = {"words": example.words, "phones": example.phones}
    figure = unit_strip_figure(samples, {name: example.codes}, **tiers, start=start, stride=stride, field=field)
    shown = [*(tier for tier, segments in tiers.items() if segments), "units"]
    alt = (
        f"Spectrogram of {example.recording} from {start:.1f} s to {start + seconds:.1f} s, with its"
        f" {', '.join(shown)} as boxes below."
    )
    return [_picture(figure, alt, f"Units in time: {example.recording}")]


def _pictures(inspection: Inspection, name: str) -> list[dict[str, str]]:
    table, phones, counts = inspection.table, inspection.phones, inspection.counts
    used, perplexity = len(inspection.codewords), code_perplexity(counts)
    pictures = []
    if phones:
        alt = (
            f"Image of {len(phones)} phones by {used} codewords: the darker, the more probable the phone given the"
            " codeword. The table of codewords below has the numbers."
        )
        caption = "What codewords stand for: P(phone | codeword)"
        pictures.append(_picture(phone_codeword_figure(table, phones), alt, caption))
        alt = "Table of classes of phones by the classes that their codewords stand for, in percent of each row."
        pictures.append(_picture(class_confusion_figure(table, phones), alt, "Which classes of phones are mixed up"))
    alt = (
        f"Curve of the share of frames by rank: {used} of {len(counts)} codewords in use, perplexity {perplexity:.1f}."
    )
    return [*pictures, _picture(code_usage_figure({name: counts}), alt, "How often codewords are used")]


def _measures(inspection: Inspection) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each metric."""
    counts = inspection.counts
    rows = [
        ("recordings", f"{inspection.num_recordings:,}", "with at least a frame"),
        ("frames", f"{counts.sum():,}", "of all recordings"),
        ("codewords in use", f"{len(inspection.codewords):,} of {len(counts):,}", "with at least a frame"),
        ("code perplexity", f"{code_perplexity(counts):.1f}", "equally frequent codewords of the same entropy"),
    ]
    if inspection.phones:
        quality = UnitQuality.from_table(inspection.table)
        rows += [
            ("recordings with labels", f"{inspection.num_labelled:,}", f"{quality.num_frames:,} frames"),
            ("phones", f"{quality.num_phones}", "in the labels"),
            ("phone purity", f"{quality.phone_purity:.3f}", "frames right if each codeword is its main phone"),
            ("cluster purity", f"{quality.cluster_purity:.3f}", "frames right if each phone is its main codeword"),
            ("PNMI", f"{quality.pnmi:.3f}", "share of the uncertainty about the phone that the codeword removes"),
        ]
    return rows


def _rows(inspection: Inspection, clips: Mapping[int, Sequence[Clip]], stride: int) -> list[dict[str, Any]]:
    """Codewords for the template."""
    places = {name: place for place, name in enumerate(sorted(inspection.phones, key=phone_position))}
    rows = []
    for codeword in inspection.codewords:
        row: dict[str, Any] = {"codeword": codeword, "clips": clips[codeword.code]}
        row["seconds"] = codeword.mean_frames * stride / SAMPLING_RATE
        row |= {"phone": "", "purity": 0.0, "kind": "", "order": len(places), "found_by": []}
        if codeword.phones:
            main, *others = codeword.phones
            row |= {"phone": main.name, "purity": main.share, "kind": phone_class(main.name)}
            row["order"] = places[main.name]
            row["found_by"] = [main.name, *(other.name for other in others if other.share >= _FOUND_BY_SHARE)]
        rows.append(row)
    return rows


def _waveform(clip: Clip) -> str:
    """SVG path of a clip's waveform in a box of 100 by 24."""
    width = 100 / len(clip.bars)
    return "".join(
        f"M{(number + 0.5) * width:.1f} {12 - 11 * bar:.1f}V{12 + 11 * bar:.1f}"
        for number, bar in enumerate(clip.bars)
    )


def _hash(text: str) -> str:
    """Hash of an inline script or style for the content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def render_page(
    inspection: Inspection,
    recordings: SpeechSource,
    *,
    title: str,
    name: str,
    facts: Mapping[str, str],
    score_name: str = "score",
    stride: int = STRIDE,
    field: int = FIELD,
    audio: str = "flac",
    context_seconds: float = 0.3,
    max_megabytes: float = 20.0,
) -> Page:
    """
    Render one HTML page of an inspection, with its plots and sounds; it needs no other file and no network.

    All names that come from the corpus are escaped, and the page's content security policy lets a browser load and run
    nothing that is not in it. Its size is that of text and plots (1 to 3 MB with 256 codewords) and at most
    `max_megabytes` of sounds at 16 kHz: a moment takes 10 to 25 kB as FLAC, about half as Ogg Vorbis.

    Args:
        inspection: Result of a `CodewordInspector`, which has the same `stride` and `field`.
        recordings: The inspected recordings.
        name: Name of the units, such as "layer 5, student".
        facts: Further facts about model and corpus: name -> value.
        score_name: Name of the score of a moment, which is shown without its sign.
        audio: Format of the sounds: "flac" is lossless; "ogg" is smaller. All browsers play both.
        context_seconds: Sound to add before and after a moment.
        max_megabytes: Limit of the size of all sounds; less typical moments of each codeword are left out first.

    Raises:
        ValueError: For an unknown audio format, or a number out of range.
        ImportError: If matplotlib, Jinja2 or soundfile is not installed.
    """
    check_choice("audio", audio, AUDIO_FORMATS)
    rules = [(max_megabytes >= 0, "max_megabytes", max_megabytes, "at least 0")]
    check_ranges([*rules, (0 <= context_seconds <= 10, "context_seconds", context_seconds, "from 0 to 10")])
    jinja: Any = import_extra("jinja2", "analysis")
    context, max_bytes = round(context_seconds * SAMPLING_RATE), max_megabytes * 1e6
    clips, num_left_out = _make_clips(inspection, recordings, stride, field, audio, context, max_bytes)
    all_clips = [clip for own in clips.values() for clip in own]
    rows = _rows(inspection, clips, stride)
    options = {"autoescape": True, "undefined": jinja.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja.Environment(loader=jinja.FileSystemLoader(_FILES), **options)
    style, script = ((_FILES / file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    html = environment.get_template("page.html.jinja").render(
        title=title,
        name=name,
        facts=facts,
        measures=_measures(inspection),
        pictures=[*_pictures(inspection, name), *_strip(inspection, recordings, name, stride, field)],
        rows=rows,
        phones=sorted({phone for row in rows for phone in row["found_by"]}, key=phone_position),
        in_use={str(code) for code in clips},
        has_scores=any(np.isfinite(clip.moment.score) for clip in all_clips),
        score_name=score_name,
        bad_labels=inspection.bad_labels,
        num_left_out=num_left_out,
        waveform=_waveform,
        style=style,
        script=script,
        hash=_hash,
    )
    return Page(html, len(all_clips), num_left_out)
