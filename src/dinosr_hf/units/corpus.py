"""
Units of a corpus on disk: shards that are whole or not there, so that a run goes on wherever it was killed.

A shard is written under another name, flushed to the disk and renamed. What is done is what stands in the shards, and
nothing else; a recording belongs to one process, whatever is done already. So no line comes twice, none is lost and
none is half.

`T` frames, `L` layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from numpy.typing import NDArray

from ..data import SAMPLING_RATE, SpeechSource
from ..utils.extras import import_extra
from .extraction import Progress, UnitExtractor, Units
from .kmeans import LayerKMeans

FORMATS = ("jsonl", "parquet")

_ASIDE = ".unfinished-"


def deduplicate(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    Runs of a unit as one; `numpy.repeat` of what is returned gives the codes back.

    Args:
        codes: int64 (T,).

    Returns:
        Units int64 (U,), no two alike in a row, and their durations in frames, int64 (U,).
    """
    starts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
    return codes[starts], np.diff(starts, append=len(codes))


def replace_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole on the disk or, whenever the process or the machine stops, as it was before."""
    aside = path.with_name(f"{_ASIDE}{path.name}")
    with open(aside, "wb") as file:
        file.write(content)
    rename_whole(aside, path)


def rename_whole(aside: Path, path: Path) -> None:
    """Flush a file that was written aside to the disk, and only then give it its name."""
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    if os.name != "nt":  # where a folder cannot be opened, its entries need no flush
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_left_out(folder: Path, process: int, unreadable: dict[str, str]) -> None:
    """Id -> message of what a process could not read, into `left_out-000.json`; no file if there is nothing."""
    file = folder / f"left_out-{process:03}.json"
    if unreadable:
        replace_whole(file, (json.dumps(unreadable, indent=2) + "\n").encode())
    else:
        file.unlink(missing_ok=True)  # of an earlier run


def share_of(recordings: SpeechSource, process: int, num_processes: int) -> list[int]:
    """Indices of the recordings of a process: dealt by length, so that all have about as much audio."""
    order = sorted(range(len(recordings)), key=lambda index: -recordings.utterances[index].num_samples)
    mine = []
    for place, index in enumerate(order):
        number, seat = divmod(place, num_processes)
        if process == (seat if number % 2 == 0 else num_processes - 1 - seat):  # there and back again
            mine.append(index)
    return mine


def _read_shard(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        yield from import_extra("pyarrow.parquet", "train").read_table(path).to_pylist()


def _ids_of(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [row["id"] for row in _read_shard(path)]
    return import_extra("pyarrow.parquet", "train").read_table(path, columns=["id"])["id"].to_pylist()


def shards_of(folder: str | Path) -> list[Path]:
    """The shards of a folder in order, of all processes."""
    return sorted(path for path in Path(folder).glob("units-*-*.*") if path.suffix[1:] in FORMATS)


def load_units(folder: str | Path) -> Any:
    """
    What `UnitCorpus` has written, as a `datasets.Dataset` with a row for each recording.

    Raises:
        ValueError: If the folder has no shards.
        ImportError: Without `datasets`.
    """
    shards = [str(path) for path in shards_of(folder)]
    if not shards:
        raise ValueError(f"{folder} has no units. Give a folder that examples/extract_units.py has written.")
    dataset = import_extra("datasets", "train").Dataset
    return dataset.from_json(shards) if shards[0].endswith(".jsonl") else dataset.from_parquet(shards)


class UnitCorpus:
    """
    A folder of units, which several processes write together, and which can be gone on with.

    Call `open` in the main process before any other touches the folder, then `write` in each, then `finish` in the
    main process.

    Args:
        folder: Made if it does not exist.
        settings: What the units depend on; a folder has units of the same settings only.
        form: "jsonl" or "parquet".
        deduplicate: Whether runs of a unit are one, with a duration in frames.
        shard_seconds: Audio of a shard: what a kill can cost.
        process: Number of this process.
        num_processes: How many write.

    Raises:
        ValueError: For another format, or numbers that cannot be.
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
        Make the folder, or see that it can be gone on with. In the main process, before the others go on.

        Raises:
            ValueError: If another run is writing into the folder, or its units are of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire(self._lock)
        for other in self.folder.glob(".lock-*"):
            if other != Path(self._lock.lock_file):
                self._acquire(FileLock(other)).release()  # a process that outlived the rest of its run
        file = self.folder / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name in {**before, **self._settings}:
                if before.get(name) != self._settings.get(name):
                    self._lock.release()
                    raise ValueError(
                        f"{self.folder} has units with {name}={before.get(name)!r}, and now it is"
                        f" {self._settings.get(name)!r}. Go on with the same settings, or give another folder."
                    )
        for leftover in [*self.folder.glob(f"{_ASIDE}*"), *self.folder.glob("left_out-*.json")]:
            leftover.unlink()
        replace_whole(file, (json.dumps(self._settings, indent=2) + "\n").encode())
        return self

    def _acquire(self, lock: BaseFileLock) -> BaseFileLock:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            self._lock.release()
            raise ValueError(
                f"{self.folder} is being written by another run ({Path(lock.lock_file).name}). Wait for it, or stop"
                " all of its processes."
            ) from error
        return lock

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def todo(self, recordings: SpeechSource) -> list[int]:
        """Indices of this process's recordings that no shard has yet."""
        done = {name for path in shards_of(self.folder) for name in _ids_of(path)}
        mine = share_of(recordings, self._process, self._num_processes)
        return [index for index in mine if recordings.utterances[index].id not in done]

    def write(
        self,
        extractor: UnitExtractor,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        on_progress: Progress = None,
    ) -> int:
        """
        Extract what is still to do of this process's share, shard by shard.

        What is there when something goes wrong, Ctrl-C too, is written before the error goes on.

        Args:
            extractor: Makes the units.
            recordings: All of them, for every process.
            kmeans: As for `UnitExtractor.units`.
            on_progress: As for `UnitExtractor.units`.

        Returns:
            Recordings written.

        Raises:
            ValueError: If another run's process of the same number is writing; and as `UnitExtractor.units`.
        """
        if not self._lock.is_locked:
            self._acquire(self._lock)
        indices = self.todo(recordings)
        lengths = dict(recordings.utterances[index] for index in indices)
        rows: list[dict[str, Any]] = []
        num_samples = num_written = 0
        try:
            for found in extractor.units(recordings, kmeans=kmeans, indices=indices, on_progress=on_progress):
                rows.append(self._row(found, extractor.layers))
                num_samples += lengths[found.id]
                if num_samples >= self._shard_samples:
                    shard, rows, num_samples = rows, [], 0
                    num_written += self._write_shard(shard, extractor.layers)
        finally:
            num_written += self._write_shard(rows, extractor.layers)
        write_left_out(self.folder, self._process, extractor.unreadable)
        return num_written

    def _row(self, found: Units, layers: Sequence[int]) -> dict[str, Any]:
        row: dict[str, Any] = {"id": found.id}
        for layer, codes in zip(layers, found.codes, strict=True):
            suffix = f"_{layer}" if len(layers) > 1 else ""
            if self._deduplicate:
                units, durations = deduplicate(codes)
                row |= {f"units{suffix}": units.tolist(), f"durations{suffix}": durations.tolist()}
            else:
                row[f"units{suffix}"] = codes.tolist()
        return row

    def _write_shard(self, rows: list[dict[str, Any]], layers: Sequence[int]) -> int:
        if not rows:
            return 0
        mine = f"units-{self._process:03}"
        numbers = [int(path.stem.rpartition("-")[2]) for path in shards_of(self.folder) if path.name.startswith(mine)]
        path = self.folder / f"{mine}-{max(numbers, default=-1) + 1:06}.{self._form}"
        aside = path.with_name(f"{_ASIDE}{path.name}")
        if self._form == "jsonl":
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            pyarrow = import_extra("pyarrow", "train")
            kinds = {name: pyarrow.string() if name == "id" else pyarrow.list_(pyarrow.int32()) for name in rows[0]}
            table = pyarrow.Table.from_pylist(rows, pyarrow.schema(kinds.items()))
            import_extra("pyarrow.parquet", "train").write_table(table, aside)
        rename_whole(aside, path)
        return len(rows)

    def finish(self, extractor: UnitExtractor, recordings: SpeechSource, num_units: int) -> dict[str, Any]:
        """
        Write `summary.json`: what there is, and what was left out and why. In the main process, after all others.

        Args:
            extractor: That made the units.
            recordings: All of them.
            num_units: Different units that there could be.

        Returns:
            What is in the file.
        """
        left_out = {name: reason for reason, names in recordings.skipped.items() for name in names}
        left_out = {name: reason for name, reason in left_out.items() if reason != "hidden"}
        for file in sorted(self.folder.glob("left_out-*.json")):
            left_out |= json.loads(file.read_text(encoding="utf-8"))
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
        replace_whole(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        return summary
