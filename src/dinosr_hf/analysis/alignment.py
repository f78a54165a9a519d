"""
Phone labels at the frames of the model.

Frame `i` sees the samples `[stride * i, stride * i + field)`, with the paper's encoder `[320 i, 320 i + 400)`. Its
label is the one spoken at the centre: at 12.5 ms, 32.5 ms, ... The convolutions do not pad, so this holds for all
frames.

The labels of a recording are either `Segment`s, or strings at a fixed rate: one every `step_seconds`. Times are
seconds; an interval contains its start and not its end. `T` frames of audio at 16 kHz.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data import SAMPLING_RATE
from ..data.label_text import label_text
from ..data.name_matching import match_names, without_suffix
from ..utils.command_line import check_ranges
from ..utils.visible_text import visible_text

logger = logging.getLogger(__name__)

STRIDE = 320
FIELD = 400
SILENCE = "SIL"

# Longest gap or overlap between consecutive segments, in seconds, that is taken for rounding of their times: 10 ms.
_MAX_ROUNDING_SECONDS = 0.01 + 1e-9


# Aligners that pad recordings, or round their times, may label some silence behind the end.
_MAX_LATE_SECONDS = 0.1


class Segment(NamedTuple):
    """A label and the time at which it is spoken, in seconds."""

    label: str
    start: float
    end: float


Labels = Sequence[str] | Sequence[Segment]
"""Labels of one recording: segments, or strings at a fixed rate."""


def frame_centers(num_frames: int, *, stride: int = STRIDE, field: int = FIELD) -> NDArray[np.float64]:
    """
    Return the centre of each frame's receptive field: float64 (T,), `(stride * i + field / 2) / 16_000` seconds.

    `num_frames` (T, at least 0, else `ValueError`), `stride` and `field` are those of the model:
    `config.num_frames(num_samples)`, `config.inputs_to_logits_ratio` and `config.receptive_field`.
    """
    check_ranges([(num_frames >= 0, "num_frames", num_frames, "at least 0")])
    return (stride * np.arange(num_frames) + field / 2) / SAMPLING_RATE


def phone_name(label: str) -> str:
    """Return what readers see of a label; where that is nothing, as aligners write silence, `SILENCE`."""
    return visible_text(label) or SILENCE


def to_segment(item: Segment | tuple[str, float, float] | Mapping[str, Any]) -> Segment:
    """Convert (label, start, end), or a mapping with these keys; `ValueError` if one is missing or out of range."""
    try:
        label, start, end = (item[key] for key in Segment._fields) if isinstance(item, Mapping) else item
    except KeyError as error:
        raise ValueError(f"A segment lacks {error}: it needs label, start and end. It is {item}.") from None
    name = label_text(label, "The label of a segment")
    if name is None:
        raise ValueError(f"The segment {item} has no label. Write one for silence, or leave it out.")
    segment = Segment(visible_text(name), float(start), float(end))
    if not (math.isfinite(segment.start) and segment.start <= segment.end < math.inf):
        raise ValueError(f"The segment {tuple(segment)} ends before it starts: times are seconds, start first.")
    return segment


def _sort_segments(items: Iterable[Any], silence: str) -> list[Segment]:
    """Segments by start, without those of no length; those whose label shows nothing are silence."""
    segments = (s if s.label else s._replace(label=silence) for s in map(to_segment, items) if s.end > s.start)
    return sorted(segments, key=attrgetter("start"))


def _labels_of_segments(segments: Iterable[Any], num_frames: int, stride: int, field: int, silence: str) -> list[str]:
    spoken = _sort_segments(segments, silence)
    for left, right in pairwise(spoken):
        if left.end - right.start > stride / 2 / SAMPLING_RATE + 1e-9:
            raise ValueError(
                f"The segments {tuple(left)} and {tuple(right)} overlap: each moment can have one label only. "
                "Give one tier of an alignment (phones, not phones and words)."
            )
    seconds = (stride * num_frames + field) / SAMPLING_RATE  # of the longest recording with so many frames
    if spoken and spoken[-1].start > seconds + _MAX_LATE_SECONDS:
        raise ValueError(
            f"The segment {tuple(spoken[-1])} begins after the end of the recording, at {seconds:.2f} s. Times are"
            " seconds; check that labels and audio are of the same recording."
        )
    centers = frame_centers(num_frames, stride=stride, field=field)
    # The last segment that has begun; -1 before the first.
    positions = np.searchsorted([segment.start for segment in spoken], centers, side="right") - 1
    return [
        spoken[position].label if position >= 0 and center < spoken[position].end else silence
        for position, center in zip(positions, centers, strict=True)
    ]


def _labels_of_steps(
    labels: Sequence[str], step_seconds: float, num_frames: int, stride: int, field: int, silence: str
) -> list[str]:
    check_ranges([(0 < step_seconds < math.inf, "step_seconds", step_seconds, "more than 0, such as 0.01")])
    # In samples, since 0.01 * 16,000 is 160 exactly, but 0.0325 / 0.01 is not 3.25.
    step = step_seconds * SAMPLING_RATE
    centers = frame_centers(num_frames, stride=stride, field=field) * SAMPLING_RATE
    covered = len(labels) * step
    # T frames need at least stride * (T - 1) + field samples, and stride more would give another frame.
    shortest, longest = stride * (num_frames - 1) + field, stride * num_frames + field
    if (num_frames and covered < shortest - field) or covered > longest + field:
        raise ValueError(
            f"{len(labels):,} labels of {step_seconds} s cover {covered / SAMPLING_RATE:.3f} s, but {num_frames:,} "
            f"frames cover {shortest / SAMPLING_RATE:.3f} s. Check that both are of the same recording, cut the "
            f"labels where the audio was cut, and give a label every {step_seconds} s (or a command its step_seconds)."
        )
    positions = np.floor(centers / step + 1e-9).astype(np.int64)
    return [visible_text(labels[position]) or silence for position in np.minimum(positions, len(labels) - 1)]


def frame_labels(
    labels: Labels | Iterable[tuple[str, float, float]] | Iterable[Mapping[str, Any]],
    num_frames: int,
    *,
    step_seconds: float = 0.01,
    stride: int = STRIDE,
    field: int = FIELD,
    silence: str = SILENCE,
) -> list[str]:
    """
    Return the phone spoken at the centre of each frame, T labels.

    Fixed-rate label `j` covers `[j, j + 1)` steps; with steps of 10 ms, frame `i` has label `2 i + 1`. Aligners round
    the number of labels of a file differently, so fixed-rate labels may end up to one field (25 ms) before the last
    frame does; the last label is then repeated.

    Args:
        labels: Strings at a fixed rate; or segments in any order, also as mappings with the keys label, start and end.
            Those of no length are ignored. Neighbours may overlap by half a stride, as rounded times do; there the
            later one counts.
        num_frames: T; `stride` and `field` are also as for `frame_centers`.
        step_seconds: Length of a step in seconds; ignored for segments.
        silence: Label of frames outside all segments, and of those whose label shows nothing.

    Raises `ValueError` if a segment ends before it starts or begins after the recording, segments overlap by more,
    fixed-rate labels and frames do not cover the same time, or `num_frames` or `step_seconds` is out of range.
    """
    items: list[Any] = list(labels)
    if items and all(isinstance(item, str) for item in items):
        return _labels_of_steps(items, step_seconds, num_frames, stride, field, silence)
    return _labels_of_segments(items, num_frames, stride, field, silence)


def label_segments(
    labels: Labels, *, step_seconds: float = 0.01, seconds: float | None = None, silence: str = SILENCE
) -> list[Segment]:
    """
    Convert labels (strings at a fixed rate, or segments in any order) to segments from 0 on, ordered and without gaps.

    Gaps become `silence`, but gaps and overlaps of up to 10 ms, which rounding leaves, are closed in the middle.
    Consecutive equal labels become one segment, so both forms of labels give the same segments. Silence is appended up
    to the recording's length in `seconds`; None: end with the last label.
    """
    spans = (
        Segment(label, step * step_seconds, (step + 1) * step_seconds) if isinstance(label, str) else label
        for step, label in enumerate(labels)
    )
    spoken = _sort_segments(spans, silence)
    last = max((segment.end for segment in spoken), default=0.0)
    if seconds is not None and seconds - last > _MAX_ROUNDING_SECONDS:
        spoken.append(Segment(silence, last, seconds))
    found: list[Segment] = []
    label, start, end = silence, 0.0, 0.0
    for segment in spoken:
        if segment.start - end > _MAX_ROUNDING_SECONDS:
            pieces = [(silence, end), (segment.label, segment.start)]
        else:
            pieces = [(segment.label, (segment.start + end) / 2 if end else 0.0)]
        for following, moment in pieces:
            if following != label:
                found += [Segment(label, start, moment)] if moment > start else []
                label, start = following, moment
        end = max(end, segment.end)
    return [*found, Segment(label, start, end)] if end > start else found


def relabel(labels: Labels, change: Callable[[str], str]) -> Labels:
    """Return labels with their names changed by a function."""
    changed = (change(item) if isinstance(item, str) else item._replace(label=change(item.label)) for item in labels)
    return list(changed)  # type: ignore[return-value]


def label_name(recording: str, labels: Mapping[str, Labels]) -> str | None:
    """Return the key of the labels of a recording whose neighbours are not known, or None if it has none."""
    path, file = without_suffix(recording), recording.rpartition("/")[2]
    return next((name for name in (recording, path, file, without_suffix(file)) if name in labels), None)


def match_labels(ids: Sequence[str], labels: Mapping[str, Labels], *, others: Iterable[str] = ()) -> dict[str, str]:
    """
    Find the labels of recordings by id (`84/84-121123.flac`), or by the name of the file with or without suffix.

    Names that are not ids count where they are unique, as `match_names` says; `others` are ids of further recordings
    of the same data, among which they must be unique too. Returns the key of each recording's labels, by the
    recording's id, for those that have labels, and warns of the rest. Raises `ValueError` if no recording has labels,
    or the names do not tell whose they are.
    """
    names, ambiguous = match_names([*ids, *others], labels)
    owners, wanted = defaultdict[str, list[str]](list), set(ids)
    for recording, name in names.items():
        owners[name].append(recording)
    for recording, options in ambiguous.items():
        owners[options[0]].append(recording)
        if len(options) > 1 and recording in wanted:
            raise ValueError(
                f"The labels of {options[0]!r} and of {options[1]!r} fit one recording, {recording!r}. Name the labels"
                " by the recordings' ids."
            )
    for name, several in owners.items():
        own = [recording for recording in several if recording in wanted]
        if len(several) > 1 and own and (len(own) > 1 or own[0] in ambiguous):
            raise ValueError(
                f"The labels of {name!r} fit two recordings, {several[0]!r} and {several[1]!r}. Name the labels by the"
                " recordings' ids."
            )
    found = {recording: names[recording] for recording in ids if recording in names}
    if not found:
        raise ValueError(
            f"None of {len(ids):,} recordings has labels. They are named like {ids[0]!r}, the labels like"
            f" {next(iter(labels), 'nothing')!r}: both must have the same id, or the name of the file without suffix."
        )
    if without := [recording for recording in ids if recording not in found]:
        logger.warning(f"{len(without):,} of {len(ids):,} recordings have no labels, for example {without[0]}.")
    return found
