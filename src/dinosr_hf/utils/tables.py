"""Tables, for readers and for programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; pipes in cells are escaped."""
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in [headings, *rows])
    head, *lines = (f"| {' | '.join(cells)} |\n" for cells in escaped)
    return "".join([head, "|---" * len(headings) + "|\n", *lines])


def csv_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[Any]],
    delimiter: str = ",",
    quoting: Literal[0, 2] = csv.QUOTE_MINIMAL,
) -> str:
    """Format a CSV table."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=quoting).writerows([headings, *rows])
    return text.getvalue()
