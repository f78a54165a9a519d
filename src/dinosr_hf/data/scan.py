"""Scan a folder of recordings: which are usable, which are not and why, and a manifest of the usable ones."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.files import claim_output_file, write_atomically
from ..utils.names import printable_name
from ..utils.tables import csv_table
from .audio import BLOCK_FRAMES, AudioFileError, OpenAudio, open_audio, require, resampled_length
from .finding import find_audio, how_to_convert, is_hidden
from .sources import map_in_threads

# Shorter files are of use to no run: less than one masked span of the paper's model (mask_length 10, its
# convolutions). A run leaves out more by its own min_seconds when it plans.
MIN_SECONDS = 0.21

_SUFFIXES = (".jsonl", ".csv", ".tsv")
_LINE_ENDS = "\r\n"


class ScannedFile(NamedTuple):
    """An audio file and what the scan found."""

    name: str  # path relative to the folder, with /
    num_frames: int = 0  # length at its own rate; 0 if the header could not be read
    sampling_rate: int = 0  # its own rate, Hz
    num_channels: int = 0
    format: str = ""  # container and encoding, such as "FLAC PCM_16"
    # Why it is left out: as in `AudioFileError`, "too short", "silent" (all samples equal), "hidden", "line break".
    reason: str = ""
    message: str = ""  # the reason in detail

    @property
    def seconds(self) -> float:
        """Duration; 0 if the header could not be read."""
        return self.num_frames / self.sampling_rate if self.sampling_rate else 0.0


class FolderScan(NamedTuple):
    """The audio files of a folder, usable and left out, each sorted by name. `str` of it is the report."""

    folder: Path
    usable: list[ScannedFile]
    left_out: list[ScannedFile]

    def __str__(self) -> str:
        seconds = np.array([file.seconds for file in self.usable])
        lines = [f"{self.folder}: {len(self.usable):,} usable files, {seconds.sum() / 3600:,.2f} h"]
        if len(seconds):
            low, middle, high = np.percentile(seconds, (5, 50, 95))
            lines += [
                f"  seconds    {seconds.min():.2f} to {seconds.max():,.2f}, mean {seconds.mean():.2f}, median"
                f" {middle:.2f}, 90 % of them {low:.2f} to {high:.2f}",
                "  rates      " + _count(f"{file.sampling_rate:,} Hz" for file in self.usable),
                "  channels   " + _count(str(file.num_channels) for file in self.usable),
                "  formats    " + _count(file.format for file in self.usable),
            ]
        lost = sum(file.seconds for file in self.left_out) / 3600
        lines.append(f"left out: {len(self.left_out):,} files, {lost:,.2f} h by their headers")
        for reason, number in Counter(file.reason for file in self.left_out).most_common():
            example = next(file.name for file in self.left_out if file.reason == reason)
            printable = printable_name(example)
            kind = reason.removeprefix("unsupported ")
            advice = f" ({how_to_convert(printable, kind)})" if kind != reason else ""
            lines.append(f"  {number:,} {reason}, such as {printable}{advice}")
        return "\n".join(lines)


def _count(values: Iterable[str]) -> str:
    return ", ".join(f"{value}: {number:,}" for value, number in Counter(values).most_common())


def scan_folder(
    folder: str | Path, *, min_seconds: float = MIN_SECONDS, decode: bool = False, show_progress: bool = False
) -> FolderScan:
    """
    Scan all audio files in a folder and below, also by symbolic links.

    Leaves out hidden files, those in hidden folders, and audio of kinds that libsndfile cannot read.

    Reads the headers, and each file from its beginning to the first sample that differs from those before it, which
    tells a silent file from one that only begins so. Files of floating-point samples are decoded completely, since
    only they can hold NaN. A truncated FLAC or MP3 is found if its header promises more than can be decoded; what is
    left of other truncated files is usable, with a warning.

    Args:
        folder: Path to the folder.
        min_seconds: Length of the shortest usable file.
        decode: Whether to decode all files completely, which finds all that are truncated or damaged.
        show_progress: Whether to show a progress bar, if this is a terminal.

    Raises:
        ValueError: If it is not a folder or has no audio files, or `min_seconds` is negative.
        ImportError: If soundfile is not installed.
    """
    if min_seconds < 0:
        raise ValueError(f"min_seconds={min_seconds} is out of range: it must be at least 0.")
    folder = Path(folder)
    found = find_audio(folder)
    names = sorted(found.names + found.hidden)
    require("soundfile")
    scan_one = partial(_scan_file, folder, min_seconds=min_seconds, decode=decode)
    files = map_in_threads(scan_one, names, "Scanning", show_progress=show_progress)
    return FolderScan(folder, [file for file in files if not file.reason], [file for file in files if file.reason])


def _scan_file(folder: Path, name: str, *, min_seconds: float, decode: bool) -> ScannedFile:
    file = ScannedFile(name)
    if is_hidden(name):
        return file._replace(reason="hidden", message="Its name, or that of a folder, begins with a dot.")
    if set(name) & set(_LINE_ENDS):
        return file._replace(reason="line break", message="A manifest cannot hold its name. Rename it.")
    try:
        with open_audio(folder / name) as audio:
            file = ScannedFile(name, audio.count_frames(), audio.rate, audio.num_channels, audio.kind)
            if resampled_length(file.num_frames, file.sampling_rate) == 0:
                return file._replace(reason="empty", message="It has no samples.")
            if file.seconds < min_seconds:
                return file._replace(reason="too short", message=f"It has {file.seconds:.3f} s.")
            can_hold_nan = audio.subtype in ("FLOAT", "DOUBLE")
            if _is_silent(audio, file, decode=decode or can_hold_nan):
                return file._replace(reason="silent", message="All its samples are equal.")
    except (AudioFileError, OSError) as error:
        return file._replace(reason=getattr(error, "reason", "unreadable"), message=str(error))
    return file


def _is_silent(audio: OpenAudio, file: ScannedFile, *, decode: bool) -> bool:
    """Return whether all samples are equal; read up to the first that is not, or with `decode` to the end."""
    position, is_silent, level = 0, True, None
    size = max(1, file.sampling_rate // 10)
    while position < file.num_frames and (is_silent or decode):
        samples = audio.read(position, min(size, file.num_frames - position))
        if not np.isfinite(samples).all():
            raise AudioFileError("It has samples that are NaN or infinite.", "not finite")
        level = samples[0] if level is None else level
        is_silent = is_silent and bool((samples == level).all())
        position += len(samples)
        size = BLOCK_FRAMES
    return is_silent


def check_manifest_path(path: str | Path, *, cut_seconds: float | None = None, overwrite: bool = False) -> None:
    """Raise `ValueError` if `write_manifest` cannot write a manifest of this name, whatever the recordings."""
    if not str(path).endswith(_SUFFIXES):
        raise ValueError(f"{path} must end in .jsonl, .csv or .tsv.")
    if cut_seconds is not None and not cut_seconds >= 2 * MIN_SECONDS:  # parts are longer than half of it
        raise ValueError(f"cut_seconds={cut_seconds} is out of range: it must be at least {2 * MIN_SECONDS}.")
    if cut_seconds is not None and Path(path).suffix == ".tsv":
        raise ValueError(f"{path}: a .tsv cannot hold parts of recordings. Write .jsonl or .csv.")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists. Give another name, or overwrite to replace it.")
    claim_output_file(path)


def write_manifest(
    scan: FolderScan, path: str | Path, *, cut_seconds: float | None = None, overwrite: bool = False
) -> list[Path]:
    """
    Write a manifest of the usable files, for `open_source`, and if anything was left out, a list of that beside it.

    Ids are the names relative to the folder, so a run has the same masks and crops with the manifest as with the
    folder, if nothing is cut. Paths are relative if the manifest is in the folder or above it, so that both can be
    moved together, else absolute. The suffix says what is written: `.jsonl` or `.csv` for any files, `.tsv` (of
    fairseq) for files of one rate. The list is `NAME.left_out.csv` (name, reason, message). Each file is written
    atomically.

    With `cut_seconds`, a longer recording is as many lines as it has parts, all of one length of at most that, with
    `offset` and `duration`: a run takes one crop of each line in an epoch, and so little of a long recording. Such a
    part's id is the name with its offset, `talk.flac@12.5`.

    Returns the paths of the files written. Raises `ValueError` if no file is usable, the manifest exists or has
    another suffix, `cut_seconds` is less than twice `MIN_SECONDS`, or a `.tsv` cannot hold the files.
    """
    path = Path(path)
    check_manifest_path(path, cut_seconds=cut_seconds, overwrite=overwrite)
    if not scan.usable:
        raise ValueError(f"There is nothing to write.\n{scan}")
    folder, beside = scan.folder.resolve(), path.parent.resolve()
    base = folder.relative_to(beside) if folder.is_relative_to(beside) else folder
    written = {path: _manifest(path.suffix, base, scan.usable, cut_seconds or math.inf)}
    others = path.with_name(f"{path.stem}.left_out.csv")
    if scan.left_out:
        rows = [(printable_name(file.name), file.reason, printable_name(file.message)) for file in scan.left_out]
        written[others] = csv_table(("name", "reason", "message"), rows)
    else:
        others.unlink(missing_ok=True)  # of an earlier scan
    for file, text in written.items():
        write_atomically(file, text.encode("utf-8", "surrogateescape"))
    return list(written)


def _parts(file: ScannedFile, cut_seconds: float) -> Iterator[tuple[str, int | None, Decimal | None, Decimal]]:
    """Yield id, number of frames or else offset, and duration of the parts of a file; the file as a whole if short."""
    num_parts = max(1, math.ceil(file.seconds / cut_seconds))
    frames = (number * file.num_frames // num_parts for number in range(num_parts + 1))
    # All decimals, also those that are 0: readers take times with few for rounded.
    bounds = [Decimal(f"{frame / file.sampling_rate:.6f}") for frame in frames]
    if num_parts == 1:
        yield printable_name(file.name), file.num_frames, None, bounds[1]
        return
    for start, stop in pairwise(bounds):
        yield f"{printable_name(file.name)}@{start.normalize():f}", None, start, stop - start


def _json_line(row: Mapping[str, Any]) -> str:
    """Format a row without what it lacks; names that are not UTF-8 are escaped."""
    cells = {name: value for name, value in row.items() if value is not None}
    texts = (str(value) if isinstance(value, Decimal) else json.dumps(value) for value in cells.values())
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in zip(cells, texts, strict=True)) + "}\n"


def _manifest(suffix: str, base: Path, files: list[ScannedFile], cut_seconds: float) -> str:
    if set(str(base)) & set(_LINE_ENDS):
        raise ValueError(
            f"The folder {str(base)!r} has a line break in its name, which no manifest can hold. Rename it."
        )
    if suffix == ".tsv":
        if len({file.sampling_rate for file in files}) > 1:
            rates = _count(f"{file.sampling_rate:,} Hz" for file in files)
            raise ValueError(f"The files have different rates ({rates}), but a .tsv has one. Write .jsonl or .csv.")
        broken = next((file.name for file in files if "\t" in file.name), None)
        if broken is not None:
            raise ValueError(f"{broken!r} has a tab, which a .tsv cannot hold. Write .jsonl or .csv.")
        return "".join([f"{base.as_posix()}\n", *(f"{file.name}\t{file.num_frames}\n" for file in files)])
    columns = ["path", "id", "num_frames", "sampling_rate", "num_channels", "format", "offset", "duration"]
    rows = [
        ((base / file.name).as_posix(), id_, frames, *file[2:5], offset, seconds)
        for file in files
        for id_, frames, offset, seconds in _parts(file, cut_seconds)
    ]
    if suffix == ".csv":
        # Text in quotes: `csv_rows` drops the spaces at the start of a field without them.
        return csv_table(columns, rows, quoting=csv.QUOTE_NONNUMERIC)
    return "".join(_json_line(dict(zip(columns, row, strict=True))) for row in rows)
