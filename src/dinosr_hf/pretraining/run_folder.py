"""Files of a run's folder besides models and checkpoints: `metrics.jsonl`, `finished.json`, `run.json`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from ..analysis.curves import read_metrics
from ..data import MixedSource, SpeechSource, SpeechStream
from ..training import run_record
from ..training.run_record import RunRecord
from ..training.sealed_files import read_sealed, seal
from ..utils.files import flush_to_disk, write_atomically
from ..utils.names import one_line
from .held_out import HeldOut
from .pretraining_arguments import DataArguments, PretrainingArguments, value_for

logger = logging.getLogger(__name__)

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"
FINISHED_FILE = "finished.json"


def mark_finished(folder: str | os.PathLike, step: int) -> None:
    """Write down which step the model of a finished run is from."""
    write_atomically(Path(folder, FINISHED_FILE), seal({"step": step}))


def finished_step(folder: str | os.PathLike) -> int:
    """Return the step that `mark_finished` wrote down, or 0 if there is no model of a finished run."""
    path = Path(folder, FINISHED_FILE)
    try:
        return int(read_sealed(path).get("step", 0)) if path.exists() else 0
    except (ValueError, OSError) as error:
        logger.warning("%s is damaged and counts as missing: %s.", path, one_line(error))
        return 0


def recorded_run(folder: str | os.PathLike) -> RunRecord | None:
    """Return the record of a pre-training, finished or not; None if there is none or `run.json` is damaged."""
    record = run_record.read_record_if_any(folder)
    return record if record is not None and record.task == "pretraining" else None


def append_metrics(folder: str | os.PathLike, metrics: Mapping[str, Any]) -> None:
    """Append a line to `metrics.jsonl`, and flush it to the disk."""
    with open(Path(folder, METRICS_FILE), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line, from when the disk was full
                file.write(b"\n")
        file.write(json.dumps(metrics).encode() + b"\n")
    flush_to_disk(file.name)


def read_evaluations(folder: str | os.PathLike) -> dict[int, dict[str, Any]]:
    """Return the figures of the evaluations in `metrics.jsonl` that have a loss, by step."""
    path = Path(folder, METRICS_FILE)
    return {
        line["step"]: {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        for line in (read_metrics(path) if path.exists() else ())
        if isinstance(line.get("eval_loss"), float)
    }


def truncate_metrics(folder: str | os.PathLike, last_step: int, *, is_last: bool) -> None:
    """
    Drop the lines of `metrics.jsonl` after a step, which a run that resumes from there writes again.

    `is_last`: so does the evaluation after the last step, which comes after its checkpoint.
    """
    path = Path(folder, METRICS_FILE)
    if path.exists():
        kept = [
            line
            for line in read_metrics(path)
            if line["step"] < last_step
            or (line["step"] == last_step and not (is_last and any(name.startswith("eval_") for name in line)))
        ]
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))


def _describe_data(data: DataArguments, source: SpeechSource | SpeechStream) -> list[dict[str, Any]]:
    sources: Sequence[Any] = source.sources if isinstance(source, MixedSource) else [source]
    described = []
    for number, (name, one) in enumerate(zip(data.data, sources, strict=True)):
        hours = num_utterances = None
        if isinstance(one, SpeechSource):
            hours, num_utterances = one.seconds / 3600, len(one)
        split = value_for(data.data_split, number)
        described.append({"name": name, "split": split, "hours": hours, "utterances": num_utterances})
    return described


def begin_record(
    arguments: PretrainingArguments, source: SpeechSource | SpeechStream, accelerator: Accelerator, *, is_resumed: bool
) -> RunRecord:
    """Write `run.json` of a run that is about to train; a resumed run keeps its start time."""
    output_dir = Path(arguments.run.output_dir)
    before = recorded_run(output_dir) if is_resumed else None
    started = run_record.time_now() if before is None else before.started
    record = RunRecord(
        task="pretraining",
        arguments=arguments.to_dict(),
        base_model=arguments.run.base_model,
        data=_describe_data(arguments.data, source),
        started=started,
        hardware=run_record.describe_hardware(accelerator.device, accelerator.num_processes),
    )
    run_record.write_record(output_dir, record)
    return record


def finish_record(
    arguments: PretrainingArguments,
    record: RunRecord,
    num_steps: int,
    held_out: HeldOut | None,
    evaluated: Mapping[str, Any],
) -> None:
    """Complete the record from `begin_record` in `run.json`, with the figures of the last evaluation."""
    output_dir, data = Path(arguments.run.output_dir), arguments.data
    evaluation: list[dict[str, Any]] = []
    if held_out is not None:
        figures = {name: evaluated[name] for name in run_record.METRICS if name in evaluated}
        split = "validation" if data.eval_data == "synthetic" else data.eval_split
        name = data.eval_data
        if name is None:  # a part of the data
            name, split = data.data[0], f"{data.eval_share:.0%} held out"
        about = {"dataset": name, "split": split, "num_utterances": held_out.num_utterances}
        evaluation = [about | figures] if figures else []  # none if the evaluation failed
    finished = run_record.time_now()
    record = dataclasses.replace(record, steps=num_steps, evaluation=evaluation, finished=finished)
    run_record.write_record(output_dir, record)
