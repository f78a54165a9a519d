"""Training curves of pre-training runs, with the published ones of a full-size run behind them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from ..utils.command_line import check_choice
from ..utils.extras import import_extra
from ..utils.names import printable_name
from ..utils.text_files import load_yaml
from ._figures import add_panels, label_axes, legend_above, line_colors, new_figure, span_a_decade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ReferencePoint(NamedTuple):
    """Validation metrics of the reference run after so many updates; means over its 8 codebooks of 256 codewords."""

    step: int
    loss: float
    target_perplexity: float
    prediction_perplexity: float
    active_codewords: float


REFERENCE_CODEWORDS = 256
REFERENCE_STEP_SECONDS = 3800.0  # 16 x 3.8 million samples at 16 kHz
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
_BOUNDS = ("collapse_perplexity", "collapse_active", "collapse_variation")


class RunCurves(NamedTuple):
    """The metrics of a run."""

    name: str  # for the legend
    lines: Sequence[Mapping[str, Any]]  # lines of its metrics.jsonl, by step
    codebook_size: int
    bounds: Mapping[str, float]  # those of `_BOUNDS` that the run's arguments have


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` without damaged ones, such as half a line from when the run was killed."""
    lines = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            metrics = json.loads(line)
            if isinstance(metrics, dict) and type(metrics.get("step")) is int:
                lines.append(metrics)
    return lines


def read_run(folder: str | Path) -> RunCurves:
    """
    Read the metrics that a run has written so far to its `output_dir`: `metrics.jsonl` and `arguments.yaml`.

    Raises `ValueError` if a file is missing or malformed.
    """
    folder = Path(folder)
    metrics, arguments_file = folder / "metrics.jsonl", folder / "arguments.yaml"
    for path in (metrics, arguments_file):
        if not path.is_file():
            raise ValueError(f"{path} does not exist. Give the output_dir of a run that has started.")
    if not (lines := read_metrics(metrics)):
        raise ValueError(
            f"{metrics} has no line of metrics, or none yet. Give the output_dir of a run that has begun."
        )
    arguments = load_yaml(arguments_file)
    if not isinstance(arguments, dict) or "codebook_size" not in arguments:
        raise ValueError(f"{arguments_file} has no codebook_size. Give the output_dir of a pre-training run.")
    bounds = {name: value for name, value in arguments.items() if name in _BOUNDS}
    return RunCurves(printable_name(folder.resolve().name), lines, arguments["codebook_size"], bounds)


def read_runs(folders: Sequence[str | Path]) -> list[RunCurves]:
    """Read runs, as `read_run` does; each is named by as many folders of its path as tell them apart."""
    paths = [Path(folder).resolve() for folder in dict.fromkeys(folders)]
    runs = [read_run(path) for path in paths]
    for num_parts in range(2, max(len(path.parts) for path in paths) + 1):
        if len({run.name for run in runs}) == len(set(paths)):
            break
        names = (printable_name("/".join(path.parts[-num_parts:])) for path in paths)
        runs = [run._replace(name=name) for run, name in zip(runs, names, strict=True)]
    return runs


class _Curve(NamedTuple):
    field: str  # key of the metrics
    per_codebook: str | None = None  # key of the list with a value for each codebook
    style: str = "-"
    label: str | None = None  # where curves share a panel


class _Panel(NamedTuple):
    title: str
    curves: Sequence[_Curve]
    reference: str | None = None  # field of `ReferencePoint`
    bound: str | None = None
    is_share: bool = False  # of the codewords
    is_log: bool = False


def _share_panel(title: str, field: str, per_codebook: str, bound: str = "collapse_perplexity") -> _Panel:
    curves = (_Curve(field, per_codebook), _Curve(f"eval_{field}", style="--"))
    return _Panel(title, curves, reference=field, bound=bound, is_share=True)


_LOSS = (_Curve("loss", "codebook_losses", label="training"), _Curve("eval_loss", style="--", label="held out"))
_VARIATION = (
    _Curve("target_variation", "target_variations", label="teacher"),
    _Curve("feature_variation", style=":", label="convolutions"),
)
_PHONES = (
    _Curve("eval_pnmi", "eval_pnmis", label="PNMI"),
    _Curve("eval_phone_purity", style="--", label="phone purity"),
)
_PANELS = (
    _Panel("loss (nats)", _LOSS, reference="loss"),
    _share_panel("target perplexity, share of the codewords", "target_perplexity", "target_perplexities"),
    _share_panel("prediction perplexity, share of the codewords", "prediction_perplexity", "prediction_perplexities"),
    _share_panel("codewords in use, share", "active_codewords", "codebook_active_codewords", "collapse_active"),
    _Panel("variation over time, share of the energy", _VARIATION, bound="collapse_variation", is_log=True),
    _Panel("phones in the codes, held out", _PHONES),
    _Panel("learning rate", (_Curve("learning_rate"),)),
    _Panel("gradient norm", (_Curve("grad_norm"),), is_log=True),
    _Panel("speed, hours of audio per hour", (_Curve("audio_seconds_per_second"),)),
)
_REFERENCE_COLOR = "0.72"


def _has(curve: _Curve, runs: Sequence[RunCurves]) -> bool:
    return any(line.get(curve.field) is not None for run in runs for line in run.lines)


def _points(run: RunCurves, field: str, x: Axis) -> tuple[list[float], list[Any]]:
    """Steps, or hours of audio, of the lines that have a field, and its values."""
    positions, values, hours = [], [], 0.0
    for line in run.lines:
        # Lines of evaluations have no time of their own.
        hours = line.get("audio_hours", hours + line.get("seconds", 0.0) / 3600)
        if line.get(field) is not None:
            positions.append(hours if x == "hours" else line["step"])
            values.append(line[field])
    return positions, values


def _draw_reference(axes: Axes, panel: _Panel, x: Axis) -> None:
    if panel.reference is None:
        return
    scale = REFERENCE_CODEWORDS if panel.is_share else 1
    values = [getattr(point, panel.reference) / scale for point in REFERENCE]
    unit = REFERENCE_STEP_SECONDS / 3600 if x == "hours" else 1
    # The untrained model is drawn at the first step; nothing is published between it and the first metrics.
    positions = [max(point.step, 1) * unit for point in REFERENCE]
    axes.plot(positions[:2], values[:2], color=_REFERENCE_COLOR, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    axes.plot(positions[1:], values[1:], color=_REFERENCE_COLOR, linewidth=3, zorder=1)


def _draw_run(axes: Axes, panel: _Panel, run: RunCurves, color: Any, x: Axis, with_codebooks: bool) -> None:
    scale = run.codebook_size if panel.is_share else 1
    for curve in panel.curves:
        if with_codebooks and curve.per_codebook is not None:
            positions, values = _points(run, curve.per_codebook, x)
            if values:
                axes.plot(positions, np.array(values) / scale, color=color, linewidth=0.6, alpha=0.35, zorder=2)
        positions, values = _points(run, curve.field, x)
        if values:
            # A single point has no line.
            marker = "." if len(positions) == 1 or curve.field.startswith("eval_") else None
            style: dict[str, Any] = {"color": color, "linewidth": 1.4, "marker": marker, "markersize": 4, "zorder": 3}
            axes.plot(positions, np.array(values) / scale, curve.style, **style)


def _draw_bounds(axes: Axes, panel: _Panel, runs: Sequence[RunCurves]) -> None:
    for bound in sorted({run.bounds.get(panel.bound or "", 0.0) for run in runs} - {0.0}):
        axes.axhline(bound, color="0.35", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        place: dict[str, Any] = {
            "xycoords": axes.get_yaxis_transform(),
            "xytext": (-2, 2),
            "textcoords": "offset points",
        }
        axes.annotate("collapse", (1, bound), **place, ha="right", fontsize=6, color="0.35")


def _label_styles(axes: Axes, panel: _Panel, runs: Sequence[RunCurves]) -> None:
    """Explain the line styles of a panel with several curves of a run."""
    lines = import_extra("matplotlib.lines", "analysis")
    named = [curve for curve in panel.curves if curve.label is not None and _has(curve, runs)]
    if len(named) > 1:
        handles = [lines.Line2D([], [], color="0.25", linestyle=curve.style, label=curve.label) for curve in named]
        axes.legend(handles=handles, fontsize=6.5, frameon=False, loc="best", handlelength=2.2)


def run_figure(
    runs: Sequence[RunCurves], *, x: Axis = "step", title: str | None = None, width: float = 10.0
) -> Figure:
    """
    Plot the curves of runs: loss, perplexities, codewords in use, variation, phones, learning rate, gradient, speed.

    Perplexities and codewords in use are shares of the codebook size, so that runs of different sizes compare. Behind
    them are the curves of the reference run (`REFERENCE`) and the bounds below which a run counts as collapsed.
    Held-out metrics are dashed; a single run has a thin line for each codebook. Panels that no run has data for are
    left out. The logarithmic axis `x` is "step", updates, or "hours", hours of audio, to compare runs with steps of
    different sizes. Raises `ValueError` if there is no run, `x` is unknown, or `width` is not positive.
    """
    if not runs:
        raise ValueError("There is no run to draw. Give at least one.")
    check_choice("x", x, get_args(Axis))
    panels = [panel for panel in _PANELS if any(_has(curve, runs) for curve in panel.curves)]
    num_columns = min(3, len(panels))
    figure = new_figure(width, width * (0.25 * math.ceil(len(panels) / num_columns) + 0.06))
    colors = line_colors(len(runs))
    for panel, axes in zip(panels, add_panels(figure, len(panels), num_columns), strict=True):
        axes.set(xscale="log", yscale="log" if panel.is_log else "linear")
        _draw_reference(axes, panel, x)
        for run, color in zip(runs, colors, strict=True):
            _draw_run(axes, panel, run, color, x, with_codebooks=len(runs) == 1)
        _draw_bounds(axes, panel, runs)
        _label_styles(axes, panel, runs)
        span_a_decade(axes, "x")
        if panel.is_log:
            span_a_decade(axes, "y")
        elif panel.is_share:
            axes.set_ylim(0, 1)
        elif panel.reference is None:
            axes.set_ylim(bottom=0)
        axes.set_title(panel.title, fontsize=8)
        label_axes(axes, "updates" if x == "step" else "hours of audio", grid=True)
    lines = [
        {"label": f"{run.name} ({run.codebook_size} codewords)", "color": color}
        for run, color in zip(runs, colors, strict=True)
    ]
    reference = f"reference: DinoSR base, held-out LibriSpeech ({REFERENCE_CODEWORDS} codewords)"
    legend_above(figure, [*lines, {"label": reference, "color": _REFERENCE_COLOR, "linewidth": 3}], width, title)
    return figure
