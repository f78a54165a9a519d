"""
A folder of recordings looked through once: what is usable, what is not and why, and a manifest of the former.

Files keep their own rate here; a *frame* of a file is one sample of each channel.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError, _num_frames, _open, require, resampled_length
from .sources import AUDIO_SUFFIXES, _find_audio, _is_hidden

# What no run can use is left out: less than one masked span of the paper's model (mask_length 10, its convolutions).
# More is for the run to say, whose own min_seconds leaves out utterances when it plans.
MIN_SECONDS = 0.21

# Only these can hold NaN.
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")

_FIRST_SECONDS = 0.1
_BLOCK_FRAMES = 1 << 22


class ScannedFile(NamedTuple):
    """
    A file and what was found.

    Attributes:
        name: Path relative to the folder, with /.
        num_frames: Length at its own rate; 0 where the header could not be read.
        sampling_rate: Its own rate, Hz.
        num_channels: Channels.
        format: Container and encoding, such as "FLAC PCM_16".
        reason: Why it is left out, in a few words to count by: those of `AudioFileError`, "too short", "silent" (all
            samples are equal), "hidden". Empty if it is usable.
        message: The same at length.
    """

    name: str
    num_frames: int = 0
    sampling_rate: int = 0
    num_channels: int = 0
    format: str = ""
    reason: str = ""
    message: str = ""

    @property
    def seconds(self) -> float:
        """Duration; 0 where the header could not be read."""
        return self.num_frames / self.sampling_rate if self.sampling_rate else 0.0


class FolderScan(NamedTuple):
    """
    All audio files of a folder. `str` of it is the report.

    Attributes:
        folder: The folder.
        usable: In the order of their names.
        left_out: The others.
    """

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
            example = next(file for file in self.left_out if file.reason == reason)
            lines.append(f"  {number:,} {reason}, such as {_printable(example.name)}")
        return "\n".join(lines)


def _printable(name: str) -> str:
    """File names need not be UTF-8, which a terminal wants."""
    return name.encode("utf-8", "backslashreplace").decode()


def _count(values: Iterable[str]) -> str:
    return ", ".join(f"{value}: {number:,}" for value, number in Counter(values).most_common())


def scan_folder(
    folder: str | Path, *, min_seconds: float = MIN_SECONDS, decode: bool = False, show_progress: bool = False
) -> FolderScan:
    """
    Look through all audio files in a folder and below, in threads.

    Headers are read, and the beginning of each file, up to the first sample that differs from those before it: by that
    a silent file is told from one that only begins so. Files of floating-point samples are decoded, since only they
    can hold NaN. A truncated file is found if its format says so in the header or if what is decoded is not there; of
    WAV files cut short, libsndfile takes what there is.

    Args:
        folder: The folder; symbolic links are followed, hidden folders left alone.
        min_seconds: Shorter files are left out.
        decode: Whether to decode all files to their end, which finds all that are truncated or damaged.
        show_progress: Whether to show a progress bar, if this is a terminal.

    Raises:
        ValueError: If it is no folder or has no audio files, and for a negative `min_seconds`.
        ImportError: Without soundfile.
    """
    if min_seconds < 0:
        raise ValueError(f"min_seconds={min_seconds} is out of range: it must be at least 0.")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give a folder that has audio files in it or below it.")
    names = sorted(_find_audio(folder))
    if not names:
        raise ValueError(f"{folder} has no audio files in it or below it. Looked for {', '.join(AUDIO_SUFFIXES)}.")
    require("soundfile")
    scan_one = partial(_scan_file, folder, min_seconds=min_seconds, decode=decode)
    # Files are waited for rather than computed on (network disks), and decoders let other threads run.
    with ThreadPool(min(32, 4 * (os.cpu_count() or 1))) as pool:
        progress = partial(require("tqdm").tqdm, disable=None if show_progress else True, unit=" files")
        files = list(progress(pool.imap(scan_one, names, chunksize=16), "Scanning", len(names)))
    return FolderScan(folder, [file for file in files if not file.reason], [file for file in files if file.reason])


def _scan_file(folder: Path, name: str, *, min_seconds: float, decode: bool) -> ScannedFile:
    file = ScannedFile(name)
    if _is_hidden(name):
        return file._replace(reason="hidden", message="Its name begins with a dot.")
    path = folder / name
    try:
        with _open(path) as sound:
            kind = f"{sound.format} {sound.subtype}"
            file = ScannedFile(name, _num_frames(sound, path), sound.samplerate, sound.channels, kind)
            if resampled_length(file.num_frames, file.sampling_rate) == 0:
                return file._replace(reason="empty", message="It has no samples.")
            if file.seconds < min_seconds:
                return file._replace(reason="too short", message=f"It has {file.seconds:.3f} s.")
            is_silent = _decode(sound, file, to_the_end=decode or sound.subtype in _FLOAT_SUBTYPES)
    except AudioFileError as error:
        return file._replace(reason=error.reason, message=str(error))
    except OSError as error:
        return file._replace(reason="unreadable", message=str(error))
    return file._replace(reason="silent", message="All its samples are equal.") if is_silent else file


def _decode(sound: Any, file: ScannedFile, *, to_the_end: bool) -> bool:
    """Whether all samples are equal; read up to the first that is not, or to the end. Raises `AudioFileError`."""
    soundfile = require("soundfile")
    position, is_silent, level = 0, True, None
    size = max(1, int(_FIRST_SECONDS * file.sampling_rate))
    while position < file.num_frames and (is_silent or to_the_end):
        count = min(size, file.num_frames - position)
        try:
            samples = sound.read(count, dtype="float32", always_2d=True).mean(axis=1)
            cause = f"{position + len(samples):,} of {file.num_frames:,} frames could be read"
        except soundfile.SoundFileError as error:
            samples, cause = np.empty(0), str(error).strip() or "the decoder gave up"
        if len(samples) < count:
            raise AudioFileError(f"It is truncated or damaged: {cause}.", "truncated")
        if not np.isfinite(samples).all():
            raise AudioFileError("It has samples that are NaN or infinite.", "not finite")
        level = samples[0] if level is None else level
        is_silent = is_silent and bool((samples == level).all())
        position += count
        # soundfile seeks after each read, after which MP3s are decoded wrongly: there, the rest in one.
        size = file.num_frames if sound.format == "MP3" else _BLOCK_FRAMES
    return is_silent


def write_manifest(scan: FolderScan, path: str | Path, *, overwrite: bool = False) -> list[Path]:
    """
    Write the usable files as a manifest that `open_source` opens, and a list of the others beside it.

    Ids are the names relative to the folder, so that a run has the same masks and crops by the manifest as by the
    folder. Paths are relative if the manifest is in the folder or above it, so that both can be moved together, else
    absolute. Each file appears when it is whole.

    Args:
        scan: What `scan_folder` found.
        path: The manifest: `.jsonl` and `.csv` for any files, `.tsv` (fairseq's) for files of one rate.
        overwrite: Whether an existing manifest is replaced.

    Returns:
        The files written: the manifest, and if anything was left out `NAME.left_out.csv` (name, reason, message).

    Raises:
        ValueError: If no file is usable, the manifest exists or has another suffix, or a `.tsv` cannot hold the files.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path.name} must end in one of {', '.join(_WRITERS)}, which says what is written.")
    if not scan.usable:
        raise ValueError(f"There is nothing to write.\n{scan}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists. Give another name, or say that it is to be replaced (overwrite).")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, beside = scan.folder.resolve(), path.parent.resolve()
    base = folder.relative_to(beside) if folder.is_relative_to(beside) else folder
    _write_whole(path, partial(_WRITERS[path.suffix], base, scan.usable))
    others = path.with_name(f"{path.stem}.left_out.csv")
    if not scan.left_out:
        others.unlink(missing_ok=True)  # of an earlier scan
        return [path]
    rows = [("name", "reason", "message"), *((file.name, file.reason, file.message) for file in scan.left_out)]
    _write_whole(others, lambda out: csv.writer(out, lineterminator="\n").writerows(rows))
    return [path, others]


def _write_whole(path: Path, write: Callable[[IO[str]], None]) -> None:
    unfinished = path.with_name(f".{path.name}-unfinished-{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            write(out)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _row(base: Path, file: ScannedFile) -> dict[str, Any]:
    return {
        "path": (base / file.name).as_posix(),
        "id": file.name,
        "num_frames": file.num_frames,
        "sampling_rate": file.sampling_rate,
        "num_channels": file.num_channels,
        "format": file.format,
        "duration": round(file.seconds, 6),
    }


def _write_jsonl(base: Path, files: list[ScannedFile], out: IO[str]) -> None:
    # Escapes keep names that are not UTF-8.
    out.writelines(json.dumps(_row(base, file)) + "\n" for file in files)


def _write_csv(base: Path, files: list[ScannedFile], out: IO[str]) -> None:
    writer = csv.DictWriter(out, _row(base, files[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(base, file) for file in files)


def _write_tsv(base: Path, files: list[ScannedFile], out: IO[str]) -> None:
    rates = Counter(file.sampling_rate for file in files)
    if len(rates) > 1:
        raise ValueError(
            f"The files have different rates ({_count(f'{file.sampling_rate:,} Hz' for file in files)}), which a .tsv"
            f" does not tell apart: its frames are at {SAMPLING_RATE:,} Hz or one other rate. Write .jsonl or .csv."
        )
    broken = next((file.name for file in files if set(file.name) & set("\t\r\n")), None)
    if broken is not None:
        raise ValueError(f"{broken!r} has a tab or a line break, which a .tsv cannot hold. Write .jsonl or .csv.")
    out.write(f"{base.as_posix()}\n")
    out.writelines(f"{file.name}\t{file.num_frames}\n" for file in files)


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".tsv": _write_tsv}
