"""Files of a run's folder besides models and checkpoints: `metrics.jsonl`, `finished.json`, `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import SAMPLING_RATE, MixedSource, SpeechSource, SpeechStream
from ..training import run_record
from ..training.run_record import RunRecord
from ..utils.command_line import argument_errors
from ..utils.files import write_atomically
from ..utils.text_files import read_json
from .held_out import HeldOut
from .pretraining_arguments import DataArguments, PretrainingArguments, value_for

METRICS_FILE = "metrics.jsonl"
FINISHED_FILE = "finished.json"


def mark_finished(folder: str | os.PathLike, step: int) -> None:
    """Write down which step the model of a finished run is from."""
    write_atomically(Path(folder, FINISHED_FILE), json.dumps({"step": step}))


def finished_step(folder: str | os.PathLike) -> int:
    """Return the step that `mark_finished` wrote down, or 0 if there is no model of a finished run."""
    path = Path(folder, FINISHED_FILE)
    if not path.exists():
        return 0
    with argument_errors(f"{path} is damaged. Remove it to train on: ", (ValueError, KeyError, TypeError)):
        step = int(read_json(path)["step"])
    return step


def append_metrics(folder: str | os.PathLike, metrics: Mapping[str, Any]) -> None:
    """Append a line to `metrics.jsonl`."""
    with open(Path(folder, METRICS_FILE), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line, from when the disk was full
                file.write(b"\n")
        file.write(json.dumps(metrics).encode() + b"\n")


def truncate_metrics(folder: str | os.PathLike, last_step: int) -> None:
    """Drop the lines of `metrics.jsonl` after a step; a run that resumes from there writes them again."""
    path = Path(folder, METRICS_FILE)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, from when the run was killed
            kept += [line] if json.loads(line)["step"] <= last_step else []
    write_atomically(path, "".join(kept))


def _describe_data(data: DataArguments, source: SpeechSource | SpeechStream) -> list[dict[str, Any]]:
    sources: Sequence[Any] = source.sources if isinstance(source, MixedSource) else [source]
    described = []
    for number, (name, one) in enumerate(zip(data.data, sources, strict=True)):
        hours = num_utterances = None
        if isinstance(one, SpeechSource):
            hours = sum(utterance.num_samples for utterance in one.utterances) / SAMPLING_RATE / 3600
            num_utterances = len(one)
        split = value_for(data.data_split, number)
        described.append({"name": name, "split": split, "hours": hours, "utterances": num_utterances})
    return described


def begin_record(
    arguments: PretrainingArguments, source: SpeechSource | SpeechStream, *, num_processes: int, is_resumed: bool
) -> RunRecord:
    """Write `run.json` of a run that is about to train; a resumed run keeps its start time."""
    output_dir = Path(arguments.run.output_dir)
    started, before = run_record.time_now(), output_dir / run_record.RECORD_NAME
    if is_resumed and before.exists():
        with argument_errors(
            f"{before} is damaged. Remove it to resume without it: ", (ValueError, KeyError, TypeError)
        ):
            started = read_json(before)["started"]
    record = RunRecord(
        task="pretraining",
        arguments=arguments.to_dict(),
        base_model=arguments.run.base_model,
        data=_describe_data(arguments.data, source),
        steps=0,
        evaluation=[],
        versions=run_record.library_versions(),
        started=started,
        finished=None,
        hardware=run_record.describe_hardware(num_processes),
    )
    run_record.write_record(output_dir, record)
    return record


def finish_record(arguments: PretrainingArguments, record: RunRecord, held_out: HeldOut | None) -> None:
    """Complete the record from `begin_record` in `run.json`, for a run that has done all its steps."""
    output_dir, data, num_steps = Path(arguments.run.output_dir), arguments.data, arguments.run.max_steps
    evaluation: list[dict[str, Any]] = []
    if held_out is not None:
        lines = map(json.loads, (output_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines())
        last = {name: value for line in lines if line["step"] == num_steps for name, value in line.items()}
        figures = {name: last[f"eval_{name}"] for name in run_record.METRICS if f"eval_{name}" in last}
        split = "validation" if data.eval_data == "synthetic" else data.eval_split
        about = {"dataset": data.eval_data, "split": split, "num_utterances": held_out.num_utterances}
        evaluation = [about | figures] if figures else []  # none if the evaluation failed
    finished = run_record.time_now()
    record = dataclasses.replace(record, steps=num_steps, evaluation=evaluation, finished=finished)
    run_record.write_record(output_dir, record)
