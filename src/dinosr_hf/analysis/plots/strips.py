"""Units as strips under the spectrogram of their recording, with phones and words. `S` samples, `T` frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data import SAMPLING_RATE
from ...utils.extras import import_extra
from .._figures import TEXT_SIZE, TICK_SIZE, fit_texts, font_families, label_axes, new_figure, text_color
from ..alignment import FIELD, STRIDE, Segment, frame_centers
from ..quality import check_codes
from ..segmentation import find_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A wide-band spectrogram, the usual one of speech: it shows formants and blurs harmonics.
_WINDOW_SECONDS = 0.010
_HOP_SECONDS = 0.002
_DYNAMIC_RANGE_DB = 70.0
_PRE_EMPHASIS = 0.97
_GOLDEN = 0.6180339887498949  # golden ratio: consecutive codewords have clearly different colours


def _log_spectrogram(waveform: NDArray[np.float32]) -> NDArray[np.float64]:
    """Power in decibels below the maximum, (frequencies, windows), of samples (S,)."""
    size, hop = round(_WINDOW_SECONDS * SAMPLING_RATE), round(_HOP_SECONDS * SAMPLING_RATE)
    # High frequencies of speech are weak.
    emphasised = np.append(waveform[:1], waveform[1:] - _PRE_EMPHASIS * waveform[:-1])
    windows = np.lib.stride_tricks.sliding_window_view(emphasised, size)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), n=4 * size, axis=1)) ** 2
    decibels = 10 * np.log10(np.maximum(power, 1e-20)).T
    return np.maximum(decibels - decibels.max(), -_DYNAMIC_RANGE_DB)


def _clip(segments: Iterable[Segment], start: float, end: float) -> list[Segment]:
    """The parts of segments between two times."""
    seen = (Segment(str(label), max(first, start), min(last, end)) for label, first, last in segments)
    return [segment for segment in seen if segment.end > segment.start]


def _runs(codes: NDArray[np.int64], stride: int, field: int) -> list[Segment]:
    """Runs of a code; a frame extends half a stride to both sides of its centre."""
    first, lengths = find_runs(codes)
    starts = (frame_centers(len(codes), stride=stride, field=field) - stride / SAMPLING_RATE / 2)[first]
    ends = starts + lengths * stride / SAMPLING_RATE
    return [Segment(*run) for run in zip(map(str, codes[first]), starts.tolist(), ends.tolist(), strict=True)]


def _draw_tier(axes: Axes, name: str, boxes: Iterable[tuple[Segment, Any]]) -> list[tuple[Any, float]]:
    """Draw a row of labelled, coloured boxes; returns the texts with the width of their boxes."""
    fitted = []
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": TICK_SIZE - 0.5, "parse_math": False}
    style["fontfamily"] = font_families()
    for (label, start, end), color in boxes:
        axes.axvspan(start, end, facecolor=color, edgecolor="white", linewidth=0.6)
        text = axes.text((start + end) / 2, 0.5, label, color=text_color(color), clip_on=True, **style)
        text.set_in_layout(False)
        fitted.append((text, end - start))
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel(name, fontsize=TEXT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    return fitted


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
    Plot units as strips under the spectrogram of their recording, with phones and words above them.

    Each run of a unit is a box with its number, in the unit's colour; numbers and labels that are wider than their box
    are rotated, or left out. Boundaries of phones are thin lines through the spectrogram, those of words thick ones.
    Two to four seconds fit the width of a page; in one second each frame has its number.

    Args:
        waveform: float32 (S,) at 16 kHz.
        units: Name of each strip, such as "layer 5" -> its units, integers (T,); may be empty if there are segments.
        phones: Segments, in seconds of the recording; `analysis.label_segments` makes them of fixed-rate labels.
        words: Segments, in seconds.
        start: Start of the plot in seconds.
        end: End of the plot in seconds; None: that of the recording.
        stride: Samples from one unit to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a unit is computed from (`config.receptive_field`).

    Raises `ValueError` if the waveform is not (S,), units are not (T,), or there is nothing to draw.
    """
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"waveform has shape {samples.shape}, but must be (S,): one channel.")
    strips = {name: check_codes(codes, name=f"units of {name}") for name, codes in units.items()}
    length = len(samples) / SAMPLING_RATE
    last = length if end is None else min(end, length)
    if not 0 <= start < last or last - start < 2 * _WINDOW_SECONDS:
        raise ValueError(
            f"start={start} and end={end} leave nothing to draw of {length:.3f} s: give seconds, start before end, at"
            f" least {2 * _WINDOW_SECONDS} s apart."
        )
    tiers = {"words": _clip(words, start, last), "phones": _clip(phones, start, last)}
    tiers = {name: segments for name, segments in tiers.items() if segments}
    if not tiers and not strips:
        raise ValueError("There is nothing to draw: no units, and no phones or words within the plot. Give some.")

    heights = [6.0, *[1.0] * (len(tiers) + len(strips))]
    figure = new_figure(width, 0.24 * sum(heights) + 0.55)
    figure.get_layout_engine().set(hspace=0.01, h_pad=0.015)
    spectrogram, *rows = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    picture = _log_spectrogram(samples[round(start * SAMPLING_RATE) : round(last * SAMPLING_RATE)])
    first = start + _WINDOW_SECONDS / 2 - _HOP_SECONDS / 2
    extent = (first, first + picture.shape[1] * _HOP_SECONDS, 0.0, SAMPLING_RATE / 2000)
    spectrogram.imshow(picture, cmap="gray_r", aspect="auto", origin="lower", extent=extent, interpolation="bilinear")
    spectrogram.set_xlim(start, last)
    label_axes(spectrogram, y="kHz", title=title)
    spectrogram.tick_params(labelbottom=False)
    fitted = []
    for (name, segments), axes in zip(tiers.items(), rows, strict=False):
        linewidth, linestyle = (1.4, "-") if name == "words" else (0.8, ":")
        for edge in {edge for segment in segments for edge in segment[1:]}:
            spectrogram.axvline(edge, color="C1", linewidth=linewidth, linestyle=linestyle)
        fitted += _draw_tier(axes, name, zip(segments, cycle(["0.88", "0.80"]), strict=False))
    viridis = import_extra("matplotlib", "analysis").colormaps["viridis"]
    for (name, codes), axes in zip(strips.items(), rows[len(tiers) :], strict=True):
        runs = _clip(_runs(codes, stride, field), start, last)
        colors = (viridis(0.12 + 0.88 * (int(run.label) * _GOLDEN % 1)) for run in runs)
        fitted += _draw_tier(axes, name, zip(runs, colors, strict=True))
    rows[-1].tick_params(labelbottom=True, labelsize=TICK_SIZE, length=2)
    rows[-1].set_xlabel("seconds", fontsize=TEXT_SIZE)
    fit_texts(figure, fitted)
    return figure
