"""
Units of a corpus on disk, in shards that are written atomically, so that a run resumes wherever it was killed.

The shards are the only record of what is done, and each recording belongs to one process, whatever is done already. So
no line is duplicated, lost or truncated.
"""

import json
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Self

from filelock import BaseFileLock, FileLock, Timeout

from ..analysis.segmentation import find_runs
from ..data import SAMPLING_RATE, SpeechSource
from ..data.finding import literal_paths
from ..utils.command_line import argument_errors
from ..utils.extras import import_extra
from ..utils.files import TEMPORARY_PREFIX, atomic_file, write_atomically
from ..utils.text_files import read_json
from .extraction import LayerKMeans, Progress, UnitExtractor, Units

FORMATS = ("jsonl", "parquet")
_SHARD = re.compile(rf"units-\d+-\d+\.({'|'.join(FORMATS)})")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def write_left_out(folder: Path, process: int, unreadable: dict[str, str]) -> None:
    """Write id -> error message of a process's unreadable recordings to `left_out-000.json`; no file if none is."""
    file = folder / f"left_out-{process:03}.json"
    file.unlink(missing_ok=True)  # of an earlier run
    if unreadable:
        _write_json(file, unreadable)


def share_of(recordings: SpeechSource, process: int, num_processes: int) -> list[int]:
    """Return the indices of a process's recordings, dealt by length so that all processes get about as much audio."""
    order = sorted(range(len(recordings)), key=lambda index: -recordings.utterances[index].num_samples)
    owners = cycle([*range(num_processes), *reversed(range(num_processes))])
    return [index for index, owner in zip(order, owners, strict=False) if owner == process]


def _ids_of(path: Path) -> list[str]:
    with argument_errors(f"{path} is damaged. Remove it to extract its recordings again: ", (ValueError, KeyError)):
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                return [json.loads(line)["id"] for line in lines]
        return import_extra("pyarrow.parquet", "train").read_table(path, columns=["id"])["id"].to_pylist()


def shards_of(folder: str | Path) -> list[Path]:
    """Return the shards of a folder, of all processes, in order."""
    return sorted(path for path in Path(folder).glob("units-*") if _SHARD.fullmatch(path.name))


def load_units(folder: str | Path) -> Any:
    """
    Open a folder that `UnitCorpus` wrote as a `datasets.Dataset` with one row per recording.

    Raises `ValueError` if it has no shards, `ImportError` if `datasets` is not installed.
    """
    shards = literal_paths(shards_of(folder))
    if not shards:
        raise ValueError(f"{folder} has no units. Give a folder that examples/extract_units.py wrote.")
    dataset = import_extra("datasets", "train").Dataset
    return dataset.from_json(shards) if shards[0].endswith(".jsonl") else dataset.from_parquet(shards)


class UnitCorpus:
    """
    A folder of units that several processes write together, and that a later run can continue.

    Call `open` in the main process before any other process uses the folder, then `write` in each process, then
    `finish` in the main process. Raises `ValueError` if the format is unknown or a number is out of range.

    Args:
        folder: Path of the folder; created if it does not exist.
        settings: Settings that the units depend on; a folder only has units of the same settings.
        form: "jsonl" or "parquet".
        deduplicate: Whether to merge runs of a unit into one, with its duration in frames.
        shard_seconds: Seconds of audio per shard, which is the most that a kill can cost.
        process: Index of this process.
        num_processes: Number of processes that write.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        *,
        form: str = "jsonl",
        deduplicate: bool = False,
        shard_seconds: float = 3600.0,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        if form not in FORMATS:
            raise ValueError(f"form={form!r} is unknown. Choose one of {', '.join(FORMATS)}.")
        if shard_seconds <= 0:
            raise ValueError(f"shard_seconds={shard_seconds} must be more than 0.")
        if not 0 <= process < num_processes:
            raise ValueError(f"process={process} must be at least 0 and below num_processes={num_processes}.")
        self.folder = Path(folder)
        self._settings = {**settings, "format": form, "deduplicate": deduplicate}
        self._form, self._deduplicate = form, deduplicate
        self._shard_samples = shard_seconds * SAMPLING_RATE
        self._process, self._num_processes = process, num_processes
        self._lock = FileLock(self.folder / f".lock-{process:03}")

    def open(self) -> Self:
        """
        Create the folder, or check that it can be continued. Call this in the main process before the others write.

        Raises `ValueError` if another run is writing to the folder, or its units have other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire(self._lock)
        for other in self.folder.glob(".lock-*"):
            if other != Path(self._lock.lock_file):
                self._acquire(FileLock(other)).release()  # a process that outlived the rest of its run
        file = self.folder / "settings.json"
        before = read_json(file) if file.is_file() else self._settings
        for name in {**before, **self._settings}:
            if before.get(name) != self._settings.get(name):
                self._lock.release()
                raise ValueError(
                    f"{self.folder} has units with {name}={before.get(name)!r}, but this run has"
                    f" {name}={self._settings.get(name)!r}. Use the same settings, or another folder."
                )
        for leftover in [*self.folder.glob(f"{TEMPORARY_PREFIX}*"), *self.folder.glob("left_out-*.json")]:
            leftover.unlink()
        _write_json(file, self._settings)
        return self

    def _acquire(self, lock: BaseFileLock) -> BaseFileLock:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            self._lock.release()
            raise ValueError(
                f"Another run is writing to {self.folder} ({Path(lock.lock_file).name} is locked). Wait for it, or"
                " stop all of its processes."
            ) from error
        return lock

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def todo(self, recordings: SpeechSource) -> list[int]:
        """Return the indices of this process's recordings that are in no shard yet."""
        done = {name for path in shards_of(self.folder) for name in _ids_of(path)}
        share = share_of(recordings, self._process, self._num_processes)
        return [index for index in share if recordings.utterances[index].id not in done]

    def write(
        self,
        extractor: UnitExtractor,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        on_progress: Progress = None,
    ) -> int:
        """
        Extract this process's recordings that are still to do, shard by shard, and return their number.

        When an error or Ctrl-C interrupts it, the units so far are written before the exception is raised again. The
        arguments are those of `UnitExtractor.units`. Raises `ValueError` if another run writes with the same index.
        """
        if not self._lock.is_locked:
            self._acquire(self._lock)
        indices = self.todo(recordings)
        lengths = dict(recordings.utterances[index] for index in indices)
        rows: list[dict[str, Any]] = []
        num_samples = 0
        try:
            for found in extractor.units(recordings, kmeans=kmeans, indices=indices, on_progress=on_progress):
                rows.append(self._row(found, extractor.layers))
                num_samples += lengths[found.id]
                if num_samples >= self._shard_samples:
                    shard, rows, num_samples = rows, [], 0
                    self._write_shard(shard)
        finally:
            self._write_shard(rows)
        write_left_out(self.folder, self._process, extractor.unreadable)
        return len(indices) - len(extractor.unreadable)

    def _row(self, found: Units, layers: Sequence[int]) -> dict[str, Any]:
        row: dict[str, Any] = {"id": found.id}
        for layer, codes in zip(layers, found.codes, strict=True):
            suffix = f"_{layer}" if len(layers) > 1 else ""
            if self._deduplicate:
                starts, durations = find_runs(codes)
                row |= {f"units{suffix}": codes[starts].tolist(), f"durations{suffix}": durations.tolist()}
            else:
                row[f"units{suffix}"] = codes.tolist()
        return row

    def _write_shard(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        stem = f"units-{self._process:03}"
        numbers = [int(path.stem.rpartition("-")[2]) for path in shards_of(self.folder) if path.name.startswith(stem)]
        path = self.folder / f"{stem}-{max(numbers, default=-1) + 1:06}.{self._form}"
        if self._form == "jsonl":
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            return
        pyarrow, parquet = (import_extra(name, "train") for name in ("pyarrow", "pyarrow.parquet"))
        types = {name: pyarrow.string() if name == "id" else pyarrow.list_(pyarrow.int32()) for name in rows[0]}
        with atomic_file(path) as temporary:
            parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(types.items())), temporary)

    def finish(self, extractor: UnitExtractor, recordings: SpeechSource, num_units: int) -> dict[str, Any]:
        """
        Write `summary.json`, with what was left out and why, and return its content.

        Call this in the main process after all others are done. `num_units` is the number of possible units.
        """
        left_out = recordings.left_out
        for file in sorted(self.folder.glob("left_out-*.json")):
            left_out |= read_json(file)
        shards = shards_of(self.folder)
        done = [name for path in shards for name in _ids_of(path)]
        known = dict(recordings.utterances)
        summary = {
            **self._settings,
            "num_recordings": len(done),
            "hours": round(sum(known.get(name, 0) for name in done) / SAMPLING_RATE / 3600, 6),
            "frame_seconds": extractor.frame_seconds,
            "num_units": num_units,
            "files": [path.name for path in shards],
            "left_out": left_out,
        }
        _write_json(self.folder / "summary.json", summary)
        return summary
