"""
Curves: metrics over layers, and how often each codeword is used.

`L` layers, `V` codewords.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...utils.extras import import_extra
from .._figures import TEXT_SIZE, LineStyle, check_width, legend_above, line_styles, new_figure, shorten, small_axes
from ..quality import code_perplexity, num_active_codes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Longer names would leave no room for the picture.
_MAX_LETTERS = 48
_ALIKE = LineStyle("0.45", (0, (1, 2)), "")


class LayerCurves(NamedTuple):
    """
    Metrics of the layers of one checkpoint.

    Attributes:
        name: For the legend.
        layers: The L layers, the lowest is 1.
        metrics: Name of each metric -> its L values; nan where a layer has none.
        intervals: Of some metrics: (low, high) of each of the L layers, as a bootstrap gives them.
    """

    name: str
    layers: Sequence[int]
    metrics: Mapping[str, Sequence[float]]
    intervals: Mapping[str, Sequence[tuple[float, float]]] = {}


def _check_curves(curves: Sequence[LayerCurves]) -> list[str]:
    """The metrics that there are, in the order in which they are named first."""
    if not curves:
        raise ValueError("There is no checkpoint to draw. Give at least one.")
    for curve in curves:
        for kind in (curve.metrics, curve.intervals):
            for metric, values in kind.items():
                if len(values) != len(curve.layers):
                    raise ValueError(
                        f"{curve.name} has {len(values)} values of {metric} for {len(curve.layers)} layers, but each"
                        " layer needs one. Give nan where there is none."
                    )
        unknown = [metric for metric in curve.intervals if metric not in curve.metrics]
        if unknown:
            raise ValueError(f"{curve.name} has intervals of {unknown[0]}, but no values. Give both, or neither.")
    names = list(dict.fromkeys(metric for curve in curves for metric in curve.metrics))
    if not names:
        raise ValueError("There is no metric to draw. Give at least one in metrics.")
    return names


def _draw_layers(axes: Axes, metric: str, curves: Sequence[LayerCurves], styles: Sequence[LineStyle]) -> None:
    for curve, style in zip(curves, styles, strict=True):
        if metric not in curve.metrics:
            continue
        values = np.asarray(curve.metrics[metric], dtype=np.float64)
        axes.plot(
            curve.layers,
            values,
            color=style.color,
            linestyle=style.dashes,
            marker=style.marker,
            markersize=3.5,
            linewidth=1.2,
        )
        if metric in curve.intervals:
            low, high = np.asarray(curve.intervals[metric], dtype=np.float64).reshape(-1, 2).T
            axes.fill_between(curve.layers, low, high, color=style.color, alpha=0.18, linewidth=0)
            axes.vlines(curve.layers, low, high, color=style.color, linewidth=0.7)


def _set_layers(axes: Axes, layers: Sequence[int], width: float) -> None:
    """A tick at each layer, or at every so many where a panel has not the inches for all."""
    step = math.ceil(len(layers) * 0.18 / width)
    axes.set_xticks(layers[::step])
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def layer_curves_figure(curves: Sequence[LayerCurves], *, title: str | None = None, width: float = 7.2) -> Figure:
    """
    Draw metrics over the layers of one or several checkpoints, a panel for each metric.

    Checkpoints differ by colour, dashes and marker, so that they are told apart in grey. Intervals are bands with a
    bar at each layer. A metric that a checkpoint lacks has no line of it.

    Args:
        curves: One of each checkpoint.
        title: Text above.
        width: Inches.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no checkpoint or no metric, or not one value a layer.
        ImportError: If matplotlib is not installed.
    """
    metrics = _check_curves(curves)
    check_width(width)
    num_columns = min(3 if width > 5 else 2 if width > 3 else 1, len(metrics))
    num_rows = math.ceil(len(metrics) / num_columns)
    has_legend = len(curves) > 1 or curves[0].name != ""
    figure = new_figure(width, 1.75 * num_rows + 0.2 + 0.2 * (len(curves) if has_legend else 0))
    styles = line_styles(len(curves))
    panel = width / num_columns - 0.5
    layers = sorted({layer for curve in curves for layer in curve.layers})
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for number, axes in enumerate(grid):
        if number >= len(metrics):
            axes.remove()
            continue
        _draw_layers(axes, metrics[number], curves, styles)
        _set_layers(axes, layers, panel)
        # A letter is about 0.06 inches wide.
        name = textwrap.fill(shorten(metrics[number], _MAX_LETTERS), int(panel / 0.06))
        axes.set_title(name, fontsize=TEXT_SIZE, parse_math=False)
        axes.set_xlabel("layer", fontsize=TEXT_SIZE)
        small_axes(axes, grid=True)
    if has_legend:
        _add_legend(figure, [shorten(curve.name, _MAX_LETTERS) for curve in curves], styles, width, title)
    elif title is not None:
        figure.suptitle(title, fontsize=TEXT_SIZE + 1)
    return figure


def _add_legend(
    figure: Any, names: Sequence[str], styles: Sequence[LineStyle], width: float, title: str | None
) -> None:
    lines = import_extra("matplotlib.lines", "analysis")
    handles = [
        lines.Line2D(
            [],
            [],
            color=style.color,
            linestyle=style.dashes,
            marker=style.marker,
            markersize=3.5,
            label=name,
        )
        for name, style in zip(names, styles, strict=True)
    ]
    legend_above(figure, handles, width, title)


def _ranked_shares(counts: ArrayLike, name: str) -> NDArray[np.float64]:
    """Shares of the codewords in use, the most frequent first."""
    array = np.asarray(counts, dtype=np.float64)
    try:
        num_active_codes(array)
    except ValueError as error:
        raise ValueError(f"{name or 'counts'}: {error}") from None
    array = array if array.ndim == 1 else array.sum(axis=0)
    ranked = np.sort(array[array > 0])[::-1]
    return ranked / ranked.sum()


def code_usage_figure(counts: Mapping[str, ArrayLike], *, title: str | None = None, width: float = 5.0) -> Figure:
    """
    Draw how often each codeword is used, from the most frequent to the rarest, on a scale of logarithms.

    The legend has the codewords in use and the perplexity of each codebook (`quality.code_perplexity`); a dotted line
    is where all codewords would be used alike. Codewords without a frame have no place on the scale: the curve ends.

    Args:
        counts: Name of each codebook, such as "layer 5" -> frames of each codeword (V,), or a table (P, V) of
            `quality.contingency`, whose phones are summed over.
        title: Text above.
        width: Inches.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no codebook, or these are no counts or count no frame.
        ImportError: If matplotlib is not installed.
    """
    if not counts:
        raise ValueError("There is no codebook to draw. Give at least one.")
    check_width(width)
    shares = [_ranked_shares(each, name) for name, each in counts.items()]
    sizes = [np.shape(each)[-1] for each in counts.values()]
    figure = new_figure(width, 0.6 * width + 0.2 * (len(shares) + 1))
    axes = figure.add_subplot()
    axes.set_yscale("log")
    styles = line_styles(len(shares))
    for ranked, style in zip(shares, styles, strict=True):
        axes.plot(
            range(1, len(ranked) + 1),
            ranked,
            color=style.color,
            linestyle=style.dashes,
            marker=style.marker,
            # The first and the last have a marker, and some between them.
            markevery=[*range(0, len(ranked), max(len(ranked) // 8, 1)), len(ranked) - 1],
            markersize=3.5,
            linewidth=1.2,
        )
    for size in sorted(set(sizes)):
        axes.plot([1, size], [1 / size] * 2, color=_ALIKE.color, linewidth=0.9, linestyle=_ALIKE.dashes, zorder=1)
    low, high = axes.get_ylim()
    # A decade at least, which is what has a label.
    axes.set_ylim(min(low, high / 10), 1.3 * max(ranked[0] for ranked in shares))
    axes.yaxis.set_minor_formatter(import_extra("matplotlib.ticker", "analysis").NullFormatter())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(1 - 0.02 * max(sizes), 1.02 * max(sizes))
    axes.set_xlabel("codewords, the most frequent first", fontsize=TEXT_SIZE)
    axes.set_ylabel("share of frames", fontsize=TEXT_SIZE)
    small_axes(axes, grid=True)
    names = [
        f"{shorten(name, _MAX_LETTERS // 2)}: {len(ranked)} of {size} in use, perplexity {code_perplexity(each):.1f}"
        for (name, each), ranked, size in zip(counts.items(), shares, sizes, strict=True)
    ]
    _add_legend(figure, [*names, "all codewords used alike"], [*styles, _ALIKE], width, title)
    return figure
