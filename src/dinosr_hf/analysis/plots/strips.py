"""
Units in time: a strip under the spectrogram that they were made from, with the boundaries of phones and words.

`S` samples, `T` frames, `F` frequencies, `W` windows of the spectrogram.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...utils.extras import import_extra
from .._figures import TEXT_SIZE, TICK_SIZE, check_width, fit_texts, new_figure, small_axes, text_color
from ..alignment import FIELD, SAMPLING_RATE, STRIDE, Segment, frame_centers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Windows of the spectrogram, in seconds: those of most pictures of speech, where harmonics blur and formants show.
_WINDOW_SECONDS = 0.010
_HOP_SECONDS = 0.002
_DYNAMIC_RANGE_DB = 70.0
_PRE_EMPHASIS = 0.97

# Steps from one codeword's colour to the next: neighbours by number are not neighbours by colour.
_GOLDEN = 0.6180339887498949


def log_spectrogram(waveform: NDArray[np.float32], sampling_rate: int) -> NDArray[np.float64]:
    """
    Power of short windows, in decibels below the loudest.

    Args:
        waveform: float32 (S,), at least a window long.
        sampling_rate: Samples a second.

    Returns:
        float64 (F, W), at most 0 and at least -70.
    """
    size, hop = round(_WINDOW_SECONDS * sampling_rate), round(_HOP_SECONDS * sampling_rate)
    # High frequencies of speech are weak.
    emphasised = np.append(waveform[:1], waveform[1:] - _PRE_EMPHASIS * waveform[:-1])
    windows = np.lib.stride_tricks.sliding_window_view(emphasised, size)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), n=4 * size, axis=1)) ** 2
    decibels = 10 * np.log10(np.maximum(power, 1e-20)).T
    return np.maximum(decibels - decibels.max(), -_DYNAMIC_RANGE_DB)


def _cut(segments: Iterable[Segment], start: float, end: float) -> list[Segment]:
    """What of the segments is seen between two times."""
    seen = (Segment(str(label), max(first, start), min(last, end)) for label, first, last in segments)
    return [segment for segment in seen if segment.end > segment.start]


def _runs(codes: NDArray[np.int64], stride: int, field: int) -> list[Segment]:
    """Runs of a code, in seconds; a frame reaches half a stride to both sides of its centre."""
    centers = frame_centers(len(codes), stride=stride, field=field)
    half = stride / SAMPLING_RATE / 2
    runs = []
    for code, group in groupby(range(len(codes)), key=lambda frame: int(codes[frame])):
        frames = list(group)
        runs.append(Segment(str(code), float(centers[frames[0]] - half), float(centers[frames[-1]] + half)))
    return runs


def _draw_spectrogram(axes: Axes, waveform: NDArray[np.float32], start: float, end: float, sampling_rate: int) -> None:
    picture = log_spectrogram(waveform, sampling_rate)
    half = _WINDOW_SECONDS / 2 - _HOP_SECONDS / 2
    extent = (start + half, start + half + picture.shape[1] * _HOP_SECONDS, 0.0, sampling_rate / 2000)
    axes.imshow(picture, cmap="gray_r", aspect="auto", origin="lower", extent=extent, interpolation="bilinear")
    axes.set_xlim(start, end)
    axes.set_ylabel("kHz", fontsize=TEXT_SIZE)
    small_axes(axes)


def _draw_tier(axes: Axes, name: str, boxes: Iterable[tuple[str, float, float, Any]]) -> list[tuple[Any, float]]:
    """A row of labelled boxes; returns the texts with the width of their boxes."""
    fitted = []
    for label, start, end, color in boxes:
        axes.axvspan(start, end, facecolor=color, edgecolor="white", linewidth=0.6)
        text = axes.text(
            (start + end) / 2,
            0.5,
            label,
            ha="center",
            va="center",
            fontsize=TICK_SIZE - 0.5,
            color=text_color(color),
            parse_math=False,
            clip_on=True,
        )
        text.set_in_layout(False)
        fitted.append((text, end - start))
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel(name, fontsize=TEXT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    axes.tick_params(length=0, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return fitted


def _code_color(code: int) -> Any:
    """One colour a code; the lightness of each is other than that of most others, so that it works in grey too."""
    return import_extra("matplotlib", "analysis").colormaps["viridis"](0.12 + 0.88 * (code * _GOLDEN % 1))


def _check_times(num_samples: int, sampling_rate: int, start: float, end: float | None, width: float) -> float:
    length = num_samples / sampling_rate
    last = length if end is None else min(end, length)
    if not 0 <= start < last or last - start < 2 * _WINDOW_SECONDS:
        raise ValueError(
            f"start={start} and end={end} leave nothing to draw of {length:.3f} s: give seconds, start before end, at"
            f" least {2 * _WINDOW_SECONDS} s apart."
        )
    check_width(width)
    return last


def unit_strip_figure(
    waveform: ArrayLike,
    units: Mapping[str, ArrayLike],
    *,
    phones: Iterable[Segment] = (),
    words: Iterable[Segment] = (),
    start: float = 0.0,
    end: float | None = None,
    stride: int = STRIDE,
    field: int = FIELD,
    title: str | None = None,
    width: float = 7.2,
) -> Figure:
    """
    Draw units as strips under the spectrogram of their recording, with phones and words above them.

    Each run of a unit is a box with its number; numbers and labels that are wider than their box stand upright, or are
    left out. A unit has the same colour everywhere. Boundaries of phones are thin lines through the spectrogram, those
    of words thick ones. Two to four seconds fit into the width of a page; of one second
    each frame has its number.

    Args:
        waveform: float32 (S,) at 16 kHz.
        units: Name of each strip, such as "layer 5" -> its units, integers (T,).
        phones: Segments, in seconds of the recording; `analysis.label_segments` makes them of one label a step.
        words: Segments, in seconds.
        start: First second that is drawn.
        end: Last second; None: to the end.
        stride: Samples from one unit to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a unit is made from (`config.receptive_field`).
        title: Text above.
        width: Inches.

    Returns:
        The figure.

    Raises:
        ValueError: If the waveform is not (S,), units are not (T,), there is no strip, or nothing lies between `start`
            and `end`.
        ImportError: If matplotlib is not installed.
    """
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"waveform has shape {samples.shape}, but must be (S,): one channel.")
    if not units:
        raise ValueError("There are no units to draw. Give at least one strip.")
    strips = {name: np.asarray(codes) for name, codes in units.items()}
    for name, codes in strips.items():
        if codes.ndim != 1 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"units of {name} are {codes.dtype} {codes.shape}, but must be integers (T,).")
    last = _check_times(len(samples), SAMPLING_RATE, start, end, width)
    tiers = [("words", _cut(words, start, last)), ("phones", _cut(phones, start, last))]
    tiers = [(name, segments) for name, segments in tiers if segments]

    heights = [6.0, *[1.0] * (len(tiers) + len(strips))]
    figure = new_figure(width, 0.24 * sum(heights) + 0.55)
    figure.get_layout_engine().set(hspace=0.01, h_pad=0.015)
    spectrogram, *rows = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    piece = samples[round(start * SAMPLING_RATE) : round(last * SAMPLING_RATE)]
    _draw_spectrogram(spectrogram, piece, start, last, SAMPLING_RATE)
    spectrogram.tick_params(labelbottom=False)
    fitted = []
    for (name, segments), axes in zip(tiers, rows, strict=False):
        linewidth = 1.4 if name == "words" else 0.8
        for edge in {edge for segment in segments for edge in segment[1:]}:
            spectrogram.axvline(edge, color="C1", linewidth=linewidth, linestyle="-" if name == "words" else ":")
        shades = ("0.88", "0.80")
        fitted += _draw_tier(axes, name, [(label, a, b, shades[n % 2]) for n, (label, a, b) in enumerate(segments)])
    for (name, codes), axes in zip(strips.items(), rows[len(tiers) :], strict=True):
        runs = _cut(_runs(codes, stride, field), start, last)
        boxes = [(code, first, end, _code_color(int(code))) for code, first, end in runs]
        fitted += _draw_tier(axes, name, boxes)
    rows[-1].tick_params(labelbottom=True, labelsize=TICK_SIZE, length=2)
    rows[-1].set_xlabel("seconds", fontsize=TEXT_SIZE)
    if title is not None:
        spectrogram.set_title(title, fontsize=TEXT_SIZE + 1)
    fit_texts(figure, fitted)
    return figure
