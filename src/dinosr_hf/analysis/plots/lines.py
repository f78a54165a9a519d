"""
Line plots: metrics over layers, and how often each codeword is used.

`L` layers, `V` codewords.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._figures import (
    TEXT_SIZE,
    add_panels,
    label_axes,
    legend_above,
    line_styles,
    new_figure,
    shorten,
    shorten_apart,
    span_a_decade,
)
from ..quality import code_perplexity, num_active_codes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LETTERS = 48  # longer names would leave no room for the panels
_UNIFORM = {"color": "0.45", "linestyle": (0, (1, 2))}


class LayerCurves(NamedTuple):
    """Metrics of the layers of one checkpoint."""

    name: str  # for the legend
    layers: Sequence[int]  # L, the lowest is 1
    metrics: Mapping[str, Sequence[float]]  # L values of each; nan where a layer has none
    intervals: Mapping[str, Sequence[tuple[float, float]]] = {}  # of some metrics, (low, high) of each layer


def _check_curves(curves: Sequence[LayerCurves]) -> list[str]:
    """Names of all metrics, in the order of their first occurrence."""
    if not curves:
        raise ValueError("There is no checkpoint to draw. Give at least one.")
    for curve in curves:
        for metric, values in [*curve.metrics.items(), *curve.intervals.items()]:
            if len(values) != len(curve.layers):
                raise ValueError(
                    f"{curve.name} has {len(values)} values of {metric} for {len(curve.layers)} layers, but each"
                    " layer needs one. Give nan where there is none."
                )
            if metric not in curve.metrics:
                raise ValueError(f"{curve.name} has intervals of {metric}, but no values. Give both, or neither.")
    names = list(dict.fromkeys(metric for curve in curves for metric in curve.metrics))
    if not names:
        raise ValueError("There is no metric to draw. Give at least one in metrics.")
    return names


def _draw_layers(axes: Axes, metric: str, curve: LayerCurves, style: Mapping[str, Any]) -> None:
    axes.plot(curve.layers, curve.metrics[metric], **style, linewidth=1.2)
    if metric in curve.intervals:
        low, high = np.asarray(curve.intervals[metric], dtype=np.float64).reshape(-1, 2).T
        axes.fill_between(curve.layers, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.vlines(curve.layers, low, high, color=style["color"], linewidth=0.7)


def layer_curves_figure(curves: Sequence[LayerCurves], *, title: str | None = None, width: float = 7.2) -> Figure:
    """
    Plot metrics over the layers of one or several checkpoints, with a panel for each metric.

    Checkpoints differ by colour, dashes and marker, also in greyscale, and have no line in the panels of metrics that
    they lack. Intervals are bands with a bar at each layer. Raises `ValueError` if there is no checkpoint or no
    metric, or not one value per layer.
    """
    metrics = _check_curves(curves)
    num_columns = min(3 if width > 5 else 2 if width > 3 else 1, len(metrics))
    figure = new_figure(width, 1.75 * math.ceil(len(metrics) / num_columns) + 0.2 + 0.2 * len(curves))
    styles = line_styles(len(curves))
    panel_width = width / num_columns - 0.5
    layers = sorted({layer for curve in curves for layer in curve.layers})
    for metric, axes in zip(metrics, add_panels(figure, len(metrics), num_columns), strict=True):
        for curve, style in zip(curves, styles, strict=True):
            if metric in curve.metrics:
                _draw_layers(axes, metric, curve, style)
        # A tick at every layer, or fewer where there is no room.
        axes.set_xticks(layers[:: math.ceil(len(layers) * 0.18 / panel_width)])
        axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        # A letter is about 0.06 inches wide.
        name = textwrap.fill(shorten(metric, _MAX_LETTERS), int(panel_width / 0.06))
        axes.set_title(name, fontsize=TEXT_SIZE, parse_math=False)
        label_axes(axes, "layer", grid=True)
    names = shorten_apart([curve.name for curve in curves], _MAX_LETTERS)
    lines = [{"label": name, **style} for name, style in zip(names, styles, strict=True)]
    legend_above(figure, lines, width, title)
    return figure


def _ranked_shares(counts: ArrayLike, name: str) -> NDArray[np.float64]:
    """Shares of the codewords in use, in descending order."""
    try:
        num_active_codes(counts)
    except ValueError as error:
        raise ValueError(f"{name or 'counts'}: {error}") from None
    totals = np.atleast_2d(np.asarray(counts, dtype=np.float64)).sum(axis=0)
    ranked = np.sort(totals[totals > 0])[::-1]
    return ranked / ranked.sum()


def code_usage_figure(counts: Mapping[str, ArrayLike], *, title: str | None = None, width: float = 5.0) -> Figure:
    """
    Plot how often each codeword is used, from the most to the least frequent, on a logarithmic scale.

    `counts` has, by the name of a codebook, such as "layer 5", the frames of each codeword (V,), or a table (P, V) of
    `quality.contingency`, which is summed over phones. The legend has the number of codewords in use and the
    perplexity of each codebook; a dotted line shows uniform use. A curve ends where codewords have no frame. Raises
    `ValueError` if there is no codebook, values are not counts, or they count no frame.
    """
    if not counts:
        raise ValueError("There is no codebook to draw. Give at least one.")
    shares = [_ranked_shares(each, name) for name, each in counts.items()]
    sizes = [np.shape(each)[-1] for each in counts.values()]
    figure = new_figure(width, 0.6 * width + 0.2 * (len(shares) + 1))
    axes = figure.add_subplot()
    axes.set_yscale("log")
    lines = []
    names = shorten_apart(list(counts), _MAX_LETTERS // 2)
    drawn = zip(names, counts.values(), shares, sizes, line_styles(len(shares)), strict=True)
    for name, each, ranked, size, style in drawn:
        usage = f"{len(ranked)} of {size} in use, perplexity {code_perplexity(each):.1f}"
        lines.append({"label": f"{name}: {usage}", **style})
        # The first, the last, and some between.
        marked = [*range(0, len(ranked), max(len(ranked) // 8, 1)), len(ranked) - 1]
        axes.plot(range(1, len(ranked) + 1), ranked, **style, markevery=marked, linewidth=1.2)
    for size in sorted(set(sizes)):
        axes.plot([1, size], [1 / size] * 2, **_UNIFORM, linewidth=0.9, zorder=1)
    axes.set_ylim(top=1.3 * max(ranked[0] for ranked in shares))
    span_a_decade(axes, "y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(1 - 0.02 * max(sizes), 1.02 * max(sizes))
    label_axes(axes, "codewords, the most frequent first", "share of frames", grid=True)
    legend_above(figure, [*lines, {"label": "all codewords used alike", **_UNIFORM}], width, title)
    return figure
