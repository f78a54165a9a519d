"""The page: tables, pictures and codewords of an inspection as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data import AudioFileError, SpeechSource
from ...utils.extras import import_extra
from ..alignment import SAMPLING_RATE
from ..plots import (
    class_confusion_figure,
    code_usage_figure,
    phone_class,
    phone_codeword_figure,
    unit_strip_figure,
)
from ..plots.phones import phone_position
from ..quality import UnitQuality, code_perplexity
from .clips import Clip, ClipMaker, data_uri
from .codewords import CodewordSummary, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_FILES = Path(__file__).parent
# A codeword is found by a phone that is its most frequent, or has this share of its frames.
_FOUND_BY_SHARE = 0.2
_STRIP_SECONDS = 2.5
_SHORTEST_STRIP_SECONDS = 0.1


class Picture(NamedTuple):
    """A picture of the page, with what it shows for those who do not see it."""

    source: str
    alt: str
    caption: str


class Page(NamedTuple):
    """
    A page.

    Attributes:
        html: All of it.
        num_clips: Moments that can be heard.
        num_left_out: Moments for which there was no room.
    """

    html: str
    num_clips: int
    num_left_out: int


def _picture(figure: Figure, alt: str, caption: str) -> Picture:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return Picture(data_uri(stream.getvalue(), "image/png"), alt, caption)


def _strip(inspection: Inspection, recordings: SpeechSource, name: str, stride: int, field: int) -> Picture | None:
    """Some seconds from the middle of a recording's first minute; None where it is too short, or has gone bad."""
    example = inspection.example
    index = {utterance.id: number for number, utterance in enumerate(recordings.utterances)}
    if example is None or example.recording not in index:
        return None
    length = len(example.codes) * stride / SAMPLING_RATE
    seconds = min(_STRIP_SECONDS, length)
    if seconds < _SHORTEST_STRIP_SECONDS:
        return None
    start = round((length - seconds) / 2, 1)
    place = index[example.recording]
    stop = min(round((start + seconds) * SAMPLING_RATE), recordings.utterances[place].num_samples)
    try:
        samples = recordings.load(place, 0, stop)
    except AudioFileError as error:
        logger.warning("%s is not drawn: %s", example.recording, error)
        return None
    figure = unit_strip_figure(
        samples,
        {name: example.codes},
        phones=example.phones,
        words=example.words,
        start=start,
        stride=stride,
        field=field,
    )
    tiers = ("words" if example.words else "", "phones" if example.phones else "", "units")
    alt = (
        f"Spectrogram of {example.recording} from {start:.1f} s to {start + seconds:.1f} s, with its"
        f" {', '.join(filter(None, tiers))} as boxes below."
    )
    return _picture(figure, alt, f"Units in time: {example.recording}")


def _pictures(inspection: Inspection, recordings: SpeechSource, name: str, stride: int, field: int) -> list[Picture]:
    used, size = len(inspection.codewords), len(inspection.counts)
    pictures = []
    if inspection.phones:
        pictures.append(
            _picture(
                phone_codeword_figure(inspection.table, inspection.phones),
                f"Image of {len(inspection.phones)} phones by {used} codewords: the darker, the more probable the"
                " phone given the codeword. The table of codewords below has the numbers.",
                "What codewords stand for: P(phone | codeword)",
            )
        )
        pictures.append(
            _picture(
                class_confusion_figure(inspection.table, inspection.phones),
                "Table of classes of phones by the classes that their codewords stand for, in percent of each row.",
                "Which classes of phones are mixed up",
            )
        )
    perplexity = code_perplexity(inspection.counts)
    pictures.append(
        _picture(
            code_usage_figure({name: inspection.counts}),
            f"Curve of the share of frames by rank: {used} of {size} codewords in use, perplexity {perplexity:.1f}.",
            "How often codewords are used",
        )
    )
    strip = _strip(inspection, recordings, name, stride, field)
    return [*pictures, *([strip] if strip else [])]


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
            ("PNMI", f"{quality.pnmi:.3f}", "share of the uncertainty about the phone that the codeword takes away"),
        ]
    return rows


class _Row(NamedTuple):
    """A codeword as the template takes it."""

    codeword: CodewordSummary
    seconds: float
    phone: str
    purity: float
    kind: str
    order: int
    found_by: Sequence[str]
    clips: Sequence[Clip]


def _rows(inspection: Inspection, clips: Mapping[int, Sequence[Clip]], stride: int) -> list[_Row]:
    places = {name: place for place, name in enumerate(sorted(inspection.phones, key=phone_position))}
    rows = []
    for codeword in inspection.codewords:
        main = codeword.phones[0] if codeword.phones else None
        found_by = [phone.name for phone in codeword.phones if phone is main or phone.share >= _FOUND_BY_SHARE]
        rows.append(
            _Row(
                codeword=codeword,
                seconds=codeword.mean_frames * stride / SAMPLING_RATE,
                phone=main.name if main else "",
                purity=main.share if main else 0.0,
                kind=phone_class(main.name) if main else "",
                order=places[main.name] if main else len(places),
                found_by=found_by,
                clips=clips.get(codeword.code, ()),
            )
        )
    return rows


def _waveform(clip: Clip) -> str:
    """The path of a clip's waveform in a box of 100 by 24."""
    width = 100 / len(clip.bars)
    return "".join(
        f"M{(number + 0.5) * width:.1f} {12 - 11 * bar:.1f}V{12 + 11 * bar:.1f}"
        for number, bar in enumerate(clip.bars)
    )


def _hash(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def render_page(
    inspection: Inspection,
    recordings: SpeechSource,
    *,
    title: str,
    name: str,
    facts: Mapping[str, str],
    score_name: str = "score",
    stride: int = 320,
    field: int = 400,
    audio: str = "flac",
    context_seconds: float = 0.3,
    max_megabytes: float = 20.0,
) -> Page:
    """
    Make one HTML page of an inspection, with pictures and sounds in it: no file beside it, nothing from the network.

    All names that come from the corpus are escaped, and the page's own policy lets a browser load and run nothing but
    what is in it. Its size is that of the text and pictures (1 to 3 MB with 256 codewords) and at most
    `max_megabytes` of sounds at 16 kHz: a moment is 10 to 25 kB as FLAC, about half as Ogg Vorbis.

    Args:
        inspection: As `CodewordInspector.result` gives it.
        recordings: Those that were inspected.
        title: Of the page.
        name: Of the units, such as "layer 5, student".
        facts: What else the page should say of model and corpus: name -> value.
        score_name: What the score of a moment is, which is shown without its sign.
        stride: Samples from one frame to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a frame sees (`config.receptive_field`).
        audio: "flac" is exact and played by all browsers; "ogg" is smaller.
        context_seconds: What is heard before and behind a moment.
        max_megabytes: Of all sounds; what does not fit is left out, of each codeword the less typical moments first.

    Returns:
        The page.

    Raises:
        ValueError: For another audio format, or a number out of range.
        ImportError: If matplotlib, Jinja2 or soundfile is not installed.
    """
    if not max_megabytes >= 0:
        raise ValueError(f"max_megabytes={max_megabytes} is out of range: it must be at least 0.")
    jinja: Any = import_extra("jinja2", "analysis")
    maker = ClipMaker(recordings, stride=stride, field=field, audio=audio, context_seconds=context_seconds)
    clips, num_left_out = maker.make_all(inspection.codewords, max_megabytes * 1e6)
    rows = _rows(inspection, clips, stride)
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((_FILES / file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    html = environment.get_template("page.html.jinja").render(
        title=title,
        name=name,
        facts=facts,
        measures=_measures(inspection),
        pictures=_pictures(inspection, recordings, name, stride, field),
        rows=rows,
        phones=sorted({phone for row in rows for phone in row.found_by}, key=phone_position),
        in_use={str(row.codeword.code) for row in rows},
        has_scores=any(np.isfinite(clip.moment.score) for row in rows for clip in row.clips),
        score_name=score_name,
        bad_labels=inspection.bad_labels,
        num_left_out=num_left_out,
        waveform=_waveform,
        # Neither has anything of the corpus in it.
        style=jinja.utils.markupsafe.Markup(style),
        script=jinja.utils.markupsafe.Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return Page(html, sum(len(row.clips) for row in rows), num_left_out)
