"""What a judgement leaves: its table for readers, for spreadsheets and for programs, and a picture of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    folder: str | os.PathLike,
    name: str,
    *,
    markdown: str,
    csv: str,
    rows: Sequence[Mapping[str, Any]],
    figure: Figure | None = None,
) -> str:
    """
    Write `name.md`, `.csv` and `.json`, and with a figure `name.png` and `.pdf`.

    Args:
        folder: Made if it does not exist.
        name: Of the files.
        markdown: The table for readers.
        csv: The same for spreadsheets.
        rows: The same, to become JSON.
        figure: Of the same.

    Returns:
        A sentence that says where they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    json_text = json.dumps([dict(row) for row in rows], indent=2) + "\n"
    for suffix, text in {"md": markdown, "csv": csv, "json": json_text}.items():
        (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    sentence = f"The table is {folder / name}.md, .csv and .json"
    if figure is None:
        return f"{sentence}."
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=200)
    return f"{sentence}, the picture {name}.png and {name}.pdf."
