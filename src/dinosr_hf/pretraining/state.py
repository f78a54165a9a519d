"""What a run leaves on disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from ..model.modeling_dinosr import DinoSRForPreTraining
from ..utils.model_folder import save_folder


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def save_model(model: DinoSRForPreTraining, folder: str | os.PathLike) -> Path:
    """
    Write a folder that `from_pretrained` opens, with no progress bar: there is one already, that of the run.

    Args:
        model: What to save, teacher and codebooks included.
        folder: As for `save_folder`.

    Returns:
        The folder.
    """
    with _without_progress_bars():
        return save_folder(model, folder)


def mark_finished(folder: str | os.PathLike, step: int) -> None:
    """Note beside the model of a finished run which step it is of."""
    (Path(folder) / "finished.json").write_text(json.dumps({"step": step}), encoding="utf-8")


def finished_step(folder: str | os.PathLike) -> int:
    """The step that `mark_finished` noted; 0 if there is no model of a finished run."""
    path = Path(folder) / "finished.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.exists() else 0


def append_metrics(folder: str | os.PathLike, metrics: Mapping[str, Any]) -> None:
    """Add a line to the run's `metrics.jsonl`."""
    with open(Path(folder) / "metrics.jsonl", "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line, of a disk that was full
                file.write(b"\n")
        file.write(json.dumps(metrics).encode() + b"\n")


def cut_metrics(folder: str | os.PathLike, last_step: int) -> None:
    """Drop the lines of `metrics.jsonl` after a step, which a run that goes on from there will write again."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except ValueError:  # half a line: the run was killed while it wrote it
            continue
        if is_kept:
            kept.append(line)
    aside = path.with_suffix(".unfinished")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
