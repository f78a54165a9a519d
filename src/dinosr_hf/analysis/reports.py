"""Reports of an evaluation: a table for readers, for spreadsheets and for programs, and a plot over layers."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.files import write_atomically
from ..utils.tables import csv_table, markdown_table
from ._figures import save_figure
from .plots.lines import LayerCurves, layer_curves_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def write_report(
    folder: str | os.PathLike, name: str, *, markdown: str, csv: str, rows: Sequence[Row], figure: Figure | None = None
) -> str:
    """
    Write a table to `name.md`, `.csv` and `.json` in a folder, and a figure, if given, to `name.png` and `.pdf`.

    The folder is created if needed. `rows` are for JSON, where nan is null. Returns a sentence that names the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = json.loads(json.dumps(rows), parse_constant=lambda constant: None)
    for suffix, text in {"md": markdown, "csv": csv, "json": json.dumps(records, indent=2) + "\n"}.items():
        write_atomically(folder / f"{name}.{suffix}", text)
    sentence = f"The table is {folder / name}.md, .csv and .json"
    if figure is None:
        return f"{sentence}."
    for suffix in ("png", "pdf"):
        save_figure(figure, folder / f"{name}.{suffix}", dpi=200)
    return f"{sentence}, the picture {name}.png and {name}.pdf."


class Metric(NamedTuple):
    """A column of numbers."""

    heading: str
    digits: int = 3  # in Markdown
    is_plotted: bool = True
    scale: float = 1  # in Markdown and plots; 100: percent


class LayerReport(NamedTuple):
    """
    Columns of a report on layers.

    A row evaluates one layer. It has the value of each column by its name and, under "intervals", (low, high) of
    metrics that have an interval; further keys are written to JSON only.
    """

    names: Mapping[str, str]  # columns that say what was evaluated, "layer" among them -> their headings
    metrics: Mapping[str, Metric]

    def _cell(self, row: Row, name: str) -> str:
        metric = self.metrics[name]
        numbers = (row[name], *row.get("intervals", {}).get(name, ()))
        value, *ends = (f"{metric.scale * number:.{metric.digits}f}" for number in numbers)
        return f"{value} ({' to '.join(ends)})" if ends else value

    def markdown(self, rows: Sequence[Row]) -> str:
        """Format rows as Markdown, with intervals in brackets."""
        headings = [*self.names.values(), *(metric.heading for metric in self.metrics.values())]
        cells = (
            [*(str(row[name]) for name in self.names), *(self._cell(row, name) for name in self.metrics)]
            for row in rows
        )
        return markdown_table(headings, cells)

    def csv(self, rows: Sequence[Row]) -> str:
        """Format rows as CSV; where rows have intervals, with two columns for the ends of each metric's."""
        columns = [*self.names, *self.metrics]
        cells = [[row[name] for name in columns] for row in rows]
        if any("intervals" in row for row in rows):
            columns += [f"{name}_{end}" for name in self.metrics for end in ("low", "high")]
            for own, row in zip(cells, rows, strict=True):
                own += [end for name in self.metrics for end in row["intervals"].get(name, ("", ""))]
        return csv_table(columns, cells)

    def curves(self, rows: Sequence[Row]) -> list[LayerCurves]:
        """Collect a curve for each model and kind of row, with the intervals that all of its layers have."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[", ".join(str(row[name]) for name in self.names if name != "layer")].append(row)
        plotted = {name: metric for name, metric in self.metrics.items() if metric.is_plotted}
        curves = []
        for group, own in groups.items():
            own.sort(key=itemgetter("layer"))
            values = {one.heading: [one.scale * row[name] for row in own] for name, one in plotted.items()}
            intervals = [row.get("intervals", {}) for row in own]
            bands = {
                one.heading: [(one.scale * each[name][0], one.scale * each[name][1]) for each in intervals]
                for name, one in plotted.items()
                if all(name in each for each in intervals)
            }
            curves.append(LayerCurves(group, [row["layer"] for row in own], values, bands))
        return curves

    def write(self, folder: str | os.PathLike, name: str, rows: Sequence[Row]) -> str:
        """Write tables and plot of rows, as `write_report` does."""
        figure = layer_curves_figure(self.curves(rows))
        return write_report(folder, name, markdown=self.markdown(rows), csv=self.csv(rows), rows=rows, figure=figure)
