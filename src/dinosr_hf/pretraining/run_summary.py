"""The record of a pre-training run, `run.json`: begun with the run, completed at its end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import SAMPLING_RATE, MixedSource, SpeechSource, SpeechStream
from ..training.run_record import (
    METRICS,
    RECORD_NAME,
    RunRecord,
    describe_hardware,
    library_versions,
    time_now,
    write_record,
)
from .held_out import HeldOut
from .pretraining_arguments import DataArguments, PretrainingArguments


def _describe_data(data: DataArguments, source: SpeechSource | SpeechStream) -> list[dict[str, Any]]:
    sources: Sequence[Any] = source.sources if isinstance(source, MixedSource) else [source]
    described = []
    for number, (name, one) in enumerate(zip(data.data, sources, strict=True)):
        splits = data.data_split
        entry: dict[str, Any] = {"name": name, "split": splits[number if len(splits) > 1 else 0] if splits else None}
        if isinstance(one, SpeechSource):
            samples = sum(utterance.num_samples for utterance in one.utterances)
            entry |= {"hours": samples / SAMPLING_RATE / 3600, "utterances": len(one)}
        else:
            entry |= {"hours": None, "utterances": None}
        described.append(entry)
    return described


def begin_record(
    arguments: PretrainingArguments,
    source: SpeechSource | SpeechStream,
    *,
    num_processes: int,
    is_resumed: bool,
) -> RunRecord:
    """
    Write `run.json` into `output_dir`, of a run that is about to train.

    Args:
        arguments: Of the run.
        source: What it trains on.
        num_processes: How many there are.
        is_resumed: Whether the run goes on from a checkpoint; it then began when the record there says.
    """
    output_dir = Path(arguments.run.output_dir)
    started, before = time_now(), output_dir / RECORD_NAME
    if is_resumed and before.exists():
        started = json.loads(before.read_text(encoding="utf-8"))["started"]
    record = RunRecord(
        task="pretraining",
        arguments=arguments.to_dict(),
        base_model=arguments.run.base_model,
        data=_describe_data(arguments.data, source),
        steps=0,
        evaluation=[],
        versions=library_versions(),
        started=started,
        finished=None,
        hardware=describe_hardware(num_processes),
    )
    write_record(output_dir, record)
    return record


def _last_evaluation(arguments: PretrainingArguments, held_out: HeldOut) -> list[dict[str, Any]]:
    """The figures that the run wrote for its last step, if that could be evaluated."""
    data = arguments.data
    figures: dict[str, Any] = {}
    for line in (Path(arguments.run.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        if metrics["step"] == arguments.run.max_steps:
            figures |= {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}
    if not figures:
        return []
    split = "validation" if data.eval_data == "synthetic" else data.eval_split
    return [{"dataset": data.eval_data, "split": split, "num_utterances": held_out.num_utterances, **figures}]


def finish_record(arguments: PretrainingArguments, record: RunRecord, held_out: HeldOut | None) -> None:
    """
    Complete `run.json`, of a run that has done all its steps.

    Args:
        arguments: Of the run.
        record: As `begin_record` gave it.
        held_out: What the run was judged on, if anything.
    """
    evaluation = [] if held_out is None else _last_evaluation(arguments, held_out)
    finished = dataclasses.replace(record, steps=arguments.run.max_steps, evaluation=evaluation, finished=time_now())
    write_record(arguments.run.output_dir, finished)
