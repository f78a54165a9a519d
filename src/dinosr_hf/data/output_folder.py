"""Folders of results, made of recordings one by one, that a later run continues if it is the same run."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from filelock import AcquireReturnProxy

from ..utils.files import TEMPORARY_PREFIX, lock_folder, remove, write_atomically
from ..utils.text_files import read_json
from .audio import SAMPLING_RATE
from .excerpts import excerpt_of, is_alike
from .sources import SpeechSource

_EXCERPTS_OF_EACH_KIND = 16


class _State(NamedTuple):
    """What a run wrote: its settings, the number of samples of each recording, and excerpts of some."""

    settings: dict[str, Any]
    num_samples: dict[str, int]
    excerpts: dict[str, list[float]]


def _read_state(path: Path) -> _State | None:
    """Read a state; None if there is none, or it is damaged."""
    try:
        state = _State(**read_json(path))
        np.array([*state.excerpts.values()], dtype=np.float64).reshape(len(state.excerpts), -1)
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
    is_whole = isinstance(state.settings, dict) and isinstance(state.num_samples, dict)
    return state if is_whole and all(type(number) is int for number in state.num_samples.values()) else None


def describe_recordings(recordings: SpeechSource, done: Container[str] = ()) -> str:
    """Say how many recordings are to do and how long they are, and which cannot be read."""
    to_do = [num_samples for name, num_samples in recordings.utterances if name not in done]
    skipped = {reason: names for reason, names in recordings.skipped.items() if reason != "hidden"}
    found = ", ".join(f"{len(names):,} {reason} (such as {names[0]})" for reason, names in sorted(skipped.items()))
    left_out = f" Left out: {found}." if found else ""
    minutes = sum(to_do) / SAMPLING_RATE / 60
    return f"To do: {len(to_do):,} recordings, {minutes:,.1f} minutes of audio.{left_out}"


class OutputFolder(ABC):
    """
    A folder of results of recordings that a later run continues, if its model, settings and recordings are the same.

    `open` it in the main process before any other process uses it. A file in it has the settings, the lengths of the
    recordings, and samples of some of them. There may be more recordings than before.

    Args:
        folder: Path of the folder; created if it does not exist.
        recordings: Recordings of this run.
        settings: Values that the results depend on, of types that JSON has.
        results: Name of the results in messages, such as "units".
        advice: Advice of the error about a folder that cannot be continued.
        state_name: Name of the file.
        process: Index of this process; 0 is the main process.
    """

    def __init__(
        self,
        folder: str | Path,
        recordings: SpeechSource,
        settings: Mapping[str, Any],
        *,
        results: str,
        advice: str = "Give another folder.",
        state_name: str = "settings.json",
        process: int = 0,
    ) -> None:
        self.folder, self.recordings = Path(folder), recordings
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read
        self._results, self._advice, self._state_name, self._process = results, advice, state_name, process
        self._lock: AcquireReturnProxy | None = None

    @abstractmethod
    def _done(self) -> Iterable[str]:
        """Return the ids of the recordings that have results."""

    def open(self) -> Self:
        """
        Lock the folder, and in the main process check that this run can continue it.

        Raises `ValueError` if another run uses it, or its results are of another model, other settings or recordings.
        """
        if self._lock is None:
            self._lock = lock_folder(self.folder, self._process)
            try:
                if self._process == 0:
                    self._begin()
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _complete(self) -> Iterable[str]:
        """Return the ids of the recordings that lack nothing."""
        return self._done()

    def _previous(self) -> tuple[list[str], _State]:
        """Return what is done, and the state of the run that did it. Raises `ValueError` if this one cannot go on."""
        done, before = [*self._done()], _read_state(self.folder / self._state_name)
        if before is None:
            before = _State(self.settings, {}, {})
        self._check_settings(before.settings)
        self._check_lengths(done, before.num_samples)
        return done, before

    def plan(self) -> str:
        """Say what is to do, and what is done already. Writes nothing; raises `ValueError` as `open`."""
        done, _ = self._previous()
        complete = {*self._complete()}.intersection(done)
        kept = f" ({len(complete):,} are there already)" if complete else ""
        return f"{describe_recordings(self.recordings, complete)} Their {self._results} go to {self.folder}{kept}."

    def _begin(self) -> None:
        file = self.folder / self._state_name
        done, before = self._previous()
        now = self._excerpts(before.excerpts)
        for name in done:
            if name in before.excerpts and not is_alike(before.excerpts[name], now.get(name)):
                self._refuse(f"{name} is another recording now, of the same length as the one before")
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            remove(leftover)
        state = _State(
            self.settings,
            {**before.num_samples, **dict(self.recordings.utterances)},
            {**before.excerpts, **{name: excerpt for name, excerpt in now.items() if excerpt is not None}},
        )
        write_atomically(file, json.dumps(state._asdict()) + "\n")

    def _refuse(self, problem: str) -> None:
        raise ValueError(f"{self.folder} has {self._results} that this run cannot continue: {problem}. {self._advice}")

    def _check_settings(self, before: dict[str, Any]) -> None:
        for name in {**before, **self.settings}:
            if before.get(name) != self.settings.get(name):
                self._refuse(f"they have {name}={before.get(name)!r}, and it has {name}={self.settings.get(name)!r}")

    def _check_lengths(self, done: Iterable[str], before: Mapping[str, int]) -> None:
        now, left_out = dict(self.recordings.utterances), self.recordings.left_out
        for name in done:
            if name not in before:
                self._refuse(f"{self._state_name} does not say how those of {name} were made, or is damaged")
            if name not in now and name not in left_out:
                problem = f"{name} is not among its recordings"
                if renamed := next((other for other in now if other.endswith(f"/{name}")), None):
                    problem += f", but {renamed} is: names begin at the lowest folder that contains all inputs. To add"
                    problem += " inputs later, give that folder from the start"
                self._refuse(problem)
            if name in now and now[name] != before[name]:
                self._refuse(f"{name} has {now[name]:,} samples (at 16 kHz) now, and had {before[name]:,} before")

    def _excerpts(self, known: Iterable[str]) -> dict[str, list[float] | None]:
        """Return excerpts of the known recordings, of the longest, which are done first, and of some others."""
        utterances = self.recordings.utterances
        order = sorted(range(len(utterances)), key=lambda index: -utterances[index].num_samples)
        chosen = {*order[:_EXCERPTS_OF_EACH_KIND]}
        chosen |= {*random.Random(0).sample(order, min(len(order), _EXCERPTS_OF_EACH_KIND))}
        names = {*known}
        chosen |= {index for index, (name, _) in enumerate(utterances) if name in names}
        return {utterances[index].id: excerpt_of(self.recordings, index) for index in sorted(chosen)}
