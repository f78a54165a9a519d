"""
Units of a corpus on disk, in shards that are written atomically, so that a run resumes wherever it was killed.

The shards are the only record of what is done, and each recording belongs to one process, whatever is done already. So
no line is duplicated, lost or truncated.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.discophon import NUM_UNITS, pad_units, parts_of, units_line
from ..analysis.segmentation import find_runs
from ..data import SAMPLING_RATE, SpeechSource
from ..data.finding import literal_paths
from ..data.output_folder import OutputFolder
from ..utils.command_line import check_choice
from ..utils.extras import import_extra
from ..utils.files import atomic_file, write_atomically
from ..utils.names import one_line
from ..utils.text_files import json_lines, read_json
from .extraction import LayerExtractor, Progress, UnitExtractor, Units
from .layer_kmeans import LayerKMeans

FORMATS = ("jsonl", "parquet", "discophon")
_SHARD = re.compile(r"units-\d+-\d+\.(jsonl|parquet)")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def share_of(recordings: SpeechSource, process: int, num_processes: int) -> list[int]:
    """Return the indices of a process's recordings, dealt by length so that all processes get about as much audio."""
    order = sorted(range(len(recordings)), key=lambda index: -recordings.utterances[index].num_samples)
    owners = cycle([*range(num_processes), *reversed(range(num_processes))])
    return [index for index, owner in zip(order, owners, strict=False) if owner == process]


def _ids_of(path: Path) -> list[str]:
    try:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                ids = [json.loads(line)["id"] for line in lines]
        else:
            with open(path, "rb") as file:  # pyarrow opens no path that is not UTF-8
                ids = import_extra("pyarrow.parquet", "train").read_table(file, columns=["id"])["id"].to_pylist()
        if not all(isinstance(name, str) for name in ids):
            raise ValueError("it has an id that is not text")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        advice = "Remove it to extract its recordings again"
        raise ValueError(f"{path} is damaged. {advice}: {one_line(error)}.") from error
    return ids


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
        raise ValueError(f"{folder} has no units. Give a folder that `dinosr units` wrote.")
    dataset = import_extra("datasets", "train").Dataset
    return dataset.from_json(shards) if shards[0].endswith(".jsonl") else dataset.from_parquet(shards)


class ExtractionFolder(OutputFolder):
    """
    What folders of units and of features share: a process's recordings, and a list of those that are unreadable.

    Raises `ValueError` if `process` is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        extractor: LayerExtractor,
        recordings: SpeechSource,
        settings: Mapping[str, Any],
        *,
        results: str,
        process: int,
        num_processes: int,
    ) -> None:
        if not 0 <= process < num_processes:
            raise ValueError(f"process={process} must be at least 0 and below num_processes={num_processes}.")
        settings = {"results": results, **extractor.settings, **settings}
        super().__init__(folder, recordings, settings, results=results, process=process)
        self.extractor: LayerExtractor = extractor
        self._share = share_of(recordings, process, num_processes)

    def _begin(self) -> None:
        super()._begin()
        for file in [*self.folder.glob("left_out-*.json"), self.folder / "summary.json"]:  # of an earlier run
            file.unlink(missing_ok=True)

    def todo(self) -> list[int]:
        """Return the indices of this process's recordings that are not done yet."""
        done = set(self._complete())
        return [index for index in self._share if self.recordings.utterances[index].id not in done]

    def write_left_out(self) -> None:
        """
        Write id -> reason of this process's unreadable recordings to `left_out-000.json`, if any are.

        Those that could not be opened are the main process's.
        """
        left_out = {**(self.recordings.left_out if self._process == 0 else {}), **self.extractor.unreadable}
        if left_out:
            _write_json(self.folder / f"left_out-{self._process:03}.json", left_out)

    @property
    def left_out(self) -> dict[str, str]:
        """Id -> reason of the recordings that all processes have written to `left_out-*.json`."""
        files = sorted(self.folder.glob("left_out-*.json"))
        return {name: reason for file in files for name, reason in read_json(file).items()}


class UnitCorpus(ExtractionFolder):
    """
    A folder of units that several processes write together, and that a later run can continue.

    Call `open` in the main process before any other process uses the folder, then `write` in each process, then
    `finish` in the main process. Raises `ValueError` if the format is unknown or a number is out of range.

    Args:
        folder: Path of the folder; created if it does not exist.
        extractor: Extracts the units. A folder only has those of one model, with the same settings.
        recordings: As `open_source` or `open_recordings` opens them: those in the folder, if any, and more.
        kmeans: Clusters of the extractor's layer and source to use as units, see `UnitExtractor.units`.
        form: "jsonl", "parquet", or "discophon": JSONL shards, and from them DiscoPhon's files, such as
            `layer-5/units-eng-test.jsonl`, of recordings in its folders, such as `audio/eng/test`.
        deduplicate: Whether to merge runs of a unit into one, with its duration in frames.
        shard_seconds: Seconds of audio per shard, which is the most that a kill can cost.
        process: Index of this process.
        num_processes: Number of processes that write.
    """

    extractor: UnitExtractor

    def __init__(
        self,
        folder: str | Path,
        extractor: UnitExtractor,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        form: str = "jsonl",
        deduplicate: bool = False,
        shard_seconds: float = 3600.0,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        check_choice("form", form, FORMATS)
        if shard_seconds <= 0:
            raise ValueError(f"shard_seconds={shard_seconds} must be more than 0.")
        extractor.check_units(kmeans)
        clusters = None if kmeans is None else kmeans.digest
        settings = {"layers": extractor.layers, "kmeans_sha256": clusters, "format": form, "deduplicate": deduplicate}
        place = {"process": process, "num_processes": num_processes}
        super().__init__(folder, extractor, recordings, settings, results="units", **place)
        self._kmeans, self._form, self._deduplicate = kmeans, form, deduplicate
        self._num_units = extractor.config.num_units(extractor.source) if kmeans is None else len(kmeans.centroids)
        self._parts = parts_of(recordings) if form == "discophon" else {}
        if form == "discophon" and deduplicate:
            raise ValueError("DiscoPhon reads a unit for each frame. Leave deduplicate out, or choose another format.")
        if form == "discophon" and self._num_units > NUM_UNITS:
            raise ValueError(
                f"DiscoPhon takes at most {NUM_UNITS} units, and there are {self._num_units:,}. Use k-means of"
                f" {NUM_UNITS} clusters, or another format."
            )
        self._shard_samples = shard_seconds * SAMPLING_RATE

    def _done(self) -> list[str]:
        return [name for path in shards_of(self.folder) for name in _ids_of(path)]

    def write(self, *, on_progress: Progress = None) -> int:
        """
        Extract this process's recordings that are still to do, shard by shard, and return their number.

        When an error or Ctrl-C interrupts it, the units so far are written before the exception is raised again.
        Raises `ValueError` as `open` does.
        """
        self.open()
        indices = self.todo()
        lengths = dict(self.recordings.utterances[index] for index in indices)
        rows: list[dict[str, Any]] = []
        num_samples = 0
        found = self.extractor.units(self.recordings, kmeans=self._kmeans, indices=indices, on_progress=on_progress)
        try:
            for units in found:
                rows.append(self._row(units))
                num_samples += lengths[units.id]
                if num_samples >= self._shard_samples:
                    shard, rows, num_samples = rows, [], 0
                    self._write_shard(shard)
        finally:
            self._write_shard(rows)
        self.write_left_out()
        return len(indices) - len(self.extractor.unreadable)

    def _row(self, found: Units) -> dict[str, Any]:
        row: dict[str, Any] = {"id": found.id}
        layers = self.extractor.layers
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
        suffix = "parquet" if self._form == "parquet" else "jsonl"
        path = self.folder / f"{stem}-{max(numbers, default=-1) + 1:06}.{suffix}"
        if suffix == "jsonl":
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            return
        pyarrow, parquet = (import_extra(name, "train") for name in ("pyarrow", "pyarrow.parquet"))
        types = {name: pyarrow.string() if name == "id" else pyarrow.list_(pyarrow.int32()) for name in rows[0]}
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(types.items())), file)

    def _write_discophon(self) -> list[str]:
        """Write DiscoPhon's files from the shards, a folder for each layer; return their names."""
        lines, lengths = defaultdict[Path, list[str]](list), dict(self.recordings.utterances)
        layers, stride = self.extractor.layers, self.extractor.config.inputs_to_logits_ratio
        for shard in shards_of(self.folder):
            for _, row in json_lines(shard):
                if row["id"] not in self._parts:  # it cannot be read any more
                    continue
                part, name = self._parts[row["id"]]
                for layer in layers:
                    codes = np.array(row[f"units_{layer}" if len(layers) > 1 else "units"])
                    units = pad_units(codes, lengths[row["id"]], stride).tolist()
                    lines[self.folder / f"layer-{layer}" / part.units_file].append(units_line(name, units))
        for file, own in lines.items():
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, "".join(sorted(own)))
        return sorted(file.relative_to(self.folder).as_posix() for file in lines)

    def finish(self) -> dict[str, Any]:
        """
        Write `summary.json`, with what was left out and why, and return its content; and DiscoPhon's files.

        Call this in the main process after all others are done.
        """
        done, known = self._done(), dict(self.recordings.utterances)
        summary = {
            "model_name": self.extractor.name,
            **self.settings,
            "num_recordings": len(done),
            "hours": round(sum(known.get(name, 0) for name in done) / SAMPLING_RATE / 3600, 6),
            "frame_seconds": self.extractor.frame_seconds,
            "num_units": self._num_units,
            "files": [path.name for path in shards_of(self.folder)],
            **({"discophon": self._write_discophon()} if self._form == "discophon" else {}),
            "left_out": self.left_out,
        }
        _write_json(self.folder / "summary.json", summary)
        return summary
