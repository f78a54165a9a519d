"""
The curves of pre-training runs, beside the published ones of a full-size run.

Figures are made as in `plots`: without pyplot, so they need no display.

`N` codebooks, `V` codewords.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from ..utils.extras import import_extra
from ._figures import check_width, line_colors, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReferencePoint(NamedTuple):
    """Validation figures of the reference run after so many updates; means over its 8 codebooks of 256 codewords."""

    step: int
    loss: float
    target_perplexity: float
    prediction_perplexity: float
    active_codewords: float


REFERENCE_CODEWORDS = 256
# 16 x 3.8 million samples at 16 kHz.
REFERENCE_STEP_SECONDS = 3800.0
# The reproduction of DinoSR base in the SpidR paper (arXiv 2512.20308), on LibriSpeech dev-clean.
REFERENCE = tuple(
    ReferencePoint(*values)
    for values in (
        (0, 5.735, 80.4, 217.0, 245.7),
        (2_500, 3.144, 172.2, 178.1, 209.4),
        (5_000, 2.664, 201.4, 201.5, 211.0),
        (7_500, 2.385, 194.9, 194.3, 211.0),
        (10_000, 2.111, 188.9, 188.8, 211.0),
        (12_500, 1.922, 183.9, 185.9, 210.8),
        (15_000, 1.809, 181.6, 182.7, 211.0),
        (20_000, 1.654, 180.6, 181.7, 210.9),
        (25_000, 1.575, 180.7, 182.1, 211.1),
        (30_000, 1.472, 180.7, 182.3, 211.1),
        (40_000, 1.427, 179.7, 180.8, 211.1),
        (50_000, 1.336, 176.8, 178.5, 211.0),
        (75_000, 1.281, 172.5, 175.6, 211.0),
        (100_000, 1.240, 170.2, 172.6, 211.0),
        (150_000, 1.198, 165.6, 168.0, 211.0),
        (200_000, 1.210, 159.4, 162.0, 210.6),
        (225_000, 1.124, 159.2, 160.9, 210.6),
        (250_000, 1.080, 159.4, 162.0, 210.8),
        (300_000, 1.064, 159.4, 161.8, 210.7),
        (350_000, 1.036, 159.4, 161.7, 210.7),
        (400_000, 1.038, 159.1, 161.4, 210.7),
    )
)

Axis = Literal["step", "hours"]


class RunCurves(NamedTuple):
    """
    What a run has written down.

    Attributes:
        name: For the legend.
        lines: Its lines of metrics, by step.
        codebook_size: V.
        bounds: The run's `collapse_perplexity`, `collapse_active` and `collapse_variation`, where they are known.
    """

    name: str
    lines: Sequence[Mapping[str, Any]]
    codebook_size: int
    bounds: Mapping[str, float]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    # What has no end is being written, or was when the run was killed.
    whole = text[: text.rfind("\n") + 1]
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(row)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no line of metrics: an object with a step.") from None
        if lines and lines[-1]["step"] > step:
            lines = [earlier for earlier in lines if earlier["step"] < step]
        lines.append(line)
    return lines


def read_run(folder: str | Path) -> RunCurves:
    """
    Read what a run has left in its `output_dir` so far.

    Args:
        folder: With `metrics.jsonl` and `arguments.yaml`.

    Returns:
        The run, by the folder's name. Where a run was resumed and has written a step twice, the later counts.

    Raises:
        ValueError: If one of the files is missing or is none of these.
    """
    folder = Path(folder)
    metrics, arguments_file = folder / "metrics.jsonl", folder / "arguments.yaml"
    for path in (metrics, arguments_file):
        if not path.is_file():
            raise ValueError(f"{path} is not there. Give the output_dir of a run that has begun.")
    lines = _read_lines(metrics)
    if not lines:
        raise ValueError(f"{metrics} is empty. The run has not come to its first line of metrics yet.")
    arguments = yaml.safe_load(arguments_file.read_text(encoding="utf-8"))
    if not isinstance(arguments, dict) or "codebook_size" not in arguments:
        raise ValueError(f"{arguments_file} has no codebook_size. Give the output_dir of a pre-training run.")
    bounds = {name: value for name, value in arguments.items() if name in _BOUNDS}
    return RunCurves(folder.resolve().name, lines, arguments["codebook_size"], bounds)


_BOUNDS = ("collapse_perplexity", "collapse_active", "collapse_variation")


class _Curve(NamedTuple):
    """A field of the metrics, with the one that has it a codebook, how it is drawn, and its name where two share."""

    field: str
    each: str | None = None
    style: str = "-"
    label: str | None = None


class _Panel(NamedTuple):
    title: str
    curves: Sequence[_Curve]
    reference: str | None = None
    bound: str | None = None
    is_share: bool = False
    is_log: bool = False


_PANELS = (
    _Panel(
        "loss (nats)",
        (_Curve("loss", "codebook_losses", label="training"), _Curve("eval_loss", style="--", label="held out")),
        reference="loss",
    ),
    _Panel(
        "target perplexity, share of the codewords",
        (_Curve("target_perplexity", "target_perplexities"), _Curve("eval_target_perplexity", style="--")),
        "target_perplexity",
        "collapse_perplexity",
        is_share=True,
    ),
    _Panel(
        "prediction perplexity, share of the codewords",
        (
            _Curve("prediction_perplexity", "prediction_perplexities"),
            _Curve("eval_prediction_perplexity", style="--"),
        ),
        "prediction_perplexity",
        "collapse_perplexity",
        is_share=True,
    ),
    _Panel(
        "codewords in use, share",
        (_Curve("active_codewords", "codebook_active_codewords"), _Curve("eval_active_codewords", style="--")),
        "active_codewords",
        "collapse_active",
        is_share=True,
    ),
    _Panel(
        "variation over time, share of the energy",
        (
            _Curve("target_variation", "target_variations", label="teacher"),
            _Curve("feature_variation", style=":", label="convolutions"),
        ),
        bound="collapse_variation",
        is_log=True,
    ),
    _Panel(
        "phones in the codes, held out",
        (
            _Curve("eval_pnmi", "eval_pnmis", label="PNMI"),
            _Curve("eval_phone_purity", style="--", label="phone purity"),
        ),
    ),
    _Panel("learning rate", (_Curve("learning_rate"),)),
    _Panel("gradient norm", (_Curve("grad_norm"),), is_log=True),
    _Panel("speed, hours of audio an hour", (_Curve("audio_seconds_per_second"),)),
)
_REFERENCE_COLOR = "0.72"


def _hours(run: RunCurves) -> Callable[[Mapping[str, Any]], float]:
    """Hours of audio up to a line; lines of evaluations have none of their own."""
    hours: dict[int, float] = {}
    total = 0.0
    for line in run.lines:
        total = line.get("audio_hours", total + line.get("seconds", 0.0) / 3600)
        hours[line["step"]] = total
    return lambda line: hours[line["step"]]


def _points(run: RunCurves, field: str, x: Axis) -> tuple[list[float], list[Any]]:
    """Where a run has a field, and its values there."""
    place = _hours(run) if x == "hours" else lambda line: line["step"]
    lines = [line for line in run.lines if line.get(field) is not None]
    return [place(line) for line in lines], [line[field] for line in lines]


def _draw_reference(axes: Axes, panel: _Panel, x: Axis) -> None:
    assert panel.reference is not None
    scale = REFERENCE_CODEWORDS if panel.is_share else 1
    values = [getattr(point, panel.reference) / scale for point in REFERENCE]
    unit = REFERENCE_STEP_SECONDS / 3600 if x == "hours" else 1
    # The untrained model stands at the first step, and between it and the first figures nothing is published.
    places = [max(point.step, 1) * unit for point in REFERENCE]
    axes.plot(places[:2], values[:2], color=_REFERENCE_COLOR, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    axes.plot(places[1:], values[1:], color=_REFERENCE_COLOR, linewidth=3, zorder=1)


def _draw_run(axes: Axes, panel: _Panel, run: RunCurves, color: Any, x: Axis, has_each: bool) -> None:
    scale = run.codebook_size if panel.is_share else 1
    for curve in panel.curves:
        if has_each and curve.each is not None:
            places, values = _points(run, curve.each, x)
            for each in zip(*values, strict=True):
                axes.plot(places, [value / scale for value in each], color=color, linewidth=0.6, alpha=0.35, zorder=2)
        places, values = _points(run, curve.field, x)
        if values:
            axes.plot(
                places,
                [value / scale for value in values],
                curve.style,
                color=color,
                linewidth=1.4,
                # A single point has no line.
                marker="." if len(places) == 1 or curve.field.startswith("eval_") else None,
                markersize=4,
                zorder=3,
            )


def _label_styles(axes: Axes, panel: _Panel, runs: Sequence[RunCurves]) -> None:
    """Name the styles of a panel, where runs have several curves in it."""
    lines = import_extra("matplotlib.lines", "analysis")
    named = [curve for curve in panel.curves if curve.label is not None and _has(curve, runs)]
    if len(named) > 1:
        handles = [lines.Line2D([], [], color="0.25", linestyle=curve.style, label=curve.label) for curve in named]
        axes.legend(handles=handles, fontsize=6.5, frameon=False, loc="best", handlelength=2.2)


def _draw_bounds(axes: Axes, panel: _Panel, runs: Sequence[RunCurves]) -> None:
    for bound in sorted({run.bounds.get(panel.bound or "", 0.0) for run in runs} - {0.0}):
        axes.axhline(bound, color="0.35", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "collapse",
            (1, bound),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=6,
            color="0.35",
        )


def _set_scales(axes: Axes, panel: _Panel) -> None:
    """Logarithms of a decade at least, which is what has a label, and shares from 0 to 1."""
    no_labels = import_extra("matplotlib.ticker", "analysis").NullFormatter()
    axes.xaxis.set_minor_formatter(no_labels)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, high / 10), high)
    low, high = axes.get_ylim()
    if panel.is_share:
        axes.set_ylim(0, 1)
    elif panel.is_log:
        axes.yaxis.set_minor_formatter(no_labels)
        axes.set_ylim(min(low, high / 10), high)
    elif panel.reference is None:
        axes.set_ylim(bottom=0)


def run_figure(
    runs: Sequence[RunCurves], *, x: Axis = "step", title: str | None = None, width: float = 10.0
) -> Figure:
    """
    Draw the curves of runs: loss, perplexities, codewords in use, variation, phones, learning rate, gradient, speed.

    Perplexities and codewords in use are shares of V, so that runs with codebooks of other sizes compare. Behind stand
    the figures of the reference run (`REFERENCE`), and the bounds under which a run counts as collapsed. Held-out
    figures are dashed; of a single run each codebook has a thin line. What no run has is left out.

    Args:
        runs: As `read_run` gives them.
        x: "step": updates; "hours": hours of audio, where runs with steps of other sizes compare. On a scale of
            logarithms.
        title: Text above.
        width: Inches.

    Returns:
        The figure, to be saved with `figure.savefig("curves.png", dpi=150)`.

    Raises:
        ValueError: If there is no run, `x` is another, or `width` is not positive.
        ImportError: If matplotlib is not installed.
    """
    if not runs:
        raise ValueError("There is no run to draw. Give at least one.")
    if x not in ("step", "hours"):
        raise ValueError(f"x={x!r} is unknown. Choose step or hours.")
    check_width(width)
    panels = [panel for panel in _PANELS if any(_has(curve, runs) for curve in panel.curves)]
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = new_figure(width, width * (0.25 * num_rows + 0.06))
    colors = line_colors(len(runs))
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axes, panel in itertools.zip_longest(grid, panels):
        if panel is None:
            axes.remove()
            continue
        axes.set_xscale("log")
        if panel.is_log:
            axes.set_yscale("log")
        if panel.reference is not None:
            _draw_reference(axes, panel, x)
        for run, color in zip(runs, colors, strict=True):
            _draw_run(axes, panel, run, color, x, has_each=len(runs) == 1)
        _draw_bounds(axes, panel, runs)
        _label_styles(axes, panel, runs)
        _set_scales(axes, panel)
        axes.set_title(panel.title, fontsize=8)
        axes.set_xlabel("updates" if x == "step" else "hours of audio", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)
    _add_legend(figure, runs, colors, title)
    return figure


def _has(curve: _Curve, runs: Sequence[RunCurves]) -> bool:
    return any(line.get(curve.field) is not None for run in runs for line in run.lines)


def _add_legend(figure: Any, runs: Sequence[RunCurves], colors: Sequence[Any], title: str | None) -> None:
    lines = import_extra("matplotlib.lines", "analysis")

    def handles() -> Iterator[Any]:
        for run, color in zip(runs, colors, strict=True):
            yield lines.Line2D([], [], color=color, label=f"{run.name} ({run.codebook_size} codewords)")
        name = f"reference: DinoSR base, held-out LibriSpeech ({REFERENCE_CODEWORDS} codewords)"
        yield lines.Line2D([], [], color=_REFERENCE_COLOR, linewidth=3, label=name)

    figure.legend(
        handles=list(handles()),
        loc="outside upper center",
        ncols=min(3, len(runs) + 1),
        fontsize=7,
        title=title,
        frameon=False,
    )
