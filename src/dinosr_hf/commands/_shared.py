"""What several commands have in common: flags, dry runs, and a progress bar in seconds of audio."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from ..data import SpeechSource, open_recordings
from ..data.output_folder import describe_recordings
from ..model.configuration_dinosr import DinoSRConfig
from ..training.signals import RunInterrupted
from ..utils.command_line import Parser, command, program
from ..utils.files import claim_output_file
from ..utils.model_folder import DTYPES
from ..utils.names import one_line

PlanRow = tuple[str, str]  # a name, and what a dry run says of it


def add_dataset_options(parser: Parser) -> None:
    """Add the flags of `dataset_options`."""
    parser.add_argument("--split", help="split of the data, if it has several")
    parser.add_argument("--data_config", help="configuration of a dataset, if it has several")
    text = "column of a dataset with the audio, or of a table with its paths (%(default)s, or another usual name)"
    parser.add_argument("--audio_column", default="audio", help=text)


def dataset_options(options: argparse.Namespace, name: str | None = None) -> dict[str, Any]:
    """Return the arguments of `open_recordings` that are in options; --data_config is for --data, or data so named."""
    config_name = options.data_config if name is None or name == options.data else None
    return {"split": options.split, "config_name": config_name, "audio_column": options.audio_column}


def add_inputs(parser: Parser) -> None:
    """Add the flags of `open_inputs`."""
    text = "audio files and folders; or one manifest, archive or dataset"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=text)
    add_dataset_options(parser)


def add_windows(parser: Parser) -> None:
    """Add the flags of `windows_of`."""
    add = parser.add_argument
    add("--batch_seconds", type=float, default=120.0, help="seconds of audio per batch (%(default)s)")
    add("--window_seconds", type=float, default=30.0, help="seconds of audio the model sees at once (%(default)s)")
    context = "extra audio on each side of a window, in seconds (%(default)s)"
    add("--context_seconds", type=float, default=5.0, help=context)


def windows_of(options: argparse.Namespace) -> dict[str, float]:
    """Return the arguments of `WindowedInference` that are in options."""
    return {name: getattr(options, name) for name in ("batch_seconds", "window_seconds", "context_seconds")}


def open_inputs(options: argparse.Namespace) -> SpeechSource:
    """Open the inputs, by the flags of `add_inputs`."""
    return open_recordings(options.inputs, **dataset_options(options))


def add_device(parser: Parser, what: str = "model") -> None:
    """Add --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"device of the {what} (%(default)s)")


def add_dtype(parser: Parser, what: str = "model") -> None:
    """Add --dtype."""
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help=f"precision of the {what} (%(default)s)"
    )


def add_dry_run(parser: Parser) -> None:
    """Add --dry_run, for commands that print their plan with `print_plan`."""
    text = "open models and data, say what would be computed, and end"
    parser.add_argument("--dry_run", action="store_true", help=text)


def claim_output(path: str | Path, options: argparse.Namespace) -> Path:
    """Return the path of a command's output as `claim_output_file` does; a dry run leaves no new folder behind."""
    missing = [folder for folder in Path(path).parents if not os.path.exists(folder)]
    try:
        return claim_output_file(path)
    finally:
        for folder in missing if options.dry_run else []:
            with suppress(OSError):  # not created, or no longer empty
                folder.rmdir()


def count_frames(recordings: SpeechSource, config: DinoSRConfig) -> int:
    """Return the number of frames of all recordings together."""
    return sum(int(config.num_frames(num_samples)) for _, num_samples in recordings.utterances)


def describe_labelled(recordings: SpeechSource, num_without: int) -> str:
    """Say how many recordings are to do, how long they are, what is left out, and how many have no labels."""
    return f"{describe_recordings(recordings)} Without labels: {num_without:,} recordings."


def print_plan(rows: Iterable[PlanRow]) -> None:
    """Print the plan of a dry run, one row a line."""
    print(*(f"{name:11} {text}" for name, text in rows), "Nothing was computed.", sep="\n")


@contextmanager
def resumable_command(
    script: str, *user_errors: type[Exception], after: str = "The same command resumes from there."
) -> Iterator[None]:
    """
    Run the body of a script as `command` does; if a signal ends the run, say what comes `after` that, and exit.

    If the memory of a GPU is too small, say what to change.
    """
    try:
        with command(script, *user_errors):
            yield
    except torch.OutOfMemoryError as error:
        advice = "Lower --micro_seconds, which changes results by rounding only, or set --gradient_checkpointing true."
        sys.exit(f"{program(script)}: {one_line(error)[:200]}. {advice}")
    except RunInterrupted as interruption:
        print(f"{interruption} {after}", file=sys.stderr)
        sys.exit(interruption.exit_code)


class AudioBar:
    """A progress bar in seconds of audio, with the speed of all processes if they are equally fast."""

    def __init__(self, total: float, *, num_processes: int = 1, is_shown: bool = True) -> None:
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=total, bar_format=form, disable=None if is_shown else True)
        self._since, self._num_processes, self.seconds = time.perf_counter(), num_processes, 0.0

    def __enter__(self) -> AudioBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __str__(self) -> str:
        return f"{self.seconds:,.1f} s of audio, {self._speed:,.1f} times real time"

    @property
    def _speed(self) -> float:
        return self.seconds / (time.perf_counter() - self._since) * self._num_processes

    def advance(self, seconds: float) -> None:
        """Count seconds of audio."""
        self.seconds += seconds
        self._bar.set_postfix_str(f"{self._speed:,.1f} times real time", refresh=False)
        self._bar.update(seconds)
